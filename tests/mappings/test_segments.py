"""Tensors of several segments: every slice has its share of each, and slices of any number make up the whole."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from quantplug.mappings.families.nemotron_h import CONVOLVED, PROJECTED
from quantplug.mappings.layouts import MambaSizes, ModelDimensions


def dimensions(sizes: MambaSizes) -> ModelDimensions:
    return ModelDimensions(2, 160, 4, 2, 48, 523, mamba=sizes)


@st.composite
def cut_mixers(draw) -> tuple[ModelDimensions, int]:
    """A mixer, and a number of tensor parallel ranks that its groups and heads divide over."""
    ranks = draw(st.integers(1, 4))
    groups = ranks * draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 3))
    sizes = MambaSizes(heads, draw(st.integers(1, 5)), groups, draw(st.integers(1, 5)), kernel=4)
    return dimensions(sizes), ranks


def labels(dims: ModelDimensions, names: str) -> list[tuple[str, int]]:
    """What every row is: its segment and the head or group that it belongs to, which no rank shares with another."""
    sizes = dims.mamba
    owners = {
        "z": [head for head in range(sizes.num_heads) for _ in range(sizes.head_dim)],
        "x": [head for head in range(sizes.num_heads) for _ in range(sizes.head_dim)],
        "B": [group for group in range(sizes.num_groups) for _ in range(sizes.state_dim)],
        "C": [group for group in range(sizes.num_groups) for _ in range(sizes.state_dim)],
        "d": list(range(sizes.num_heads)),
    }
    return [(name, owner) for name in names for owner in owners[name]]


@given(cut_mixers())
def test_a_rank_has_the_rows_of_its_heads_and_groups(case):
    dims, ranks = case
    for layout, names in ((PROJECTED, "zxBCd"), (CONVOLVED, "xBC")):
        rows = labels(dims, names)
        assert layout.problem((len(rows), 160), dims) is None
        whole = torch.arange(len(rows))
        for rank in range(ranks):
            mine = [rows[number] for number in layout.cut(whole, rank, ranks, dims).tolist()]
            share = {name: (dims.mamba.num_groups if name in "BC" else dims.mamba.num_heads) // ranks for name in names}
            expected = [(name, who) for name, who in rows if who // share[name] == rank]
            assert mine == expected


@given(cut_mixers(), st.integers(1, 3))
def test_slices_make_up_the_whole(case, columns):
    dims, ranks = case
    for layout in (PROJECTED, CONVOLVED):
        weight = torch.randn(sum(layout.sizes(dims)), columns)
        for whole in (weight, weight[:, 0], weight[:, None]):  # A weight, a bias, and that of a convolution.
            slices = tuple(layout.cut(whole, rank, ranks, dims) for rank in range(ranks))
            assert torch.equal(layout.join(slices, dims), whole)
            assert layout.split(whole, dims)[0] is whole
            assert layout.merge((whole,), dims) is whole


def test_only_a_whole_tensor_is_cut_cleanly():
    dims = dimensions(MambaSizes(6, 40, 2, 24, 4))
    assert PROJECTED.cuts_cleanly(1, dims)
    assert not PROJECTED.cuts_cleanly(2, dims)
    assert "582" in PROJECTED.problem((581, 160), dims)
