"""The largest magnitude of each block, of any bits, against PyTorch: blocks in eights, and those that are left over."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quantplug.formats.kernels.cpu.amaxes import block_amaxes
from quantplug.formats.kernels.cpu.tiles import TILE

# As weights arrive: the type of the integers says which float their bits are.
ARRIVING = {torch.bfloat16: np.uint16, torch.float16: np.int16, torch.float32: np.uint32}


@pytest.mark.parametrize("dtype", ARRIVING, ids=str)
@pytest.mark.parametrize("width", [16, 32, 128])
def test_an_amax_is_that_of_its_block_alone(width: int, dtype: torch.dtype) -> None:
    fill, kind = block_amaxes(width), np.dtype(ARRIVING[dtype])

    @given(st.integers(1, min(19, TILE // width)).flatmap(lambda blocks: arrays(kind, blocks * width)))
    def check(bits: np.ndarray) -> None:
        amaxes = np.empty(bits.size // width, np.float32)
        fill(bits, amaxes)
        weight = torch.from_numpy(bits.view(f"i{kind.itemsize}")).view(dtype).reshape(-1, width)
        # PyTorch's amax of a block with a NaN is NaN, and so is that of magnitudes compared as integers.
        np.testing.assert_array_equal(amaxes, weight.float().abs().amax(1).numpy())

    check()
