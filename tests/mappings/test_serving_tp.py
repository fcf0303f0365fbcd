"""Tensor-parallel sizes of servers, held against what users of published checkpoints have met."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantplug.mappings.layouts import MambaSizes, ModelDimensions
from quantplug.mappings.serving_tp import SIZES, BlockedLinear, Cut, of_checkpoint, of_heads, serving_tp

BLOCK = 128


def dims(heads: int, groups: int, layers: int = 1) -> ModelDimensions:
    return ModelDimensions(layers, 2048, heads, groups, 128, 1000)


def in_blocks(*widths: int) -> list[Cut]:
    return [Cut(f"width {width}", width, BLOCK) for width in widths]


@pytest.mark.parametrize(
    ("cuts", "refused", "says"),
    [
        # Qwen3-30B-A3B-FP8: vllm-project/vllm#25292 and QwenLM/Qwen3#1485, "can only run TP1 and TP2".
        ([*of_heads(dims(32, 4)), *in_blocks(768)], {4, 8}, "width 768"),
        # Qwen3-235B-A22B-FP8 at 8: vllm-project/vllm#17569, 192 of a rank.
        ([*of_heads(dims(64, 4)), *in_blocks(1536)], {8}, "width 1536"),
        # DeepSeek-R1 at 32: sgl-project/sglang#3345, 576 of a rank.
        (in_blocks(18432, 2048), {32}, "width 18432"),
        # Qwen3-Next-80B-A3B-FP8 at 8: sgl-project/sglang#10852, 64 of a rank.
        ([*of_heads(dims(16, 2)), *in_blocks(512)], {8}, "width 512"),
    ],
)
def test_sizes_that_users_were_refused(cuts: Iterable[Cut], refused: set[int], says: str) -> None:
    found = serving_tp(cuts)
    assert refused.isdisjoint(found.sizes)
    for size in refused:
        assert says in {limit.what for limit in found.limits if size in limit.refused}
    # What stands below runs, as the same reports say.
    assert {size for size in SIZES if size < min(refused)} <= set(found.sizes)


def test_heads_of_keys_are_copied_where_ranks_are_more() -> None:
    assert serving_tp(of_heads(dims(64, 4))).sizes == SIZES
    assert serving_tp(of_heads(dims(24, 3))).sizes == (1,)
    assert serving_tp(of_heads(dims(24, 6))).sizes == (1, 2)
    # Rows of keys in blocks: two heads of 64 make one, and a copy of one head is half of one.
    assert serving_tp([Cut("rows of k", 8 * 64, BLOCK, most=8)]).sizes == (1, 2, 4)


def test_what_ends_amid_a_block_and_is_merged_cannot_be_served_at_all() -> None:
    (limit,) = serving_tp([Cut("rows of gate", 192, BLOCK, merged=True)]).limits
    assert limit.refused == SIZES
    assert serving_tp([Cut("rows of o", 192, BLOCK)]).sizes == (1,)


def test_what_servers_take_for_several_linears_is_cut_as_several() -> None:
    """Mamba's in_proj: vLLM 0.32 makes z, x, B, C and dt of it (`MambaMixer2` in layers/mamba/mamba_mixer2.py)."""
    mamba = replace(dims(64, 8), mamba=MambaSizes(num_heads=64, head_dim=64, num_groups=8, state_dim=128, kernel=4))
    projection = BlockedLinear("backbone.layers.0.mixer.in_proj", (2 * 4096 + 2 * 1024 + 64, 2688), (BLOCK, BLOCK))

    found = of_checkpoint([projection], mamba)

    assert found.sizes == (1, 2, 4, 8)
    assert "out_features of B and C of mixer.in_proj" in {it.what for it in found.limits if 16 in it.refused}
    amiss = replace(mamba, mamba=replace(mamba.mamba, head_dim=63))
    assert of_checkpoint([projection], amiss).sizes == ()


@given(st.integers(1, 4096), st.sampled_from([1, 16, 32, 128]), st.sampled_from(SIZES[1:]))
def test_parts_are_whole_blocks(size: int, whole: int, ranks: int) -> None:
    """By cutting: as many equal parts as ranks, each of whole blocks."""
    bounds = [size * rank / ranks for rank in range(ranks + 1)]
    assert Cut("", size, whole).allows(ranks) == all(bound % whole == 0 for bound in bounds)
