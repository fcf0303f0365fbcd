"""A group of weights packs to what each packs to by itself."""

import pytest
import torch

from quantplug.formats import FP8, FP8_BLOCK, FP8_ROW, MXFP4, MXFP8, NVFP4, WeightFormat
from tests.formats.weights import DTYPES, bits, heavy_tailed

FORMATS = [NVFP4, FP8, FP8_ROW, FP8_BLOCK, MXFP8, MXFP4]


@pytest.mark.parametrize("packing", FORMATS, ids=lambda packing: packing.name)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_group_is_each_by_itself(packing: WeightFormat, dtype: torch.dtype, count: int, transposed: bool) -> None:
    whole = heavy_tailed((count * 130, 256), dtype)
    weights = [rows[1:129].t() if transposed else rows[1:129] for rows in whole.split(130)]
    weights[0].zero_()
    amaxes = torch.tensor([0.0, 1.0, 1e-3, 3e38, 2.0**-140])[:count]

    group = packing.pack_group(weights, amaxes)

    assert len(group) == count
    for packed, weight, amax in zip(group, weights, amaxes, strict=True):
        alone = packing.pack(weight, amax).tensors
        assert list(packed.tensors) == list(alone)
        for suffix, tensor in alone.items():
            made = packed.tensors[suffix]
            assert (made.shape, made.dtype, made.is_contiguous()) == (tensor.shape, tensor.dtype, True)
            assert torch.equal(bits(made), bits(tensor)), suffix
