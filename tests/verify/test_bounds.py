"""The bounds hold for ModelOpt's own packers on whatever weights, and are no wider than they need be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from modelopt.torch.quantization.qtensor import NVFP4QTensor

from quantplug.formats import NVFP4
from quantplug.formats.search.candidates import SEARCHES, Scales
from quantplug.verify.numbers import bounds, decode


def nvfp4_error(weight: torch.Tensor, tensor_scale: torch.Tensor | None = None) -> bounds.ErrorSum:
    """Packs by ModelOpt, decodes, and sums up."""
    packed, scales, used = NVFP4QTensor.quantize(weight, 16, weights_scaling_factor_2=tensor_scale)
    total = bounds.ErrorSum()
    total.add(
        bounds.nvfp4_sums(decode.decode_nvfp4(packed._quantized_data, scales.view(torch.uint8), used), weight, used)
    )
    return total


@st.composite
def weights(draw: DrawFn) -> torch.Tensor:
    """Few rows of awkward sizes: magnitudes over many octaves, ties, zeros of both signs."""
    mantissas = st.sampled_from([0.0, -0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 1.0625, 1.19])
    values = st.tuples(mantissas, st.integers(-24, 4), st.sampled_from([1.0, -1.0]))
    rows, blocks = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    drawn = draw(st.lists(values, min_size=rows * blocks * 16, max_size=rows * blocks * 16))
    weight = torch.tensor([mantissa * 2.0**exponent * sign for mantissa, exponent, sign in drawn])
    weight[0] = 6.0
    return weight.view(rows, blocks * 16)


@settings(max_examples=60)
@given(weights())
def test_round_to_nearest_stays_within_the_nvfp4_bound(weight: torch.Tensor) -> None:
    total = nvfp4_error(weight)
    assert total.squared_error <= total.squared_bound * bounds.SLACK**2
    assert (total.beyond, total.lost, total.broken_rows) == (0, 0, 0)


@pytest.mark.parametrize("scales", ["four_over_six", "mse"])
@settings(max_examples=60)
@given(weights())
def test_a_search_for_scales_stays_within_the_nvfp4_bound(scales: str, weight: torch.Tensor) -> None:
    packed = NVFP4.searched(SEARCHES[Scales(scales)]).pack(weight).tensors
    block_scales, scale = packed["weight_scale"].view(torch.uint8), packed["weight_scale_2"]
    total = bounds.ErrorSum()
    total.add(bounds.nvfp4_sums(decode.decode_nvfp4(packed["weight"], block_scales, scale), weight, scale))
    assert total.squared_error <= total.squared_bound * bounds.SLACK**2
    assert (total.beyond, total.lost, total.broken_rows) == (0, 0, 0)


@settings(max_examples=60)
@given(weights(), st.floats(1e-4, 1e2))
def test_rounding_stays_within_the_fp8_bound(weight: torch.Tensor, scale: float) -> None:
    factor = torch.tensor(scale)
    codes = (weight.bfloat16() / factor.bfloat16()).clamp(-448, 448).to(torch.float8_e4m3fn)
    factor = factor.bfloat16().float()
    if float(weight.abs().max()) > 448 * float(factor):
        return
    total = bounds.ErrorSum()
    total.add(bounds.fp8_sums(decode.decode_e4m3(codes.view(torch.uint8)) * factor, weight.bfloat16().float(), factor))
    assert total.squared_error <= total.squared_bound * bounds.SLACK**2
    assert (total.beyond, total.lost, total.broken_rows) == (0, 0, 0)


def test_the_worst_block_comes_close_to_the_bound() -> None:
    """A block scale just above a rounding tie, and 15 values halfway between 4 and 6."""
    tensor_scale = torch.tensor(1.0)
    amax = 6 * 1.0626  # its scale, 1.0626, rounds up to 1.125
    weight = torch.full((1, 16), 5 * 1.125 * (1 + 1e-6))
    weight[0, 0] = amax
    total = nvfp4_error(weight, tensor_scale)
    error = math.sqrt(total.squared_error / total.squared_norm)
    assert 0.97 * bounds.NVFP4_BLOCK_BOUND < error <= bounds.NVFP4_BLOCK_BOUND


def test_a_zero_block_must_be_zero() -> None:
    total = bounds.ErrorSum()
    total.add(bounds.nvfp4_sums(torch.full((1, 16), 1e-30), torch.zeros(1, 16), torch.ones(1)))
    assert total.squared_bound == 0
    assert total.squared_error > 0
    assert total.beyond == 16
    assert total.broken_rows == 1


@pytest.mark.parametrize(("magnitude", "lost"), [(6 * 2**-9, 1), (6.0, 1), (6 * 2**-10, 0), (0.25 * 2**-9, 0), (0, 0)])
def test_a_block_is_lost_from_the_smallest_scale_on(magnitude: float, lost: int) -> None:
    """With a tensor scale of 1; below, rounding the block scale or the values gives zeros too."""
    weight = torch.full((2, 16), 6 * 448.0)
    weight[1] = magnitude
    decoded = torch.cat([weight[:1], torch.zeros(1, 16)])
    total = bounds.ErrorSum()
    total.add(bounds.nvfp4_sums(decoded, weight, torch.ones(1)))
    assert total.lost == lost


@pytest.mark.parametrize(("magnitude", "lost"), [(2**-9, 2), (1.0, 2), (2**-10, 0), (0, 0)])
def test_a_part_of_an_fp8_row_is_lost_from_the_smallest_code_on(magnitude: float, lost: int) -> None:
    """160 columns: a segment of 128 and a shorter one."""
    weight = torch.full((2, 160), 448.0)
    weight[1] = magnitude
    decoded = torch.cat([weight[:1], torch.zeros(1, 160)])
    total = bounds.ErrorSum()
    total.add(bounds.fp8_sums(decoded, weight, torch.ones(1, 1)))
    assert total.lost == lost
