"""The reference against ModelOpt, over several chunks: the other kernels are held against it."""

import pytest
import torch
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

from quantplug.formats.chunks import CHUNK_ELEMENTS
from quantplug.formats.kernels import reference
from tests.formats.weights import DTYPES, bits, heavy_tailed

SHAPE = (384, 3 * CHUNK_ELEMENTS // 1024)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4_equals_modelopt(dtype: torch.dtype) -> None:
    weight = heavy_tailed(SHAPE, dtype)
    quantized, scales, scale_2 = NVFP4QTensor.quantize(weight.float(), 16)
    codes, block_scales = torch.empty_like(quantized._quantized_data), torch.empty_like(scales)
    reference.pack_nvfp4(weight, scale_2, codes, block_scales)
    assert torch.equal(codes, quantized._quantized_data)
    assert torch.equal(bits(block_scales), bits(scales))
    values = torch.empty(SHAPE)
    reference.unpack_nvfp4(codes, block_scales, scale_2, values)
    expected = quantized.dequantize(dtype=torch.float32, scale=scales, double_scale=scale_2, block_sizes={-1: 16})
    # ModelOpt's decoder gives 0.0 for code 8 (-0.0).
    assert torch.equal(values, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_equals_modelopt(dtype: torch.dtype) -> None:
    weight = heavy_tailed(SHAPE, dtype)
    quantized, scale = FP8QTensor.quantize(weight.float())
    codes, values = torch.empty_like(quantized._quantized_data), torch.empty(SHAPE)
    reference.pack_fp8(weight, scale, codes)
    assert torch.equal(bits(codes), bits(quantized._quantized_data))
    reference.unpack_fp8(codes, scale, values)
    assert torch.equal(bits(values), bits(quantized.dequantize(dtype=torch.float32, scale=scale)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_block_equals_modelopt(dtype: torch.dtype) -> None:
    weight, block_sizes = heavy_tailed(SHAPE, dtype), {-1: 128, -2: 128}
    quantized, scales = FP8QTensor.quantize(weight.float(), block_sizes=block_sizes)
    codes, block_scales = torch.empty_like(quantized._quantized_data), torch.empty(3, SHAPE[1] // 128)
    reference.pack_fp8_block(weight, codes, block_scales)
    assert torch.equal(bits(codes), bits(quantized._quantized_data))
    assert torch.equal(bits(block_scales), bits(scales))
    values = torch.empty(SHAPE)
    reference.unpack_fp8_block(codes, block_scales, values)
    expected = quantized.dequantize(dtype=torch.float32, scale=scales, block_sizes=block_sizes)
    assert torch.equal(bits(values), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_amax_is_exact_and_shows_nan(dtype: torch.dtype) -> None:
    weight = heavy_tailed(SHAPE, dtype)
    weight[-1, -1] = -torch.finfo(dtype).max
    assert reference.amax(weight).item() == torch.finfo(dtype).max
    weight[0, 3] = float("nan")
    assert reference.amax(weight).isnan()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8, torch.float64])
def test_bit_sums_are_what_they_say(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0)).mul(50).to(dtype)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    rows = weight.view(integers).reshape(3, 10).tolist()
    by_row = sum((2 * i + 1) * bits for i, row in enumerate(rows) for bits in row)
    by_column = sum((2 * j + 1) * bits for row in rows for j, bits in enumerate(row))
    assert reference.bit_sums(weight) == (by_row % 2**64, by_column % 2**64)
