"""Blocks must end where servers merge linears: vLLM's `validate_fp8_block_shape`, and `Fp8MoEMethod` for experts."""

import re

import pytest
import torch

from quantplug.errors import ShapeError
from quantplug.export.plan.build import ExportRequest, build_plan
from quantplug.export.plan.types import QuantizerState, WholeWeight
from quantplug.mappings.layouts import COLUMN, GATED, QKV, ROW, Layout, ModelDimensions
from quantplug.mappings.rows import Role, Scope, WeightMapping
from quantplug.mappings.segments import SegmentedAlike
from quantplug.mappings.table import Family, MegatronConfig

FP8_BLOCK = QuantizerState("", (4, 3), ((-2, 128), (-1, 128)), amax=0.5)
FP8 = QuantizerState("", (4, 3), amax=0.5)
GROUP = "model.fused_a_proj"


def row(name: str, parts: tuple[str, ...], layout: Layout = COLUMN, **more: object) -> WeightMapping:
    return WeightMapping(
        (name,), tuple(f"model.{part}.weight" for part in parts), Scope.MODEL, layout, Role.LINEAR, **more
    )


ROWS = {
    "alone": row("alone", ("o_proj",)),
    "qkv": row("qkv", ("q_proj", "k_proj", "v_proj"), QKV),
    "gate_up": row("gate_up", ("gate_proj", "up_proj"), GATED),
    "first": row("first", ("q_a_proj",), scale_group=GROUP),
    "last": row("last", ("kv_a_proj",), scale_group=GROUP),
    # As Mamba's: one tensor, which servers take for three linears.
    "segments": row("segments", ("in_proj",), SegmentedAlike(lambda dims: (2 * dims.head_dim, dims.head_dim, 4))),
}
EXPERTS = {
    "fc1": WeightMapping(
        ("layers.*.fc1.weight*",),
        ("model.layers.*.experts.*.gate.weight", "model.layers.*.experts.*.up.weight"),
        Scope.EXPERT,
        GATED,
        Role.LINEAR,
    ),
    "fc2": WeightMapping(
        ("layers.*.fc2.weight*",), ("model.layers.*.experts.*.down.weight",), Scope.EXPERT, ROW, Role.LINEAR
    ),
}


def plan(shapes: dict[str, tuple[int, int]], quantizer: QuantizerState = FP8_BLOCK, experts: int = 0, **sizes: int):
    rows = tuple({**ROWS, **EXPERTS}[name] for name in shapes)
    dims = ModelDimensions(1, 256, 4, 2, sizes.get("head_dim", 128), 0, experts, (0,) if experts else ())
    family = Family("one", ("One",), rows, lambda config: dims, lambda config: MegatronConfig({}, {}))
    weights = [
        WholeWeight(key, shape, torch.bfloat16, weight=quantizer, activation=FP8 if quantizer is FP8 else None)
        for mapping, shape in zip(rows, shapes.values(), strict=True)
        for key in mapping.keys(dims)
    ]
    return build_plan(weights, family, dims, ExportRequest())


@pytest.mark.parametrize(
    ("shapes", "sizes"),
    [
        ({"alone": (7, 300)}, {}),
        ({"gate_up": (512, 300)}, {}),
        ({"qkv": (8 * 128, 300)}, {}),
        ({"qkv": (8 * 64, 300)}, {"head_dim": 64}),  # q has 256 rows, k and v have 128 each.
        ({"first": (128, 300), "last": (192, 300)}, {}),
        ({"fc1": (256, 300), "fc2": (300, 128)}, {"experts": 2}),
        ({"segments": (3 * 128 + 4, 300)}, {}),
    ],
)
def test_a_partial_block_in_the_last_part_or_alone_is_written(
    shapes: dict[str, tuple[int, int]], sizes: dict[str, int]
) -> None:
    assert plan(shapes, **sizes).tasks


@pytest.mark.parametrize(
    ("shapes", "sizes", "named", "reason"),
    [
        ({"gate_up": (384, 256)}, {}, ["gate_up"], "192 of gate_proj end inside a block of 128 rows"),
        ({"qkv": (8 * 48, 256)}, {"head_dim": 48}, ["qkv"], "192 of q_proj"),
        ({"qkv": (8 * 32, 256)}, {"head_dim": 32}, ["qkv"], "64 of k_proj"),
        ({"first": (64, 256), "last": (128, 256)}, {}, ["first", "last"], "64 of q_a_proj end inside"),
        # 196 rows would be a block and a partial last one, were they of one linear.
        ({"segments": (3 * 64 + 4, 256)}, {"head_dim": 64}, ["segments"], "64 of in_proj end inside"),
        ({"fc1": (2 * 96, 256), "fc2": (256, 96)}, {"experts": 1}, ["layers.0.fc1", "layers.0.fc2"], "width 96"),
    ],
)
def test_a_block_that_a_merged_linear_would_cut_is_refused_with_all_that_are_merged(
    shapes: dict[str, tuple[int, int]], sizes: dict[str, int], named: list[str], reason: str
) -> None:
    with pytest.raises(ShapeError, match=re.escape(reason)) as caught:
        plan(shapes, **sizes)
    offenders = [offender.parameter.partition(".weight")[0] for offender in caught.value.offenders]
    assert offenders == named
    assert plan(shapes, quantizer=FP8, **sizes).tasks  # One scale a tensor has no blocks.
