"""A format is a row: rows that the package does not have are packed by what they say, as other decoders read them."""

import math

import numpy as np
import pytest
import torch

from quantplug.formats import FP8, FP8_BLOCK, FP8_ROW, NVFP4, BlockFormat
from quantplug.formats.codes import E2M1
from quantplug.formats.encoding import Block, Encoding
from quantplug.formats.scale_types import E4M3_SCALE, ScaleType
from quantplug.verify.numbers import decode
from tests.formats.weights import DTYPES, bits, heavy_tailed


def powers_of_two(amaxes: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """As [MX] 6.3 would have it: the largest power of two that is in the amax, without that of the largest code."""
    exponents = torch.frexp(amaxes)[1] - torch.frexp(largest)[1]
    return (exponents + 127).clamp(0, 254).to(torch.uint8).view(torch.float8_e8m0fnu)


FLOORED = BlockFormat(
    "floored",
    Encoding(E2M1, Block(1, 32), ScaleType("floored", torch.float8_e8m0fnu, None, powers_of_two, torch.Tensor.float)),
    ("weight_scale",),
    static_activations=False,
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_new_type_of_scale_and_another_width_of_blocks_are_read_by_the_checkers_own_decoder(
    dtype: torch.dtype,
) -> None:
    weight = heavy_tailed((24, 96), dtype)
    packed = FLOORED.pack(weight)
    codes, scales = packed.tensors["weight"], packed.tensors["weight_scale"]
    assert (codes.shape, scales.shape) == ((24, 48), (24, 3))
    values = decode.decode_mxfp4(codes.view(24, 3, 16), scales.view(torch.uint8))
    assert torch.equal(FLOORED.unpack(packed), values)
    # Floor as it is, the scale leaves up to 8 where the largest code is 6; below 6, codes are 2 apart at most.
    scale = decode.E8M0_VALUES[scales.view(torch.uint8).int()].repeat_interleave(32, 1)
    assert ((values - weight.float()).abs() <= 2 * scale).all()


TILES = BlockFormat(
    "tiles",
    Encoding(E2M1, Block(3, 8), E4M3_SCALE, levels=2, partial_blocks=True),
    ("scale", "scale_2"),
    static_activations=True,
)


@pytest.mark.parametrize("shape", [(3, 8), (6, 24), (7, 10), (1, 2), (2, 40)])
def test_two_levels_over_blocks_with_partial_ones_at_the_edges(shape: tuple[int, int]) -> None:
    """Each value by itself, in NumPy's FP32, by the nearest of all values that a code can have."""
    weight = heavy_tailed(shape, torch.float32)
    packed = TILES.pack(weight)
    scales = decode.decode_e4m3(packed.tensors["scale"].view(torch.uint8)).numpy()
    tensor_scale = np.float32(packed.tensors["scale_2"].item())
    values, blocks = TILES.unpack(packed).numpy(), weight.numpy()
    assert scales.shape == (math.ceil(shape[0] / 3), math.ceil(shape[1] / 8))
    assert tensor_scale == np.float32(np.abs(blocks).max()) / np.float32(6 * 448)
    magnitudes = decode.E2M1_VALUES.numpy()
    for row, column in np.ndindex(*shape):
        scale = np.float32(scales[row // 3, column // 8] * tensor_scale)
        quotient = np.float32(blocks[row, column] / scale)
        errors = np.abs(magnitudes - quotient)
        assert values[row, column] in (magnitudes[errors == errors.min()] * scale)
    for row, column in np.ndindex(*scales.shape):
        amax = np.abs(blocks[3 * row : 3 * row + 3, 8 * column : 8 * column + 8]).max()
        exact = amax / np.float32(6 * tensor_scale)
        assert scales[row, column] == pytest.approx(min(max(exact, 2.0**-9), 448), rel=2.0**-4, abs=2.0**-10)


def test_what_a_row_says_is_what_pack_makes() -> None:
    for packing, shape in ((FP8_ROW, (5, 7)), (FLOORED, (2, 64)), (TILES, (4, 10)), (NVFP4, (2, 32))):
        made = packing.pack(torch.ones(shape)).tensors
        specs = packing.outputs(shape)
        assert [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()] == [
            (spec.name, spec.shape, spec.dtype) for spec in specs
        ]


@pytest.mark.parametrize(
    ("packing", "shape", "problem"),
    [
        (FP8_ROW, (1, 1), None),
        (TILES, (5, 10), None),
        (TILES, (5, 9), "in_features 9 is not a multiple of the block size 2"),
        (TILES, (0, 10), "out_features is 0"),
        (FLOORED, (5, 48), "in_features 48 is not a multiple of the block size 32"),
    ],
)
def test_shapes_that_do_not_go(packing: BlockFormat, shape: tuple[int, int], problem: str | None) -> None:
    assert packing.problem(shape) == problem


@pytest.mark.parametrize("packing", [FP8_ROW, FLOORED, TILES], ids=lambda packing: packing.name)
def test_cut_where_the_row_says_parts_are_the_whole(packing: BlockFormat) -> None:
    weight, amax = heavy_tailed((12, 96), torch.bfloat16), torch.tensor(3.0)
    whole = packing.pack(weight, amax).tensors
    rows, columns = packing.cut_steps
    for axis, step in ((0, rows), (1, columns)):
        if step is None:
            continue
        parts = [packing.pack(part, amax).tensors for part in weight.split(2 * step, dim=axis)]
        for name, tensor in whole.items():
            pieces = [part[name] if tensor.ndim == 0 else part[name].view(torch.uint8) for part in parts]
            made = pieces[0] if tensor.ndim == 0 else torch.cat(pieces, dim=axis)
            assert torch.equal(bits(made), bits(tensor)), (name, axis)


@pytest.mark.parametrize("name", ["NVFP4", "FP8"])
def test_what_vanishes_beside_an_amax_is_what_is_packed_to_zero(name: str) -> None:
    """A value just below the border beside the amax gives a code of 0, and one just above it does not."""
    row = {"NVFP4": NVFP4, "FP8": FP8}[name]
    border = row.encoding.vanishing * 3e4
    weight = torch.zeros(1, 64)
    weight[0, 0], weight[0, 16], weight[0, 32] = 3e4, border * 0.999, border * 1.001
    values = row.unpack(row.pack(weight))[0]
    assert values[16] == 0
    assert values[32] > 0


@pytest.mark.parametrize("packing", [FP8_BLOCK, FP8_ROW, FP8, NVFP4], ids=lambda packing: packing.name)
@pytest.mark.parametrize("shape", [(130, 272), (128, 128), (1, 16), (257, 144)])
def test_the_amax_of_packed_weights_is_that_of_their_values(packing: BlockFormat, shape: tuple[int, int]) -> None:
    packed = packing.pack(heavy_tailed(shape, torch.float32))
    assert torch.equal(packing.amax(packed), packing.unpack(packed).abs().max())


@pytest.mark.parametrize("packing", [FP8_BLOCK, FP8_ROW], ids=lambda packing: packing.name)
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_an_amax_lets_nan_through(packing: BlockFormat, code: int) -> None:
    packed = packing.pack(heavy_tailed((130, 144), torch.float32))
    packed.tensors["weight"].view(torch.uint8)[129, 143] = code
    assert packing.amax(packed).isnan()
    other = packing.pack(heavy_tailed((130, 144), torch.float32))
    other.tensors["weight_scale"][-1, -1] = torch.nan
    assert packing.amax(other).isnan()
    # A code of 0 in a block of an infinite scale has no value either.
    other.tensors["weight_scale"][-1, -1] = torch.inf
    assert not packing.amax(other).isfinite()
