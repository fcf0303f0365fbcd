"""Tables fitted to a checkpoint: the form of its experts, by names and shapes, and a row for each tensor it carries."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch

from quantplug.mappings.experts import FusedExpertMapping
from quantplug.mappings.families.qwen3_moe import QWEN3_MOE
from quantplug.mappings.families.qwen3_vl import QWEN3_VL_MOE
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.rows import Role
from quantplug.mappings.source_fit import fitted

EXPERTS = "model.language_model.layers.{}.mlp.experts"


@dataclass(frozen=True)
class Header:
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16


def dims(hidden: int, width: int) -> ModelDimensions:
    return ModelDimensions(
        num_layers=2,
        hidden_size=hidden,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=48,
        vocab_size=523,
        num_experts=3,
        moe_layers=(0, 1),
        expert_width=width,
    )


def experts(hidden: int, width: int, *, transposed: bool) -> dict[str, Header]:
    gate_up, down = (hidden, 2 * width), (width, hidden)
    if not transposed:
        gate_up, down = gate_up[::-1], down[::-1]
    stored = {}
    for layer in (0, 1):
        stored[f"{EXPERTS.format(layer)}.gate_up_proj"] = Header((3, *gate_up))
        stored[f"{EXPERTS.format(layer)}.down_proj"] = Header((3, *down))
    return stored


def are_transposed(stored: Mapping[str, Header], sizes: ModelDimensions) -> set[bool]:
    rows = fitted(QWEN3_VL_MOE, stored, sizes).mappings
    return {row.transposed for row in rows if isinstance(row, FusedExpertMapping)}


# With one of the two linears square, the other one still tells.
@pytest.mark.parametrize(("hidden", "width"), [(160, 96), (192, 96), (96, 96), (1, 1)])
@pytest.mark.parametrize("transposed", [True, False])
def test_shapes_of_both_linears_tell_how_experts_are_stored(hidden: int, width: int, transposed: bool) -> None:
    stored = experts(hidden, width, transposed=transposed)
    assert are_transposed(stored, dims(hidden, width)) == {transposed}


def test_without_weights_experts_are_as_published() -> None:
    assert are_transposed({}, dims(160, 96)) == {True}


def test_one_layer_in_another_form_is_no_form() -> None:
    """The rows stay those of the table, so that what does not fit is named by them."""
    stored = experts(160, 96, transposed=False)
    stored[f"{EXPERTS.format(1)}.down_proj"] = Header((3, 96, 160))
    assert are_transposed(stored, dims(160, 96)) == {True}


def test_what_is_carried_has_a_row_in_its_own_type() -> None:
    stored = {
        "model.visual.proj.weight": Header((4, 8), torch.float32),
        "model.visual.patch.weight": Header((4, 3, 2, 2, 2)),
        "model.visual.norm.weight": Header((4,)),
        "model.visual.proj.bias": Header((4,)),
        "model.visual.scale": Header((), torch.int64),
        "model.visualizer.weight": Header((4, 8)),
        "model.other.weight": Header((4, 8)),
    }
    known = {row.hf for row in QWEN3_VL_MOE.mappings}
    rows = {row.hf[0]: row for row in fitted(QWEN3_VL_MOE, stored, dims(160, 96)).mappings if row.hf not in known}
    assert {name: (row.role, row.dtype) for name, row in rows.items()} == {
        "model.visual.proj.weight": (Role.PASSTHROUGH_WEIGHT, torch.float32),
        "model.visual.patch.weight": (Role.PASSTHROUGH_WEIGHT, torch.bfloat16),
        "model.visual.norm.weight": (Role.PASSTHROUGH, torch.bfloat16),
        "model.visual.proj.bias": (Role.PASSTHROUGH, torch.bfloat16),
        "model.visual.scale": (Role.PASSTHROUGH, torch.int64),
    }


def test_a_family_that_carries_nothing_stays_as_it_is() -> None:
    assert fitted(QWEN3_MOE, {"model.visual.proj.weight": Header((4, 8))}, dims(160, 96)) == QWEN3_MOE


def test_what_the_table_expects_is_not_carried() -> None:
    """Multi-token prediction that a config does not declare is carried, one that it declares is converted."""
    carrying = replace(QWEN3_MOE, passthrough=("model.embed_tokens.", "mtp."))
    stored = {"model.embed_tokens.weight": Header((523, 160)), "mtp.fc.weight": Header((160, 320))}
    carried = [row.hf[0] for row in fitted(carrying, stored, dims(160, 96)).mappings if row.role.is_passthrough]
    assert carried == ["mtp.fc.weight"]
