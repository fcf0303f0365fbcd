"""gather(pack(slice)) == pack(gather(slice)), for every format, layout and number of slices, blocks astride them too.

The slices are cut as Megatron cuts them, by hand in this file; the oracle packs the whole Hugging Face part.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplug.export.pipeline.assemble import assemble_piece
from quantplug.export.plan.build import ExportRequest, build_plan
from quantplug.export.plan.pieces import cut, travel_specs
from quantplug.export.plan.types import ExportTask, QuantizerState, WholeWeight
from quantplug.formats import FP8, FP8_BLOCK, FP8_ROW, NVFP4
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import COLUMN, GATED, QKV, ROW, VOCABULARY, ModelDimensions
from quantplug.mappings.rows import Role, Scope, WeightMapping
from quantplug.mappings.table import Family, MegatronConfig
from quantplug.topology import ShardAxis
from tests.export.live_bytes import LiveBytes
from tests.export.pieces import pack_piece

STATES = {
    "nvfp4": QuantizerState("q", (2, 1), ((-1, 16),), (4, 3), dynamic_blocks=True),
    "fp8": QuantizerState("q", (4, 3)),
    "fp8_block": QuantizerState("q", (4, 3), ((-2, 128), (-1, 128)), axis=(0, 2)),
    "fp8_row": QuantizerState("q", (4, 3), axis=0),
    "plain": None,
}
INPUTS = {"fp8_row": QuantizerState("i", (4, 3), ((-1, None),), dynamic=True)}
FORMATS = {"nvfp4": NVFP4, "fp8": FP8, "fp8_block": FP8_BLOCK, "fp8_row": FP8_ROW}
LAYOUTS = {"column": COLUMN, "row": ROW, "gated": GATED, "qkv": QKV}


def megatron_slices(layout: str, parts: list[torch.Tensor], dims: ModelDimensions, ranks: int) -> list[torch.Tensor]:
    """What each tensor parallel rank of Megatron holds, written out."""
    if layout == "row":
        return list(parts[0].chunk(ranks, dim=1))
    if layout == "gated":
        gate, up = (part.chunk(ranks, dim=0) for part in parts)
        return [torch.cat((gate[rank], up[rank])) for rank in range(ranks)]
    if layout == "qkv":
        query, key, value = parts
        per_group = dims.num_attention_heads // dims.num_query_groups * dims.head_dim
        groups = [
            torch.cat(
                (
                    query[g * per_group : (g + 1) * per_group],
                    *(kv[g * dims.head_dim : (g + 1) * dims.head_dim] for kv in (key, value)),
                )
            )
            for g in range(dims.num_query_groups)
        ]
        return list(torch.cat(groups).chunk(ranks, dim=0))
    return list(parts[0].chunk(ranks, dim=0))


def task_for(layout: str, scheme: str, whole_shape: tuple[int, ...], dims: ModelDimensions, ranks: int, amax: float):
    """The plan's task for one weight that is cut over ranks."""
    names = {"qkv": ("q.weight", "k.weight", "v.weight"), "gated": ("gate.weight", "up.weight")}.get(
        layout, ("w.weight",)
    )
    row = WeightMapping(("weight",), names, Scope.MODEL, LAYOUTS[layout], Role.LINEAR)
    family = Family("one", ("One",), (row,), lambda config: dims, lambda config: MegatronConfig({}, {}))
    state = STATES[scheme]
    weight = WholeWeight(
        ParamKey("weight"),
        whole_shape,
        torch.bfloat16,
        ShardAxis.TP if ranks > 1 else None,
        (tuple(range(ranks)),),
        replace(state, amax=amax) if state else None,
        INPUTS.get(scheme),
    )
    (task,) = build_plan([weight], family, dims, ExportRequest()).tasks
    return task


def exported(
    task: ExportTask, slices: Sequence[torch.Tensor], dims: ModelDimensions, bucket_bytes: int
) -> dict[str, torch.Tensor]:
    """The output tensors of one weight, each byte written once, from its slices, in pieces for such buckets."""
    specs = [spec for output in task.outputs for spec in output.tensors]
    tensors = {spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in specs}
    written = {spec.name: torch.zeros(spec.shape, dtype=torch.int64) for spec in specs}
    pieces = list(cut(task, dims, bucket_bytes))
    for piece in pieces:
        delivered = [pack_piece(piece, weight, place, dims) for place, weight in enumerate(slices)]
        nbytes = 0
        for place, sent in enumerate(delivered):
            planned = travel_specs(piece, place, dims)
            assert [(tuple(t.shape), t.dtype) for t in sent] == [(spec.shape, spec.dtype) for spec in planned]
            nbytes += sum(spec.nbytes for spec in planned)
        assert nbytes <= piece.in_flight
        for rows in assemble_piece(piece, delivered, dims):
            place = slice(rows.first, rows.first + len(rows.data)) if rows.data.ndim else ()
            tensors[rows.name][place] = rows.data
            written[rows.name][place] += 1
    assert all(bool((times == 1).all()) for times in written.values())
    return tensors


@st.composite
def cases(draw):
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    scheme = draw(st.sampled_from(sorted(STATES)))
    ranks = draw(st.sampled_from([1, 2, 4]))
    # In blocks of 128 x 128 the last ones may be partial; but of rows that are put below others, whole blocks.
    blocks = scheme == "fp8_block"
    columns = draw(st.sampled_from([48, 128, 320, 512])) if blocks else draw(st.sampled_from([1, 3, 4])) * 16
    rows = draw(st.sampled_from([4, 12])) * (128 if blocks and layout == "gated" else 4)
    if blocks and layout in ("column", "row"):
        rows = draw(st.sampled_from([4, 64, 192, 256, 576, 1024]))
    groups = draw(st.sampled_from([1, 2, 4]))
    head_dim = 128 if scheme == "fp8_block" else draw(st.sampled_from([4, 12, 48]))
    if layout == "row":
        columns *= ranks if scheme == "plain" else 1
        if columns % ranks:
            columns *= ranks
    dims = ModelDimensions(1, columns, groups * draw(st.sampled_from([2, 4])), groups, head_dim, 0)
    bucket_bytes = draw(st.sampled_from([1, 20_000, 200_000, 2**28]))
    return layout, scheme, ranks, rows, columns, dims, bucket_bytes, draw(st.integers(0, 2**16))


@settings(max_examples=150)
@given(cases())
def test_slices_packed_apart_are_the_whole_packed_at_once(case):
    layout, scheme, ranks, rows, columns, dims, bucket_bytes, seed = case
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "qkv": [dims.num_attention_heads * dims.head_dim, *[dims.num_query_groups * dims.head_dim] * 2],
        "gated": [rows, rows],
    }.get(layout, [rows])
    parts = [torch.randn(size, columns, generator=generator).to(torch.bfloat16) for size in sizes]
    slices = megatron_slices(layout, parts, dims, ranks)
    axis = 1 if layout == "row" else 0
    whole_shape = tuple(size * ranks if dim == axis else size for dim, size in enumerate(slices[0].shape))
    amax = torch.cat([part.flatten() for part in parts]).abs().max().float()
    task = task_for(layout, scheme, whole_shape, dims, ranks, float(amax))

    joined = exported(task, slices, dims, bucket_bytes)
    for output, part in zip(task.outputs, parts, strict=True):
        if scheme == "plain":
            assert torch.equal(joined[output.name], part)
            continue
        for suffix, tensor in FORMATS[scheme].pack(part, amax).tensors.items():
            spelled = {"weight_scale": "weight_scale_inv"}.get(suffix, suffix) if scheme == "fp8_block" else suffix
            got = joined[f"{output.name.removesuffix('.weight')}.{spelled}"]
            assert (
                torch.equal(got.reshape(tensor.shape).view(torch.uint8), tensor.view(torch.uint8))
                if tensor.ndim
                else got.reshape(()) == tensor
            )


@pytest.mark.parametrize("bucket_bytes", [1, 2_000, 2**28])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_padding_rows_of_the_vocabulary_are_not_written(ranks, bucket_bytes):
    dims = ModelDimensions(1, 8, 1, 1, 8, 100)
    row = WeightMapping(("embedding",), ("model.embed_tokens.weight",), Scope.MODEL, VOCABULARY, Role.EMBEDDING)
    family = Family("one", ("One",), (row,), lambda config: dims, lambda config: MegatronConfig({}, {}))
    # 256 rows: with two ranks the second one holds padding alone.
    whole = torch.randn(256, 8).to(torch.bfloat16)
    axis = ShardAxis.TP if ranks > 1 else None
    weight = WholeWeight(ParamKey("embedding"), (256, 8), torch.bfloat16, axis, (tuple(range(ranks)),))
    (task,) = build_plan([weight], family, dims, ExportRequest()).tasks
    ((name, tensor),) = exported(task, whole.chunk(ranks), dims, bucket_bytes).items()
    assert name == "model.embed_tokens.weight"
    assert torch.equal(tensor, whole[:100])


@pytest.mark.parametrize("gather_first", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("scheme", ["fp8", "plain"])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_a_weight_larger_than_a_bucket_never_takes_the_memory_of_one(layout, scheme, ranks, gather_first):
    """Whatever is done with a piece: its slices are taken, packed, joined."""
    bucket_bytes = 2**24
    dims = ModelDimensions(1, 2048, 64, 32, 64, 0)
    shape = (128 * 64 if layout == "qkv" else 8192, 2048)
    task = replace(task_for(layout, scheme, shape, dims, ranks, 1.0), gather_first=gather_first and ranks > 1)
    assert task.source.nbytes == 2 * bucket_bytes
    slices = torch.zeros(shape, dtype=torch.bfloat16).chunk(ranks, dim=1 if layout == "row" else 0)
    with LiveBytes(slices) as live:
        for piece in cut(task, dims, bucket_bytes):
            assert piece.in_flight <= bucket_bytes / 4
            delivered = [pack_piece(piece, weight, place, dims) for place, weight in enumerate(slices)]
            list(assemble_piece(piece, delivered, dims))
    assert live.peak <= bucket_bytes
