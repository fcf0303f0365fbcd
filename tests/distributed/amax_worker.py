"""Takes the amaxes of quantized models to Hugging Face names and back, on 2 ranks, for test_amax_ranks.py."""

import copy
import json
import sys
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from modelopt.torch.quantization.nn import TensorQuantizer

import quantplug.plugins  # noqa: F401
from quantplug.calibration.run import calibrate
from quantplug.mappings.amax import (
    AmaxMapping,
    AmaxPlacement,
    amaxes_to_hf,
    amaxes_to_megatron,
    convert_to_amax_map,
    convert_to_kv_amax_map,
    merge_amaxes,
    read_amaxes,
    write_amaxes,
)
from quantplug.mappings.families.qwen3_moe import QWEN3_MOE
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import Scope
from quantplug.megatron.parallel import initialize_parallel
from quantplug.megatron.parameters import iter_parameters
from tests.distributed.calibration_data_worker import placed, run
from tests.plugins.tiny_model import EXPERTS, HIDDEN, tiny_model

KV_CACHE = {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": (4, 3)}, "enable": True}
WITH_KV_CACHE: dict[str, Any] = {
    **mtq.NVFP4_DEFAULT_CFG,
    "quant_cfg": [*copy.deepcopy(mtq.NVFP4_DEFAULT_CFG["quant_cfg"]), KV_CACHE],
}
TINY = ModelDimensions(2, HIDDEN, 4, 2, 48, 384, num_experts=EXPERTS, moe_layers=(0, 1))
LINEARS = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
LINEARS |= {f"mlp.experts.{e}.{part}_proj" for e in range(EXPERTS) for part in ("gate", "up", "down")}


def mappings() -> tuple[AmaxMapping, ...]:
    maps = [convert_to_amax_map(QWEN3_MOE.mappings, f".{kind}_quantizer._amax") for kind in ("weight", "input")]
    return tuple(row for found in (*maps, convert_to_kv_amax_map(QWEN3_MOE.mappings)) for row in found.mappings)


def placement(model: GPTModel) -> AmaxPlacement:
    layers = model.decoder.layers
    return AmaxPlacement(
        [layer.layer_number - 1 for layer in layers], layers[0].mlp.local_expert_indices, dist.get_rank()
    )


def enabled(model: GPTModel) -> dict[str, TensorQuantizer]:
    modules = model.named_modules()
    return {f"{name}._amax": leaf for name, leaf in modules if isinstance(leaf, TensorQuantizer) and leaf.is_enabled}


def state(model: GPTModel) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("._amax")}


def grouped() -> GPTModel:
    """Weights calibrated for real; TE's forward needs a GPU, so what data would give is a number of each name's own."""
    torch.manual_seed(dist.get_rank())
    model = mtq.quantize(tiny_model(), WITH_KV_CACHE)
    first = model.decoder.layers[0].layer_number
    for name, leaf in enabled(model).items():
        if leaf.amax is None:
            leaf.amax = torch.tensor(zlib.crc32(f"{first} {name}".encode()) / 2**32, dtype=torch.bfloat16)
    return model


def one_by_one(directory: Path) -> GPTModel:
    """Experts one after another, all amaxes by a forward."""
    model = placed(directory)
    calibrate(model, run)
    return model


def gathered(mine: Mapping[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return merge_amaxes(ranks)


def there_and_back(model: GPTModel, fresh: GPTModel, dims: ModelDimensions) -> dict[str, torch.Tensor]:
    rows, place, original = mappings(), placement(model), state(model)
    assert original.keys() == enabled(model).keys()
    named = amaxes_to_hf(rows, gathered(read_amaxes(rows, original, dims, place)), dims)

    quantizers = enabled(fresh)
    assert state(fresh) == {}
    back = write_amaxes(rows, amaxes_to_megatron(rows, named, dims), quantizers, dims, place)
    for name, leaf in quantizers.items():
        leaf.amax = back[name]

    restored = state(fresh)
    assert restored.keys() == original.keys()
    for name, amax in original.items():
        assert restored[name].dtype == amax.dtype
        assert restored[name].shape == amax.shape
        assert torch.equal(restored[name], amax), name
    return named


def check_experts(model: GPTModel, named: Mapping[str, torch.Tensor], dims: ModelDimensions) -> None:
    """Every expert's amax is max|W| of the weight that the walk over the modules says is that expert's."""
    rows, seen = QWEN3_MOE.by_megatron(), 0
    for parameter in iter_parameters(model):
        row = rows.get(parameter.key.module)
        if row is not None and row.scope is Scope.EXPERT:
            for name in row.hf_names(parameter.key, dims):
                amax = named[f"{name.removesuffix('.weight')}.weight_quantizer._amax"]
                assert torch.equal(amax, parameter.tensor.abs().max()), name
                seen += 1
    assert seen == len(model.decoder.layers) * 3 * len(model.decoder.layers[0].mlp.local_expert_indices)


def check_names(named: Mapping[str, torch.Tensor], *, kv_cache: bool) -> None:
    quantizers = {f"{linear}.{kind}_quantizer" for linear in LINEARS for kind in ("weight", "input")}
    quantizers |= {f"self_attn.{side}_bmm_quantizer" for side in "kv"} if kv_cache else set()
    assert named.keys() == {f"model.layers.{layer}.{name}._amax" for layer in range(2) for name in quantizers}


def at(
    layout: dict[str, int], make: Callable[[], GPTModel], empty: Callable[[], GPTModel], dims: ModelDimensions
) -> None:
    parallel_state.destroy_model_parallel()
    initialize_parallel(**layout)
    model = make()
    named = there_and_back(model, empty(), dims)
    check_names(named, kv_cache=dims is TINY)
    if "tp" not in layout:
        check_experts(model, named, dims)
    if dist.get_rank() == 0:
        sys.stdout.write(f"{layout} ok\n")


if __name__ == "__main__":
    initialize_parallel()
    directory = Path(sys.argv[1])
    for layout in ({"ep": 2}, {"pp": 2}, {"tp": 2, "etp": 2}):
        at(layout, grouped, lambda: mtq.quantize(tiny_model(), {**WITH_KV_CACHE, "algorithm": None}), TINY)
    dims = QWEN3_MOE.dimensions(json.loads((directory / "config.json").read_text()))
    at({"ep": 2}, partial(one_by_one, directory), partial(placed, directory), dims)
    dist.destroy_process_group()
