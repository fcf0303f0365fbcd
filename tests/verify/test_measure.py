"""Compiled loops and PyTorch measure the same, whatever the magnitudes; a uniform error shows in the gain."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.qtensor import NVFP4QTensor

from quantplug.verify.numbers import bounds
from quantplug.verify.source.measure import Meter, compiled_loops
from quantplug.verify.source.packed_rows import Fp8Rows, Nvfp4Rows, PackedRows

MAGNITUDES = st.sampled_from([1.0, 1e-2, 1e-24, 1e30])
DTYPES = st.sampled_from([torch.bfloat16, torch.float32, torch.float16])
EVERYTHING = 2**40


def drawn(rows: int, columns: int, magnitude: float, seed: int) -> torch.Tensor:
    """Gaussian, with outliers and a zero block."""
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns) * torch.where(torch.rand(rows, columns) < 0.01, 20.0, 1.0)
    weight[0, :16] = 0
    return weight * magnitude


def nvfp4(weight: torch.Tensor) -> Nvfp4Rows:
    codes, scales, tensor_scale = NVFP4QTensor.quantize(weight.float(), 16)
    return Nvfp4Rows(codes._quantized_data, scales.view(torch.uint8), tensor_scale.float())


def fp8(weight: torch.Tensor, block: tuple[int, int]) -> Fp8Rows:
    """With one scale for each block that begins in the weight."""
    rows, columns = (-(-size // min(side, size)) for size, side in zip(weight.shape, block, strict=True))
    scales = torch.empty(rows, columns)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            place = tuple(
                slice(k * side, min((k + 1) * side, EVERYTHING)) for k, side in zip((i, j), block, strict=True)
            )
            scales[i, j] = weight[place].float().abs().max() / 448
            codes[place] = (weight[place].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return Fp8Rows(codes.view(torch.uint8), scales, block, 0)


def both(packed: PackedRows, weight: torch.Tensor) -> None:
    plain, loops = Meter(None).sums(packed, weight), Meter(compiled_loops()).sums(packed, weight)
    for field in fields(plain):
        ours, theirs = getattr(plain, field.name), getattr(loops, field.name)
        torch.testing.assert_close(torch.as_tensor(ours).double(), torch.as_tensor(theirs).double(), rtol=1e-6, atol=0)


@settings(max_examples=20, deadline=None)
@given(MAGNITUDES, DTYPES, st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_loops_and_torch_agree_on_nvfp4(
    magnitude: float, dtype: torch.dtype, rows: int, blocks: int, seed: int
) -> None:
    magnitude = 1.0 if dtype == torch.float16 else magnitude
    weight = drawn(rows, 16 * blocks, magnitude, seed).to(dtype)
    weight[0, -1] = magnitude
    both(nvfp4(weight), weight)


@settings(max_examples=20, deadline=None)
@given(MAGNITUDES, st.integers(1, 300), st.integers(1, 300), st.integers(0, 99), st.integers(0, 2))
def test_loops_and_torch_agree_on_fp8(magnitude: float, rows: int, columns: int, seed: int, kind: int) -> None:
    weight = drawn(rows, columns, magnitude, seed).bfloat16()
    weight[:, -1] = magnitude
    both(fp8(weight, [(EVERYTHING, EVERYTHING), (1, EVERYTHING), (128, 128)][kind]), weight)


@pytest.mark.parametrize("magnitude", [1.0, 1e-24, 1e30])
@pytest.mark.parametrize("factor", [0.85, 0.9, 1.0, 1.1, 1.15])
def test_a_uniform_error_shows(magnitude: float, factor: float) -> None:
    weight = drawn(128, 128, magnitude, 0).bfloat16()
    of_blocks, of_all = nvfp4(weight), fp8(weight, (EVERYTHING, EVERYTHING))
    for packed, (gain, _) in (
        (replace(of_blocks, tensor_scale=of_blocks.tensor_scale * factor), bounds.NVFP4_GAINS),
        (replace(of_all, scales=of_all.scales * factor), bounds.FP8_GAINS),
    ):
        total = bounds.ErrorSum()
        total.add(Meter(None).sums(packed, weight))
        assert bool(gain.suspicious(total.sums)) == (factor != 1)


@pytest.mark.parametrize("magnitude", [1e-24, 1.0, 1e30])
def test_extreme_magnitudes_are_within_their_bounds(magnitude: float) -> None:
    weight = drawn(8, 64, magnitude, 1).bfloat16()
    total = bounds.ErrorSum()
    total.add(Meter(None).sums(nvfp4(weight), weight))
    assert 0 < total.squared_error <= total.squared_bound
    assert (total.broken_rows, total.lost) == (0, 0)
