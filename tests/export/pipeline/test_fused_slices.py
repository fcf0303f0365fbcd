"""All experts of a layer in one tensor: every expert's slice in its place, cut over ranks or not, in every format.

The oracle writes the Hugging Face tensor out by hand and packs each expert's matrix [out, in] as a whole.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplug.errors import MappingError, UnsupportedQuantizationError
from quantplug.export.pipeline.assemble import assemble_piece
from quantplug.export.plan.build import ExportRequest, build_plan
from quantplug.export.plan.pieces import cut
from quantplug.export.plan.types import ExportPlan, QuantizerState, WholeWeight
from quantplug.mappings.experts import FusedExpertMapping, FusedGatedExpertMapping, spellings
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import COLUMN, GATED_INTERLEAVED, GATED_JOINED, ROW, ModelDimensions
from quantplug.mappings.rows import Role, Scope
from quantplug.mappings.table import Family, MegatronConfig
from quantplug.topology import ShardAxis
from tests.export.checkpoints import same_bytes
from tests.export.pieces import pack_piece
from tests.export.pipeline.test_slices import FORMATS, INPUTS, STATES

EXPERTS = 3
DIMS = ModelDimensions(1, 256, 4, 2, 48, 523, num_experts=EXPERTS, moe_layers=(0,))
LAYOUTS = {"column": COLUMN, "row": ROW, "joined": GATED_JOINED, "interleaved": GATED_INTERLEAVED}
NAME = "model.layers.0.mlp.experts.fused"


def input_state(state: QuantizerState | None) -> QuantizerState | None:
    """Experts are loaded in FP8 with quantized inputs alone."""
    if state is None or state.block_sizes:
        return None
    # Scales of rows go with scales of tokens, which the server makes.
    return INPUTS["fp8_row"] if state.axis == STATES["fp8_row"].axis else replace(state, amax=1.0)


def plan_of(
    layout: str, transposed: bool, shape: tuple[int, ...], ranks: int, states: Sequence[QuantizerState | None]
) -> ExportPlan:
    kind = FusedGatedExpertMapping if layout in ("joined", "interleaved") else FusedExpertMapping
    row = kind(
        spellings("linear_fc1", "weight"),
        ("model.layers.*.mlp.experts.fused",),
        Scope.EXPERT,
        LAYOUTS[layout],
        Role.LINEAR,
        transposed=transposed,
    )
    family = Family("one", ("One",), (row,), lambda config: DIMS, lambda config: MegatronConfig({}, {}))
    weights = [
        WholeWeight(
            ParamKey(row.megatron[0], 0, expert),
            shape,
            torch.bfloat16,
            ShardAxis.ETP if ranks > 1 else None,
            (tuple(range(ranks)),),
            state,
            input_state(state),
        )
        for expert, state in enumerate(states)
    ]
    return build_plan(weights, family, DIMS, ExportRequest())


def stored_rows(layout: str, weight: torch.Tensor) -> torch.Tensor:
    """Megatron's [gate; up] as Hugging Face has its rows, written out."""
    if layout != "interleaved":
        return weight
    half = len(weight) // 2
    return torch.stack([weight[row // 2 + half * (row % 2)] for row in range(2 * half)])


def megatron_slices(layout: str, weight: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    if layout in ("joined", "interleaved"):
        halves = [half.chunk(ranks) for half in weight.chunk(2)]
        return [torch.cat([half[rank] for half in halves]) for rank in range(ranks)]
    return list(weight.chunk(ranks, dim=1 if layout == "row" else 0))


def exported(plan: ExportPlan, slices: Sequence[Sequence[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Every tensor, each of its bytes written once."""
    tensors = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in plan.expected().items()}
    written = {name: torch.zeros(tensor.shape, dtype=torch.int64) for name, tensor in tensors.items()}
    for task, of_ranks in zip(plan.tasks, slices, strict=True):
        for piece in cut(task, plan.dims, 1):
            delivered = [pack_piece(piece, weight, place, plan.dims) for place, weight in enumerate(of_ranks)]
            for rows in assemble_piece(piece, delivered, plan.dims):
                place = slice(rows.first, rows.first + len(rows.data)) if rows.data.ndim else ()
                tensors[rows.name][place] = rows.data
                written[rows.name][place] += 1
    assert all(bool((times == 1).all()) for times in written.values())
    return tensors


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(sorted(STATES)),
    st.booleans(),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 2**16),
)
def test_every_experts_matrix_lies_where_it_belongs(layout, scheme, transposed, ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    # TensorRows and columns alike, so that only what is declared tells them apart.
    weights = [(torch.randn(256, 256, generator=generator) * 2**expert).bfloat16() for expert in range(EXPERTS)]
    state = STATES[scheme]
    states = [replace(state, amax=weight.abs().max().item()) if state else None for weight in weights]
    plan = plan_of(layout, transposed, (256, 256), ranks, states)
    tensors = exported(plan, [megatron_slices(layout, weight, ranks) for weight in weights])

    amax = torch.stack(weights).abs().max().float()  # One scale of a whole tensor serves all experts.
    for expert, weight in enumerate(weights):
        matrix = stored_rows(layout, weight)
        packed = {"weight": matrix} if state is None else FORMATS[scheme].pack(matrix, amax).tensors
        for suffix, expected in packed.items():
            suffixes = {"weight": "", **({"weight_scale": "_scale_inv"} if scheme == "fp8_block" else {})}
            spelled = suffixes.get(suffix, f"_{suffix}")
            stored = tensors[NAME + spelled]
            got = stored[expert] if expected.ndim else stored.reshape(())
            turned = expected.mT if transposed and expected.ndim else expected
            assert same_bytes(got, turned), suffix


def test_one_file_has_all_owners_of_its_experts() -> None:
    plan = plan_of("row", True, (256, 256), 1, [None] * EXPERTS)
    assert [file.owners for file in plan.files] == [(0,)]
    assert plan.files[0].tensors == (NAME,)


def test_missing_experts_are_all_named() -> None:
    with pytest.raises(MappingError) as caught:
        plan_of("row", True, (256, 256), 1, [None])
    assert [(offender.expert, NAME in offender.reason) for offender in caught.value.offenders] == [(1, True), (2, True)]


def test_experts_quantized_in_part_are_all_named() -> None:
    state = replace(STATES["fp8"], amax=1.0)
    with pytest.raises(UnsupportedQuantizationError) as caught:
        plan_of("row", True, (256, 256), 1, [state, None, None])
    assert {offender.expert for offender in caught.value.offenders} == {1, 2}


def test_a_layer_that_stays_plain_is_excluded_by_the_name_of_its_module() -> None:
    row = FusedExpertMapping(
        spellings("linear_fc2", "weight"), ("model.layers.*.mlp.experts.fused",), Scope.EXPERT, ROW, Role.LINEAR
    )
    other = replace(row, megatron=spellings("linear_fc1", "weight"), hf=("model.layers.*.mlp.experts.other",))
    dims = replace(DIMS, num_layers=2, moe_layers=(0, 1))
    family = Family("two", ("Two",), (row, other), lambda config: dims, lambda config: MegatronConfig({}, {}))
    state = replace(STATES["fp8"], amax=1.0)
    weights = [
        WholeWeight(
            ParamKey(each.megatron[0], layer, expert),
            (256, 256),
            torch.bfloat16,
            weight=None if layer else state,
            activation=None if layer else state,
        )
        for each in (row, other)
        for layer in range(2)
        for expert in range(EXPERTS)
    ]
    assert build_plan(weights, family, dims, ExportRequest()).exclude_modules == ("model.layers.1.mlp.experts",)
