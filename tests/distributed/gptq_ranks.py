"""Algorithms that know inputs on 4 ranks, by the same inputs at every layout, for test_calibration_sync.py."""

import re
import sys
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file
from transformer_engine.pytorch import GroupedLinear

import quantplug.plugins  # noqa: F401
from quantplug import LayerSpec, import_mcore_gpt_from_hf, plan_export, write_input_moments
from quantplug.calibration.algorithms.targets import targets
from quantplug.calibration.inputs.linears import LinearWeight
from quantplug.megatron.parallel import initialize_parallel
from tests.calibration.inputs.fed import TOKENS, feed, identity, multiply_in_torch
from tests.calibration.local_model import build

WHOLE_EXPERTS, SLICED_EXPERTS = {"tp": 2, "ep": 2}, {"tp": 2, "ep": 2, "etp": 2}
LAYOUTS = {
    "gptq": (WHOLE_EXPERTS, SLICED_EXPERTS),
    "weighted_mse": (SLICED_EXPERTS,),
    "local_hessian": (WHOLE_EXPERTS,),
    "awq_lite": (WHOLE_EXPERTS, SLICED_EXPERTS),
}
"""Of all ranks, where at first each has all of the model."""
Found = dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def rounded(directory: Path, algorithm: Any, moments: Path, **layout: int) -> Found:
    """Weights, scales of their blocks and amaxes of the wholes, as far as this rank has them; `moments` is written."""
    parallel_state.destroy_model_parallel()
    initialize_parallel(**layout)
    model = build(directory, LayerSpec.TRANSFORMER_ENGINE)
    import_mcore_gpt_from_hf(model, directory)
    config = mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG
    off = {"quantizer_name": "*input_quantizer", "enable": False}
    mtq.quantize(model, {**config, "quant_cfg": [*config["quant_cfg"], off], "algorithm": algorithm}, feed)
    if algorithm == "weighted_mse":
        write_input_moments(model, feed, plan_export(model, directory), moments)
    return {
        identity(weight.key): (weight.weight.detach(), blocks(weight), weight.quantizer.global_amax)
        for linear in targets(model, "any")
        for weight in linear.weights
    }


def blocks(weight: LinearWeight) -> torch.Tensor:
    return weight.quantizer.amax.view(len(weight.weight), -1)


def slice_of(whole: torch.Tensor, part: torch.Tensor, name: str) -> torch.Tensor:
    """What this rank holds: rows of gate and of up, rows, columns, or everything."""
    is_expert = " expert " in name
    rank = (
        parallel_state.get_expert_tensor_parallel_rank()
        if is_expert
        else parallel_state.get_tensor_model_parallel_rank()
    )
    if whole.shape == part.shape:
        return whole
    if whole.shape[0] == part.shape[0]:
        return whole.chunk(2, 1)[rank]
    if "fc1" in name:
        return torch.cat([half.chunk(2)[rank] for half in whole.chunk(2)])
    return whole.chunk(2)[rank]


def require_same_inputs(before: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """The same moments to the last bit, and random sums, of other random numbers, of the same products of channels."""
    assert before.keys() == found.keys()
    for name, values in found.items():
        if name.endswith(".input_moments"):
            assert torch.equal(values, before[name]), name
            continue
        moments = found[name.replace("input_sketch", "input_moments")].double()
        expert = re.search(r"experts\.(\d+)", name)
        assert values.double().square().sum().item() == pytest.approx(moments.sum().item(), rel=0.5), name
        # With few tokens of its own there is little that its channels have in common.
        if expert is None or TOKENS[int(expert[1]) % len(TOKENS)] > 100:
            half = values.shape[1] // 2
            # Of channels that tensor parallel ranks have apart: with random numbers of their own these would be alike
            # by 0.03 at most.
            mine, theirs = (part.double()[:, :half].T @ part.double()[:, half:] for part in (values, before[name]))
            assert torch.cosine_similarity(mine.flatten(), theirs.flatten(), 0) > 0.15, name


def main(directory: Path, scratch: Path) -> None:
    initialize_parallel()
    GroupedLinear.forward = multiply_in_torch
    for algorithm, layouts in LAYOUTS.items():
        reference = rounded(directory, algorithm, scratch / "whole")
        for layout in layouts:
            found = rounded(directory, algorithm, scratch / "parts", **layout)
            assert len(found) == 2 + 2 * 4 // layout.get("ep", 1)
            for name, (*tensors, whole) in found.items():
                *expected, whole_before = reference[name]
                assert torch.equal(whole, whole_before), (layout, name)
                for mine, before in zip(tensors, expected, strict=True):
                    assert torch.equal(mine, slice_of(before, mine, name)), (layout, name)
            if algorithm == "weighted_mse":
                require_same_inputs(load_file(scratch / "whole"), load_file(scratch / "parts"))
            if dist.get_rank() == 0:
                sys.stdout.write(f"{algorithm} {layout} ok\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
