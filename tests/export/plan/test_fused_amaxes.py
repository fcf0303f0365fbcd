"""Weights that servers fuse into one linear share one amax: the down projections of multi-latent attention."""

import math
from dataclasses import replace

import pytest
import torch

from quantplug.errors import UnsupportedQuantizationError
from quantplug.export.plan.match import Mapped
from quantplug.export.plan.quantizers.fused_linears import group_names, with_shared_amaxes
from quantplug.export.plan.types import QuantizerState, WholeWeight
from quantplug.findings import Findings
from quantplug.mappings.families import find_family
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import LatentSizes, ModelDimensions, Option

FAMILY = find_family("DeepseekV3ForCausalLM")
DIMS = ModelDimensions(
    num_layers=3,
    hidden_size=160,
    num_attention_heads=4,
    num_query_groups=4,
    head_dim=64,
    vocab_size=523,
    num_experts=8,
    moe_layers=(1, 2),
    mtp_layers=1,
    latent=LatentSizes(96, 64, 16, 24),
    options=frozenset({Option.QUERY_LATENT}),
)
QUERY = "decoder.layers.*.self_attention.linear_q_down_proj.weight"
KEY_VALUE = "decoder.layers.*.self_attention.linear_kv_down_proj.weight"
OUTPUT = "decoder.layers.*.self_attention.linear_proj.weight"
MTP_QUERY = "mtp.layers.*.transformer_layer.self_attention.linear_q_down_proj.weight"
MTP_KEY_VALUE = "mtp.layers.*.transformer_layer.self_attention.linear_kv_down_proj.weight"


def fp8(amax: float | None) -> QuantizerState:
    return QuantizerState("", (4, 3), amax=amax)


def mapped(*weights: tuple[str, int, QuantizerState | None, QuantizerState | None]) -> Mapped:
    """Weights by Megatron's pattern, layer, weight quantizer and input quantizer, each with its row."""
    table = FAMILY.by_megatron()
    return [
        (
            WholeWeight(ParamKey(module, layer), (96, 160), torch.bfloat16, weight=weight, activation=inputs),
            table[module],
        )
        for module, layer, weight, inputs in weights
    ]


def groups(weights: Mapped) -> dict[ParamKey, str]:
    """Of weights that are written by their own rows."""
    return group_names(weights, {weight.key: row for weight, row in weights}, DIMS)


def shared(weights: Mapped) -> list[tuple[float | None, float | None]]:
    """(weight amax, input amax) of each weight once groups share theirs; raises what is found."""
    findings = Findings()
    result = with_shared_amaxes(weights, groups(weights), findings)
    findings.raise_if_any()
    return [
        (whole.weight.amax if whole.weight else None, whole.activation.amax if whole.activation else None)
        for whole, _ in result
    ]


def test_a_group_is_that_of_one_layer_counted_as_hugging_face_does():
    weights = mapped(
        *((module, 0, None, None) for module in (QUERY, KEY_VALUE, OUTPUT, MTP_QUERY, MTP_KEY_VALUE)),
        (QUERY, 2, None, None),
    )
    assert groups(weights) == {
        ParamKey(QUERY, 0): "model.layers.0.self_attn.fused_qkv_a_proj",
        ParamKey(KEY_VALUE, 0): "model.layers.0.self_attn.fused_qkv_a_proj",
        ParamKey(MTP_QUERY, 0): "model.layers.3.self_attn.fused_qkv_a_proj",
        ParamKey(MTP_KEY_VALUE, 0): "model.layers.3.self_attn.fused_qkv_a_proj",
        ParamKey(QUERY, 2): "model.layers.2.self_attn.fused_qkv_a_proj",
    }


def test_the_largest_amax_is_that_of_all_for_weights_and_for_inputs():
    weights = mapped(
        (QUERY, 0, fp8(0.5), fp8(9.0)),
        (KEY_VALUE, 0, fp8(2.0), fp8(3.0)),
        (OUTPUT, 0, fp8(7.0), fp8(70.0)),
        (QUERY, 1, fp8(0.25), fp8(1.0)),
        (KEY_VALUE, 1, fp8(0.125), fp8(4.0)),
    )
    assert shared(weights) == [(2.0, 9.0), (2.0, 9.0), (7.0, 70.0), (0.25, 4.0), (0.25, 4.0)]


def test_weights_without_quantizers_stay_so():
    assert shared(mapped((QUERY, 0, None, None), (KEY_VALUE, 0, None, None))) == [(None, None)] * 2


@pytest.mark.parametrize("unusable", [None, math.inf, -1.0])
def test_what_cannot_be_used_is_not_hidden_by_the_rest_of_the_group(unusable):
    """The check of the calibration must see it."""
    assert shared(mapped((QUERY, 0, fp8(unusable), None), (KEY_VALUE, 0, fp8(2.0), None))) == [
        (unusable, None),
        (2.0, None),
    ]


def test_a_nan_stays_a_nan():
    (first, _), (second, _) = shared(mapped((QUERY, 0, fp8(math.nan), None), (KEY_VALUE, 0, fp8(2.0), None)))
    assert math.isnan(first)
    assert second == 2.0


def test_a_group_quantized_in_part_is_refused_by_name():
    weights = mapped((QUERY, 0, fp8(0.5), None), (KEY_VALUE, 0, None, None), (QUERY, 1, None, None))
    with pytest.raises(UnsupportedQuantizationError) as caught:
        shared(weights)
    (offender,) = caught.value.offenders
    assert offender.parameter == "decoder.layers.0.self_attention.linear_kv_down_proj.weight"
    assert "fused_qkv_a_proj" in offender.reason


def test_other_settings_of_a_quantizer_are_its_own():
    weights = mapped((QUERY, 0, replace(fp8(0.5), name="q"), None), (KEY_VALUE, 0, replace(fp8(2.0), name="kv"), None))
    result = with_shared_amaxes(weights, groups(weights), Findings())
    assert [whole.weight.name for whole, _ in result] == ["q", "kv"]
