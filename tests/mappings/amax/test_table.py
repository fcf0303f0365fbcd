"""From weight rows to amax rows: every name is ModelOpt's, and no row is lost."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from quantplug.errors import ArgumentError
from quantplug.mappings.amax import (
    AmaxFanoutMapping,
    AmaxMapping,
    FusedAmax,
    MoeAmaxFanoutMapping,
    convert_to_amax_map,
    convert_to_kv_amax_map,
)
from quantplug.mappings.families import FAMILIES
from quantplug.mappings.families.qwen3_moe import QWEN3_MOE
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import GATED, IDENTITY, Layout, ModelDimensions
from quantplug.mappings.rows import LayerStack, Role, Scope

DIMS = ModelDimensions(2, 160, 4, 2, 48, 523, num_experts=4, moe_layers=(0, 1), mtp_layers=1)
EXPERTS = "decoder.layers.*.mlp.experts"


@dataclass(frozen=True)
class Row:
    """A weight mapping that is none of ours: what the protocol asks for, and no more."""

    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    scope: Scope = Scope.LAYER
    layout: Layout = IDENTITY
    role: Role = Role.LINEAR
    block: LayerStack = LayerStack.DECODER


FUSED_FC1 = Row((f"{EXPERTS}.linear_fc1.weight*",), ("model.layers.*.mlp.experts.gate_up_proj",), Scope.EXPERT)


def patterns(mapped_name: str) -> dict[tuple[str, ...], tuple[str, ...]]:
    return {row.megatron: row.hf for row in convert_to_amax_map(QWEN3_MOE.mappings, mapped_name).mappings}


def test_weight_quantizers_have_modelopts_names() -> None:
    attention, mlp = "decoder.layers.*.self_attention", "model.layers.*.mlp"
    assert patterns(".weight_quantizer._amax") == {
        (f"{attention}.linear_qkv.weight_quantizer._amax",): tuple(
            f"model.layers.*.self_attn.{part}_proj.weight_quantizer._amax" for part in "qkv"
        ),
        (f"{attention}.linear_proj.weight_quantizer._amax",): (
            "model.layers.*.self_attn.o_proj.weight_quantizer._amax",
        ),
        ("decoder.layers.*.mlp.linear_fc1.weight_quantizer._amax",): (
            f"{mlp}.gate_proj.weight_quantizer._amax",
            f"{mlp}.up_proj.weight_quantizer._amax",
        ),
        ("decoder.layers.*.mlp.linear_fc2.weight_quantizer._amax",): (f"{mlp}.down_proj.weight_quantizer._amax",),
        (
            f"{EXPERTS}.linear_fc1.weight_quantizer.*._amax",
            f"{EXPERTS}.local_experts.*.linear_fc1.weight_quantizer._amax",
        ): (
            f"{mlp}.experts.*.gate_proj.weight_quantizer._amax",
            f"{mlp}.experts.*.up_proj.weight_quantizer._amax",
        ),
        (
            f"{EXPERTS}.linear_fc2.weight_quantizer.*._amax",
            f"{EXPERTS}.local_experts.*.linear_fc2.weight_quantizer._amax",
        ): (f"{mlp}.experts.*.down_proj.weight_quantizer._amax",),
    }


def test_kinds_follow_what_a_quantizer_stands_for() -> None:
    kinds = [type(row) for row in convert_to_amax_map(QWEN3_MOE.mappings).mappings]
    dense = [AmaxFanoutMapping, AmaxMapping]
    assert kinds == [*dense, *dense, MoeAmaxFanoutMapping, MoeAmaxFanoutMapping]


def test_input_quantizers_of_grouped_experts_are_shared() -> None:
    rows = convert_to_amax_map(QWEN3_MOE.mappings, ".input_quantizer._amax").mappings
    shared = [name for row in rows if isinstance(row, MoeAmaxFanoutMapping) for name in row.shared]
    assert shared == [f"{EXPERTS}.linear_fc1.input_quantizer._amax", f"{EXPERTS}.linear_fc2.input_quantizer._amax"]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("mapped_name", [".weight_quantizer._amax", ".input_quantizer._amax"])
def test_every_row_is_mapped_or_reported_with_its_reason(family, mapped_name: str) -> None:
    found = convert_to_amax_map(family.mappings, mapped_name)
    linear = [row for row in family.mappings if row.role is Role.LINEAR]
    assert len(found.mappings) == len(linear)
    assert [entry.mapping for entry in found.unmapped] == [row for row in family.mappings if row not in linear]
    assert all(entry.reason == entry.mapping.role.value for entry in found.unmapped)


def test_roles_choose_what_has_quantizers() -> None:
    found = convert_to_amax_map(QWEN3_MOE.mappings, roles={Role.OUTPUT_LAYER, Role.EMBEDDING})
    assert ("lm_head.weight_quantizer._amax",) in [row.hf for row in found.mappings]


def test_a_weight_that_no_module_holds_as_its_weight_is_reported_with_the_name() -> None:
    megatron = Row(("decoder.layers.*.mixer.A_log",), ("model.layers.*.mixer.a.weight",))
    hf = Row(("decoder.layers.*.mixer.in.weight",), ("model.layers.*.mixer.w1",))
    found = convert_to_amax_map([megatron, hf])
    assert found.mappings == ()
    assert [entry.reason for entry in found.unmapped] == [
        "no module holds it as its weight: decoder.layers.*.mixer.A_log",
        "no module holds it as its weight: model.layers.*.mixer.w1",
    ]


@pytest.mark.parametrize(
    ("fused", "name"),
    [
        (FusedAmax.PER_EXPERT, "model.layers.1.mlp.experts.gate_up_proj_weight_quantizers.3._amax"),
        (FusedAmax.STACKED, "model.layers.1.mlp.experts.gate_up_proj_weight_quantizer._amax"),
        (FusedAmax.SHARED, "model.layers.1.mlp.experts.gate_up_proj_weight_quantizer._amax"),
    ],
)
def test_fused_experts_have_modelopts_names(fused: FusedAmax, name: str) -> None:
    (row,) = convert_to_amax_map([FUSED_FC1], fused=fused).mappings
    assert row.hf_names(ParamKey(row.megatron[0], 1, 3), DIMS) == (name,)


def test_the_input_of_fused_experts_is_one() -> None:
    (row,) = convert_to_amax_map([FUSED_FC1], ".input_quantizer._amax").mappings
    assert row.hf == ("model.layers.*.mlp.experts.gate_up_proj_input_quantizer._amax",)


def test_fused_experts_that_are_a_module_of_their_own_number_its_quantizers() -> None:
    row = Row(
        (f"{EXPERTS}.linear_fc1.weight*",),
        ("model.layers.*.moe.gate_proj.weight", "model.layers.*.moe.up_proj.weight"),
        Scope.EXPERT,
        GATED,
    )
    (found,) = convert_to_amax_map([row]).mappings
    assert found.hf == (
        "model.layers.*.moe.gate_proj.weight_quantizer.*._amax",
        "model.layers.*.moe.up_proj.weight_quantizer.*._amax",
    )


def test_layers_of_multi_token_prediction_are_counted_on_after_the_decoder() -> None:
    row = Row(
        ("mtp.layers.*.transformer_layer.mlp.linear_fc2.weight",),
        ("model.layers.*.mlp.down_proj.weight",),
        block=LayerStack.MTP,
    )
    (found,) = convert_to_amax_map([row]).mappings
    amaxes = found.to_hf(ParamKey(found.megatron[0], 0), torch.tensor(3.0), DIMS)
    assert amaxes == {"model.layers.2.mlp.down_proj.weight_quantizer._amax": torch.tensor(3.0)}


def test_kv_quantizers_stand_in_the_attention() -> None:
    found = convert_to_kv_amax_map(QWEN3_MOE.mappings)
    assert [(row.megatron, row.hf) for row in found.mappings] == [
        (
            (f"decoder.layers.*.self_attention.core_attention.{side}_bmm_quantizer._amax",),
            (f"model.layers.*.self_attn.{side}_bmm_quantizer._amax",),
        )
        for side in "kv"
    ]
    assert len(found.unmapped) == len(QWEN3_MOE.mappings) - 1


@pytest.mark.parametrize("mapped_name", ["weight_quantizer._amax", ".weight_quantizer", ".weight", "._amax"])
def test_a_name_of_no_linears_amax_is_refused(mapped_name: str) -> None:
    with pytest.raises(ArgumentError, match="mapped_name"):
        convert_to_amax_map(QWEN3_MOE.mappings, mapped_name)


def test_the_documented_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    example = (Path(__file__).parents[3] / "docs" / "amax.md").read_text().split("```")[1].removeprefix("python\n")
    exec(example, {})
    printed = capsys.readouterr().out.splitlines()
    said = re.findall(r"^print\(.*#\s(.*)$", example, flags=re.MULTILINE)
    assert said == ["tensor(3.)", "True"]
    assert printed[-2:] == said
    assert "decoder.layers.*.mlp.router.weight - router, kept in high precision: servers load it so" in printed
