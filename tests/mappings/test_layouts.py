"""Layouts against plain loops over rows, whole and cut into shards."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantplug.mappings.layouts import COLUMN, GATED, IDENTITY, QKV, ROW, VOCABULARY, ModelDimensions


def dimensions(heads: int = 4, groups: int = 2, head_dim: int = 48, vocab: int = 523, hidden: int = 160):
    return ModelDimensions(2, hidden, heads, groups, head_dim, vocab)


def numbered(rows: int, columns: int) -> torch.Tensor:
    return torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)


@st.composite
def attention(draw):
    groups = draw(st.integers(1, 4))
    heads = groups * draw(st.integers(1, 3))
    return dimensions(heads, groups, draw(st.sampled_from([1, 3, 48])), hidden=draw(st.integers(1, 5)))


@given(attention())
def test_qkv_gives_every_head_its_own_rows(dims):
    """Megatron keeps, per query group, its query heads, then its key, then its value."""
    fused, size = [], dims.head_dim
    per_group = dims.num_attention_heads // dims.num_query_groups
    query = numbered(dims.num_attention_heads * size, dims.hidden_size)
    key = numbered(dims.num_query_groups * size, dims.hidden_size) + 10_000
    value = key + 10_000
    for group in range(dims.num_query_groups):
        for head in range(group * per_group, (group + 1) * per_group):
            fused += list(query[head * size : (head + 1) * size])
        fused += list(key[group * size : (group + 1) * size])
        fused += list(value[group * size : (group + 1) * size])
    weight = torch.stack(fused)

    assert torch.equal(QKV.merge((query, key, value), dims), weight)
    for part, expected in zip(QKV.split(weight, dims), (query, key, value), strict=True):
        assert torch.equal(part, expected)


@given(attention())
def test_qkv_works_on_biases(dims):
    rows = (dims.num_attention_heads + 2 * dims.num_query_groups) * dims.head_dim
    bias = torch.arange(rows, dtype=torch.float32)
    assert torch.equal(QKV.merge(QKV.split(bias, dims), dims), bias)
    columns = QKV.split(bias[:, None], dims)
    assert all(torch.equal(part, column[:, 0]) for part, column in zip(QKV.split(bias, dims), columns, strict=True))


@pytest.mark.parametrize("ranks", [1, 2])
def test_merging_cut_parts_gives_megatrons_shard(ranks):
    """Each part cut along the shard axis merges into the rows that a rank of Megatron holds."""
    dims = dimensions()
    qkv = numbered((4 + 2 * 2) * 48, 160)
    shards = [QKV.merge(tuple(p.chunk(ranks)[r] for p in QKV.split(qkv, dims)), dims) for r in range(ranks)]
    assert torch.equal(torch.cat(shards), qkv)

    gate, up = numbered(96, 160), numbered(96, 160) + 50_000
    for rank in range(ranks):
        shard = GATED.merge((gate.chunk(ranks)[rank], up.chunk(ranks)[rank]), dims)
        assert torch.equal(shard, torch.cat((gate.chunk(ranks)[rank], up.chunk(ranks)[rank])))


def test_gate_is_the_first_half():
    gate, up = numbered(96, 160), numbered(96, 160) + 50_000
    weight = GATED.merge((gate, up), dimensions())
    assert torch.equal(weight, torch.cat((gate, up)))
    assert all(torch.equal(a, b) for a, b in zip(GATED.split(weight, dimensions()), (gate, up), strict=True))


def test_padding_rows_exist_only_in_megatron():
    weight = numbered(640, 160)
    (rows,) = VOCABULARY.split(weight, dimensions())
    assert torch.equal(rows, weight[:523])


@pytest.mark.parametrize("layout", [IDENTITY, COLUMN, ROW])
def test_identity_is_the_very_tensor(layout):
    weight = numbered(3, 5)
    assert layout.split(weight, dimensions())[0] is weight
    assert layout.merge((weight,), dimensions()) is weight


@pytest.mark.parametrize(
    ("layout", "shape", "says"),
    [
        (QKV, (385, 160), "not the 384 of 4 heads and 2 query groups of 48"),
        (GATED, (191, 160), "191 rows"),
        (VOCABULARY, (522, 160), "at least 523, 160"),
        (VOCABULARY, (640, 128), "at least 523, 160"),
    ],
)
def test_a_shape_that_is_not_the_models_is_a_problem(layout, shape, says):
    assert says in layout.problem(shape, dimensions())


@pytest.mark.parametrize(("layout", "shape"), [(QKV, (384, 160)), (GATED, (192, 160)), (VOCABULARY, (523, 160))])
def test_the_models_shapes_are_no_problem(layout, shape):
    assert layout.problem(shape, dimensions()) is None
