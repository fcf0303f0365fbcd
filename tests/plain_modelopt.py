"""Writes checkpoints of plain ModelOpt, in a process where `quantplug.plugins` was never imported.

    python plain_modelopt.py DIRECTORY

makes DIRECTORY/{name} for every case, and beside each of them DIRECTORY/{name}.pt: amax by its name in the model.
DIRECTORY/refused-{rank}.txt is what two ranks ended with that saved a mixture of experts at TP 2, EP 2, and
DIRECTORY/restored.txt what a restore of Transformer Engine's grouped linear ended with.
Those of ModelOpt 0.47 it writes itself: `dist_checkpointing.save` of the model's `sharded_state_dict`, and
`save_sharded_modelopt_state`. Those of ModelOpt 0.46 are the same but for what 0.46.1 wrote otherwise: one amax [1] for
all experts of a grouped linear layer by the key `...mlp.experts.experts.{linear}.weight_quantizer._amax`, and the
settings of one `weight_quantizer` in every expert's extra state.
"""

import io
import multiprocessing
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensor
from modelopt.torch.opt.plugins import save_sharded_modelopt_state
from torch import nn
from transformer_engine.pytorch import GroupedLinear

from quantplug.megatron import cpu
from quantplug.megatron.checkpoint.files import results_within_process
from quantplug.megatron.parallel import destroy_parallel, initialize_parallel
from tests.plugins.configs import BLOCKWISE, WEIGHT_ONLY_FP8
from tests.plugins.tiny_model import DENSE, grouped_linears, tiny_model

EXPERTS_IN_BLOCKS: dict[str, Any] = {
    **BLOCKWISE,
    "quant_cfg": [*BLOCKWISE["quant_cfg"], {"quantizer_name": "*self_attention*", "enable": False}],
}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nvfp4": (mtq.W4A16_NVFP4_CFG, {}),
    "fp8": (mtq.FP8_DEFAULT_CFG, {}),
    "fp8_blockwise": (BLOCKWISE, {}),
    # Gate and up are two whole blocks each.
    "fp8_blockwise_256": (EXPERTS_IN_BLOCKS, {"moe_ffn_hidden_size": 256}),
    "dense": (WEIGHT_ONLY_FP8, DENSE),
}
DISABLED = 3
"""Local expert whose weight quantizers are disabled, where every expert has its own."""


def quantized(config: dict[str, Any], **settings: Any) -> nn.Module:
    """With amaxes that no calibration gives, another for every quantizer and block."""
    model = mtq.quantize(tiny_model(**settings), config)
    for name, module in model.named_modules():
        if name.endswith("input_quantizer") and module.is_enabled:
            module.amax = torch.tensor(1.0, dtype=torch.bfloat16)
    for number, (name, amax) in enumerate(model.named_buffers()):
        if name.endswith("_amax"):
            amax.add_((number + torch.arange(amax.numel()).view_as(amax)) / 64)
    for linear in grouped_linears(model).values():
        linear.weight_quantizer[DISABLED].disable()
    return model


def amaxes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.named_buffers() if name.endswith("_amax")}


def save(model: nn.Module, state: ShardedStateDict, expected: dict[str, torch.Tensor], directory: Path) -> None:
    torch.save(expected, directory.with_suffix(".pt"))
    directory.mkdir()
    dist_checkpointing.save(state, str(directory))
    save_sharded_modelopt_state([model], str(directory))


def shared_by_experts(model: nn.Module) -> tuple[ShardedStateDict, dict[str, torch.Tensor]]:
    """The state as ModelOpt 0.46 had it, and what every expert's amax must be then: the largest of its layer."""
    state, expected = model.sharded_state_dict(), amaxes(model)
    for linear in grouped_linears(model):
        names = [name for name in expected if name.startswith(f"{linear}.weight_quantizer.")]
        largest = torch.stack([expected[name] for name in names]).max()
        expected |= dict.fromkeys(names, largest)
        experts, name = linear.rsplit(".", 1)
        key = f"{experts}.experts.{name}.weight_quantizer._amax"
        state = {name: entry for name, entry in state.items() if name not in names}
        state[f"{linear}.weight_quantizer._amax"] = ShardedTensor.from_rank_offsets(key, largest.view(1))
        for entry in state.values():
            if isinstance(entry, ShardedObject) and re.search(rf"experts\.\d+\.{name}\._extra_state", entry.key):
                entry.data = with_one_weight_quantizer(entry.data)
    return state, expected


def with_one_weight_quantizer(module_state: torch.Tensor) -> torch.Tensor:
    state = torch.load(io.BytesIO(module_state.numpy().tobytes()))
    of_quantizers = state["modelopt_quantizer_state"]
    experts = {name: of_quantizers.pop(name) for name in list(of_quantizers) if name.startswith("weight_quantizer")}
    of_quantizers["weight_quantizer"] = experts.get("weight_quantizer") or experts["weight_quantizer.0"]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def save_on_two_ranks(directory: Path) -> None:
    """Forked from this process, which by now has imported all and used nothing: gloo does not survive a fork."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=save_on_rank, args=(rank, store.port, directory)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=120)
        assert rank.exitcode == 0, rank


def save_on_rank(rank: int, port: int, directory: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    store = dist.TCPStore("localhost", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    initialize_parallel(tp=2, ep=2)
    model = mtq.quantize(tiny_model(), mtq.W4A16_NVFP4_CFG)
    (directory / "refused").mkdir(exist_ok=True)
    try:
        with cpu.checkpointing(), results_within_process():
            dist_checkpointing.save(model.sharded_state_dict(), str(directory / "refused"))
    except (CheckpointingException, RuntimeError):
        ended = traceback.format_exc()
    else:
        ended = "saved"
    (directory / f"refused-{rank}.txt").write_text(ended)
    os._exit(0)  # The other rank may wait for this one, in a collective that only Megatron's first rank has left.


def restore_experts() -> None:
    """As ModelOpt says: its state first, then the tensors."""

    def experts() -> nn.Module:
        with cpu.construction():
            return nn.Sequential(GroupedLinear(4, 160, 192, bias=False, device="cpu"))

    saved = experts()
    mtq.quantize(saved, mtq.W4A16_NVFP4_CFG)
    restored = mto.restore_from_modelopt_state(experts(), mto.modelopt_state(saved))
    restored.load_state_dict(saved.state_dict(), strict=True)


def note_restore(file: Path) -> None:
    try:
        restore_experts()
    except RuntimeError as error:
        file.write_text(str(error))
    else:
        file.write_text("restored")


def main(directory: Path) -> None:
    save_on_two_ranks(directory)
    note_restore(directory / "restored.txt")
    initialize_parallel()
    with cpu.checkpointing(), results_within_process():
        for name, (config, settings) in CASES.items():
            model = quantized(config, **settings)
            save(model, model.sharded_state_dict(), amaxes(model), directory / f"047_{name}")
            if name in ("nvfp4", "fp8"):
                save(model, *shared_by_experts(model), directory / f"046_{name}")
        model = mtq.quantize(tiny_model(), mtq.W4A16_NVFP4_CFG)
        state, expected = shared_by_experts(model)
        with torch.no_grad():
            model.decoder.layers[1].mlp.experts.linear_fc2.weight5[7, 11] = 0.75
        save(model, state, expected, directory / "046_of_other_experts")
        lost = "decoder.layers.1.mlp.experts.linear_fc2.weight_quantizer._amax"
        save(model, {name: entry for name, entry in state.items() if name != lost}, expected, directory / "046_lost")
        state, expected = model.sharded_state_dict(), amaxes(model)
        lost = "decoder.layers.1.mlp.experts.linear_fc2.weight_quantizer.5._amax"
        save(model, {name: entry for name, entry in state.items() if name != lost}, expected, directory / "047_lost")
    assert "quantplug.plugins" not in sys.modules
    destroy_parallel()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
