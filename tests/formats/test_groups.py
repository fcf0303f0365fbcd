"""A group of weights packs to what each packs to by itself."""

from collections.abc import Iterator

import pytest
import torch

from quantplug.formats import FP8, FP8_BLOCK, FP8_ROW, INT4, INT4_32, MXFP4, MXFP8, NVFP4, BlockFormat, WeightFormat
from quantplug.formats.kernels import Encoded, reference
from quantplug.formats.scale_types import scale_from_amax
from quantplug.formats.weight_format import empty_groups
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


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("packing", [NVFP4, FP8, MXFP4, MXFP8, INT4, INT4_32], ids=lambda packing: packing.name)
def test_what_threads_share_begins_and_ends_amid_weights_too(packing: BlockFormat) -> None:
    # A little more than a thread takes at once, and no whole number of what the loops work on at a time.
    weights = heavy_tailed((3 * 515, 1152), torch.bfloat16).split(515)
    amaxes = torch.tensor([1.0, 1e-3, 7.0])

    group = packing.pack_group(weights, amaxes)

    for packed, weight, amax in zip(group, weights, amaxes, strict=True):
        expected = by_the_reference(packing, weight, amax)
        for suffix, tensor in packed.tensors.items():
            assert torch.equal(bits(tensor), bits(expected[suffix][0])), suffix


def by_the_reference(packing: BlockFormat, weight: torch.Tensor, amax: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = empty_groups(packing.outputs(tuple(weight.shape)), 1, weight.device)
    encoding = packing.encoding
    if encoding.has_tensor_scale:
        tensors[packing.scales[-1]] = scale_from_amax(amax.reshape(1), encoding.largest)
    blocks = tensors[packing.scales[0]] if encoding.has_block_scales else None
    whole = tensors[packing.scales[-1]] if encoding.has_tensor_scale else None
    reference.pack(encoding, (weight,), Encoded(tensors["weight"], blocks, whole))
    return tensors
