"""gather(pack(slice)) == pack(gather(slice)), for every format, layout and number of slices, blocks astride them too.

The slices are cut as Megatron cuts them, by hand in this file; the oracle packs the whole Hugging Face part.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplug.export.base import QuantizerState, WholeWeight
from quantplug.export.pack import join_slices, pack_slice, travel_specs
from quantplug.export.plan import ExportRequest, build_plan
from quantplug.formats import FP8, NVFP4, FP8Block
from quantplug.mappings.base import Family, MegatronConfig, ParamKey, Role, Scope, WeightMapping
from quantplug.mappings.layouts import COLUMN, GATED, QKV, ROW, VOCABULARY, ModelDimensions
from quantplug.topology import ShardAxis

STATES = {
    "nvfp4": QuantizerState("q", (2, 1), ((-1, 16),), (4, 3), dynamic_blocks=True),
    "fp8": QuantizerState("q", (4, 3)),
    "fp8_block": QuantizerState("q", (4, 3), ((-2, 128), (-1, 128)), axis=(0, 2)),
    "plain": None,
}
FORMATS = {"nvfp4": NVFP4(), "fp8": FP8(), "fp8_block": FP8Block()}
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
    )
    (task,) = build_plan([weight], family, dims, ExportRequest()).tasks
    return task


@st.composite
def cases(draw):
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    scheme = draw(st.sampled_from(sorted(STATES)))
    ranks = draw(st.sampled_from([1, 2, 4]))
    unit = 128 if scheme == "fp8_block" else 16
    columns = draw(st.sampled_from([1, 3, 4])) * unit
    rows = draw(st.sampled_from([4, 12])) * (unit if scheme == "fp8_block" else 4)
    groups = draw(st.sampled_from([1, 2, 4]))
    head_dim = 128 if scheme == "fp8_block" else draw(st.sampled_from([4, 12, 48]))
    if layout == "row":
        columns *= ranks if scheme == "plain" else 1
        if columns % ranks:
            columns *= ranks
    dims = ModelDimensions(1, columns, groups * draw(st.sampled_from([2, 4])), groups, head_dim, 0)
    return layout, scheme, ranks, rows, columns, dims, draw(st.integers(0, 2**16))


@settings(deadline=None, max_examples=150)
@given(cases())
def test_slices_packed_apart_are_the_whole_packed_at_once(case):
    layout, scheme, ranks, rows, columns, dims, seed = case
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

    delivered = [pack_slice(task, piece, dims) for piece in slices]
    for tensors in delivered:
        assert [(tuple(t.shape), t.dtype) for t in tensors] == [(s.shape, s.dtype) for s in travel_specs(task, dims)]
    joined = dict(join_slices(task, delivered, dims))

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


@pytest.mark.parametrize("ranks", [2, 4])
def test_padding_rows_of_the_vocabulary_are_cut_after_joining(ranks):
    dims = ModelDimensions(1, 8, 1, 1, 8, 100)
    row = WeightMapping(("embedding",), ("model.embed_tokens.weight",), Scope.MODEL, VOCABULARY, Role.VOCABULARY)
    family = Family("one", ("One",), (row,), lambda config: dims, lambda config: MegatronConfig({}, {}))
    # 256 rows: with two ranks the second one holds padding alone.
    whole = torch.randn(256, 8).to(torch.bfloat16)
    weight = WholeWeight(ParamKey("embedding"), (256, 8), torch.bfloat16, ShardAxis.TP, (tuple(range(ranks)),))
    (task,) = build_plan([weight], family, dims, ExportRequest()).tasks
    delivered = [pack_slice(task, piece, dims) for piece in whole.chunk(ranks)]
    ((name, tensor),) = join_slices(task, delivered, dims)
    assert name == "model.embed_tokens.weight"
    assert torch.equal(tensor, whole[:100])
