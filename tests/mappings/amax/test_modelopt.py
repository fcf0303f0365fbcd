"""The names are those that ModelOpt gives the quantizers of transformers' own models."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from transformers import AutoModelForCausalLM

from quantplug.mappings.amax import amaxes_to_hf, amaxes_to_megatron, convert_to_amax_map, convert_to_kv_amax_map
from quantplug.mappings.experts import grouped_mlp
from quantplug.mappings.families import find_family
from quantplug.mappings.layouts import IDENTITY
from quantplug.mappings.rows import Scope, WeightMapping

KV_CACHE = {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": (4, 3)}, "enable": True}
FP8_AND_KV_CACHE: dict[str, Any] = {
    **mtq.FP8_DEFAULT_CFG,
    "quant_cfg": [*copy.deepcopy(mtq.FP8_DEFAULT_CFG["quant_cfg"]), KV_CACHE],
}
# As transformers 5 holds them in memory.
FUSED = tuple(
    grouped_mlp(linear, (f"model.layers.*.mlp.experts.{name}",), IDENTITY)
    for linear, name in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj"))
)


def quantized_by_modelopt(directory: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.arange(4 * 40).view(4, 40) * 7 % 500
    mtq.quantize(model, FP8_AND_KV_CACHE, lambda model: model(tokens))
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("._amax")}


def fused_in_megatron(name: str) -> str:
    """What q, k and v have in common, and gate and up: one linear of Megatron's."""
    return re.sub(r"\b(gate|up)_proj\b", "linear_fc1", re.sub(r"\b[qkv]_proj\b", "linear_qkv", name))


# Of two layers: seven linears, or four and two weights of each expert with two inputs for all; keys and values.
@pytest.mark.parametrize(
    ("fixture", "count"), [("tiny_qwen3_dir", 2 * (2 * 7 + 2)), ("tiny_qwen3_moe_dir", 2 * (2 * 4 + 2 * 8 + 2 + 2))]
)
def test_every_amax_of_transformers_model_is_known_and_named_alike(
    fixture: str, count: int, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(fixture)
    config = json.loads((directory / "config.json").read_text())
    family = find_family(config["architectures"][0])
    dims = family.dimensions(config)
    weights: list[WeightMapping] = [row for row in family.mappings if row.scope is not Scope.EXPERT]
    weights += FUSED if dims.num_experts else ()
    linears = [convert_to_amax_map(weights, f".{kind}_quantizer._amax") for kind in ("weight", "input")]
    rows = [row for found in (*linears, convert_to_kv_amax_map(weights)) for row in found.mappings]

    amaxes = quantized_by_modelopt(directory)
    named = amaxes_to_hf(rows, amaxes_to_megatron(rows, amaxes, dims), dims)

    assert named.keys() == amaxes.keys()
    assert len(named) == count
    for name, amax in named.items():
        together = [amaxes[other] for other in amaxes if fused_in_megatron(other) == fused_in_megatron(name)]
        assert torch.equal(amax, torch.stack(together).max()), name
