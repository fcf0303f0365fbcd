"""The reference against ModelOpt, over several chunks: the other kernels are held against it."""

import pytest
import torch
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

from quantplug.formats.encoding import FP8_BLOCK_ENCODING, FP8_ENCODING, FP8_ROW_ENCODING, NVFP4_ENCODING
from quantplug.formats.kernels import reference
from quantplug.formats.kernels.chunks import CHUNK_ELEMENTS
from quantplug.formats.kernels.protocol import Encoded
from tests.formats.kernels.calls import pack_one
from tests.formats.weights import DTYPES, bits, heavy_tailed

SHAPE = (384, 3 * CHUNK_ELEMENTS // 1024)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4_equals_modelopt(dtype: torch.dtype) -> None:
    weight = heavy_tailed(SHAPE, dtype)
    quantized, scales, scale_2 = NVFP4QTensor.quantize(weight.float(), 16)
    encoded = Encoded(*pack_one(reference, NVFP4_ENCODING, weight, scale_2.item()))
    assert torch.equal(encoded.codes[0], quantized._quantized_data)
    assert torch.equal(bits(encoded.block_scales), bits(scales))
    values = torch.empty(1, *SHAPE)
    reference.unpack(NVFP4_ENCODING, encoded, values)
    expected = quantized.dequantize(dtype=torch.float32, scale=scales, double_scale=scale_2, block_sizes={-1: 16})
    # ModelOpt's decoder gives 0.0 for code 8 (-0.0).
    assert torch.equal(values[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_equals_modelopt(dtype: torch.dtype) -> None:
    weight = heavy_tailed(SHAPE, dtype)
    quantized, scale = FP8QTensor.quantize(weight.float())
    codes, scales = pack_one(reference, FP8_ENCODING, weight, scale.item())
    assert torch.equal(bits(codes), bits(quantized._quantized_data))
    values = torch.empty(1, *SHAPE)
    reference.unpack(FP8_ENCODING, Encoded(codes, None, scales), values)
    assert torch.equal(bits(values), bits(quantized.dequantize(dtype=torch.float32, scale=scale)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_row_equals_modelopt(dtype: torch.dtype) -> None:
    weight = heavy_tailed(SHAPE, dtype)
    quantized, scales = FP8QTensor.quantize(weight.float(), axis=0)
    encoded = Encoded(*pack_one(reference, FP8_ROW_ENCODING, weight))
    assert torch.equal(bits(encoded.codes), bits(quantized._quantized_data))
    assert torch.equal(bits(encoded.block_scales), bits(scales))
    values = torch.empty(1, *SHAPE)
    reference.unpack(FP8_ROW_ENCODING, encoded, values)
    assert torch.equal(bits(values), bits(quantized.dequantize(dtype=torch.float32, scale=scales)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_block_equals_modelopt(dtype: torch.dtype) -> None:
    weight, block_sizes = heavy_tailed(SHAPE, dtype), {-1: 128, -2: 128}
    quantized, scales = FP8QTensor.quantize(weight.float(), block_sizes=block_sizes)
    encoded = Encoded(*pack_one(reference, FP8_BLOCK_ENCODING, weight))
    assert torch.equal(bits(encoded.codes), bits(quantized._quantized_data))
    assert torch.equal(bits(encoded.block_scales), bits(scales))
    values = torch.empty(1, *SHAPE)
    reference.unpack(FP8_BLOCK_ENCODING, encoded, values)
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
