"""Calibrates models on 4 ranks, for test_calibration_sync.py; the oracle is max|W| of the weights put together here."""

import sys
from collections.abc import Iterator

import modelopt.torch.quantization as mtq
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

import quantplug.plugins  # noqa: F401
from quantplug.megatron.parallel import current_topology, initialize_parallel
from tests.plugins.tiny_model import DENSE, tiny_model


def dense_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    names = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    return ((name, module) for name, module in model.named_modules() if name.endswith(names))


def fill(model: nn.Module) -> None:
    """Another largest weight on every rank and in every matrix; replicas over DP agree."""
    topology = current_topology()
    torch.manual_seed(100 * topology.pp_rank + topology.tp_rank)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=float(torch.rand(()) + 0.1))


def whole_amax(weight: torch.Tensor) -> torch.Tensor:
    """max|W| of the weight whose shards the tensor parallel ranks of this stage hold."""
    shards = [torch.empty_like(weight) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    dist.all_gather(shards, weight.detach().contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat([shard.flatten() for shard in shards]).abs().max()


def dense(**layout: int) -> None:
    parallel_state.destroy_model_parallel()
    initialize_parallel(**layout)
    model = tiny_model(**DENSE)
    fill(model)
    mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    checked = 0
    for name, linear in dense_linears(model):
        assert torch.equal(linear.weight_quantizer.amax, whole_amax(linear.weight)), (layout, name)
        checked += 1
    assert checked == 4 * len(model.decoder.layers)
    if dist.get_rank() == 0:
        sys.stdout.write(f"dense {layout} ok\n")


def main() -> None:
    initialize_parallel()
    for layout in ({"tp": 2, "pp": 2}, {"tp": 2}, {"tp": 4}):
        dense(**layout)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
