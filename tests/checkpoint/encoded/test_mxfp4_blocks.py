"""MXFP4 against transformers' own decoder of GPT-OSS, and by hand."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quantplug.checkpoint.encoded.mxfp4_source import unpack_blocks


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.randoms(use_true_random=False))
def test_every_value_is_that_of_transformers(experts, rows, groups, dice):
    blocks = torch.tensor([dice.randrange(256) for _ in range(experts * rows * groups * 16)], dtype=torch.uint8)
    blocks = blocks.reshape(experts, rows, groups, 16)
    # transformers makes no NaN of scale 255, and its BF16 arithmetic flushes what is below 2**-126.
    scales = torch.tensor([dice.randrange(3, 253) for _ in range(experts * rows * groups)], dtype=torch.uint8)
    scales = scales.reshape(experts, rows, groups)
    expected = convert_moe_packed_tensors(blocks.clone(), scales.clone())
    assert torch.equal(unpack_blocks(blocks, scales).mT, expected)


def test_the_even_column_is_in_the_low_nibble_and_the_scale_is_a_power_of_two():
    blocks = torch.zeros(1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0] = 0x2F  # -6, then 1
    values = unpack_blocks(blocks, torch.tensor([[128]], dtype=torch.uint8))
    assert values.shape == (1, 32)
    assert values.dtype is torch.bfloat16
    assert values[0, :3].tolist() == [-12.0, 2.0, 0.0]


def test_the_smallest_scale_gives_subnormals_and_the_last_code_is_nan():
    blocks = torch.full((2, 1, 16), 0x11, dtype=torch.uint8)  # 0.5 everywhere
    values = unpack_blocks(blocks, torch.tensor([[0], [255]], dtype=torch.uint8))
    assert (values[0] == 2.0**-128).all()
    assert values[1].isnan().all()
