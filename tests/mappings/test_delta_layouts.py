"""Layouts of gated delta nets and gated attention against transformers' way to take its projections apart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from quantplug.mappings.delta_layouts import DELTA_BY_KEY_HEAD, DELTA_CONVOLUTION, DELTA_PARTS, GATED_QKV
from quantplug.mappings.layouts import DeltaSizes, ModelDimensions

TAIL = (5,)


def dimensions(sizes: DeltaSizes | None = None, heads: int = 4, groups: int = 2, head_dim: int = 48) -> ModelDimensions:
    return ModelDimensions(2, 5, heads, groups, head_dim, 523, delta=sizes)


@st.composite
def nets(draw: st.DrawFn) -> ModelDimensions:
    key_heads = draw(st.sampled_from([2, 4, 6]))
    dims = [draw(st.integers(1, 5)) for _ in range(2)]
    return dimensions(DeltaSizes(key_heads, key_heads * draw(st.integers(1, 3)), *dims, kernel=4))


@st.composite
def attentions(draw: st.DrawFn) -> ModelDimensions:
    groups = draw(st.sampled_from([1, 2, 4]))
    return dimensions(None, groups * draw(st.integers(1, 3)), groups, draw(st.sampled_from([1, 3, 48])))


def numbered(rows: int, first: int = 0) -> torch.Tensor:
    """[rows, 5]; every row has a number of its own, and every column."""
    return (torch.arange(rows)[:, None] + first) * 10.0 + torch.arange(TAIL[0])


def segments(dims: ModelDimensions) -> list[torch.Tensor]:
    """q, k, v, z, b, a, as a net reads them off its projections, rows of one behind those of another."""
    net = dims.delta
    rows = [net.key_rows, net.key_rows, net.value_rows, net.value_rows, net.value_heads, net.value_heads]
    return [numbered(count, 1000 * place) for place, count in enumerate(rows)]


@given(nets())
def test_parts_by_key_head_are_what_transformers_takes_apart(dims: ModelDimensions) -> None:
    """Its own function, run on projections whose entries are the numbers of rows."""
    net = dims.delta
    config = Qwen3NextConfig(
        hidden_size=8,
        linear_num_key_heads=net.key_heads,
        linear_num_value_heads=net.value_heads,
        linear_key_head_dim=net.key_dim,
        linear_value_head_dim=net.value_dim,
        num_hidden_layers=1,
    )
    with torch.device("meta"):
        module = Qwen3NextGatedDeltaNet(config, 0)
    whole = torch.cat(segments(dims))
    qkvz, ba = DELTA_BY_KEY_HEAD.split(whole, dims)
    columns = (qkvz.T[:, None], ba.T[:, None])  # Each column as a batch of one token.
    found = module.fix_query_key_value_ordering(*columns)
    for part, expected in zip(found, segments(dims), strict=True):
        assert torch.equal(part.flatten(1), expected.T)
    assert torch.equal(DELTA_BY_KEY_HEAD.merge((qkvz, ba), dims), whole)


@given(nets())
def test_parts_apart_are_the_segments(dims: ModelDimensions) -> None:
    query, key, value, gate, beta, alpha = segments(dims)
    whole = torch.cat((query, key, value, gate, beta, alpha))
    expected = (torch.cat((query, key, value)), gate, beta, alpha)
    assert all(torch.equal(*pair) for pair in zip(DELTA_PARTS.split(whole, dims), expected, strict=True))
    assert torch.equal(DELTA_PARTS.merge(expected, dims), whole)


@given(nets(), st.sampled_from([1, 2]))
def test_a_rank_has_its_share_of_every_segment(dims: ModelDimensions, ranks: int) -> None:
    parts = segments(dims)
    for layout, held in ((DELTA_PARTS, parts), (DELTA_BY_KEY_HEAD, parts), (DELTA_CONVOLUTION, parts[:3])):
        whole = torch.cat(held)
        slices = tuple(torch.cat([part.chunk(ranks)[rank] for part in held]) for rank in range(ranks))
        assert torch.equal(layout.join(slices, dims), whole)
        assert all(torch.equal(layout.cut(whole, rank, ranks, dims), slices[rank]) for rank in range(ranks))
        assert layout.cuts_cleanly(ranks, dims) is (ranks == 1)


@given(attentions())
def test_queries_and_gates_of_a_head_follow_each_other_on_disk(dims: ModelDimensions) -> None:
    """As Qwen3NextAttention views its q_proj; Megatron has, per group, queries, gates, its key, its value."""
    heads, groups, size = dims.num_attention_heads, dims.num_query_groups, dims.head_dim
    gated, key, value = (
        numbered(rows, first) for rows, first in ((2 * heads * size, 0), (groups * size, 5000), (groups * size, 9000))
    )
    query, gate = gated.T.view(TAIL[0], heads, 2 * size).chunk(2, dim=-1)  # As transformers does, columns as tokens.
    fused = []
    for group in range(groups):
        own = range(group * heads // groups, (group + 1) * heads // groups)
        fused += [query[:, head].T for head in own] + [gate[:, head].T for head in own]
        fused += [part[group * size : (group + 1) * size] for part in (key, value)]
    whole = torch.cat(fused)
    assert torch.equal(GATED_QKV.merge((gated, key, value), dims), whole)
    assert all(torch.equal(*pair) for pair in zip(GATED_QKV.split(whole, dims), (gated, key, value), strict=True))


@pytest.mark.parametrize("ranks", [1, 2])
def test_cut_parts_of_gated_attention_make_megatrons_shard(ranks: int) -> None:
    dims = dimensions()
    whole = numbered(2 * (4 + 2) * 48)
    parts = GATED_QKV.split(whole, dims)
    shards = [GATED_QKV.merge(tuple(part.chunk(ranks)[rank] for part in parts), dims) for rank in range(ranks)]
    assert torch.equal(torch.cat(shards), whole)
    assert GATED_QKV.cuts_cleanly(ranks, dims)
    assert not GATED_QKV.cuts_cleanly(4, dims)


def test_shapes_that_are_not_the_models_are_a_problem() -> None:
    dims = dimensions(DeltaSizes(2, 4, 16, 24, 4))
    rows = 2 * (32 + 96 + 4)
    for layout, right in ((GATED_QKV, 576), (DELTA_PARTS, rows), (DELTA_BY_KEY_HEAD, rows), (DELTA_CONVOLUTION, 160)):
        assert layout.problem((right, 160), dims) is None
        assert f"has {right - 1} rows" in layout.problem((right - 1, 160), dims)
