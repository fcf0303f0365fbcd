"""MXFP8 and MXFP4: powers of two for blocks of 32, as ModelOpt, torchao and transformers make and read them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quantplug.formats import MXFP4, MXFP8, BlockFormat
from quantplug.formats.constants import E2M1_BOUNDS
from tests.formats.weights import DTYPES, bits, heavy_tailed, weights

LARGEST = {"mxfp8": 448.0, "mxfp4": 6.0}
TORCHAO = {"mxfp8": torch.float8_e4m3fn, "mxfp4": torch.float4_e2m1fn_x2}

both = pytest.mark.parametrize("packing", [MXFP8, MXFP4], ids=lambda packing: packing.name)


def exponents(amaxes: torch.Tensor, largest: float) -> np.ndarray:
    """The least e of at least -127 with amax <= largest * 2^e, plus 127; in FP64, which holds all of these exactly."""
    powers = np.ldexp(largest, np.arange(-127, 128))
    return np.searchsorted(powers, amaxes.double().numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp8_has_modelopts_bytes(dtype: torch.dtype) -> None:
    weight = heavy_tailed((96, 320), dtype)
    weight[3, 32:96] = 0
    theirs, scales = MXFP8QTensor.quantize(weight.float())
    packed = MXFP8.pack(weight).tensors
    assert torch.equal(packed["weight_scale"], scales)
    assert torch.equal(bits(packed["weight"]), bits(theirs._quantized_data))
    assert torch.equal(MXFP8.unpack(MXFP8.pack(weight)), theirs.dequantize(torch.float32, scale=scales))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_has_modelopts_scales_and_but_for_ties_its_codes(dtype: torch.dtype) -> None:
    """A tie it rounds down; here, as in every other format and in [MX] 6.3, it goes to the even code."""
    weight = heavy_tailed((96, 320), dtype)
    weight[3, 32:96] = 0
    theirs, scales = MXFP4QTensor.quantize(weight.float(), 32)
    packed = MXFP4.pack(weight).tensors
    assert torch.equal(packed["weight_scale"].flatten(), scales.flatten())
    values = theirs.dequantize(torch.float32, scale=scales, block_sizes={-1: 32})
    scale = torch.exp2(scales.view(96, 10).float() - 127).repeat_interleave(32, 1)
    is_tie = torch.isin((weight.float() / scale).abs(), torch.tensor(E2M1_BOUNDS))
    assert dtype is torch.float32 or is_tie.any()
    assert torch.equal(MXFP4.unpack(MXFP4.pack(weight))[~is_tie], values[~is_tie])


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_torchao_makes_and_reads_the_same(packing: BlockFormat, dtype: torch.dtype) -> None:
    """By its rule RCEIL; blocks of zeros, to which it gives a code of -0 for a value of -0, have none here."""
    weight = heavy_tailed((96, 320), dtype)
    weight[3, 32:96] = 0
    scales, codes = to_mx(weight, TORCHAO[packing.name], 32, ScaleCalculationMode.RCEIL)
    packed = packing.pack(weight)
    assert torch.equal(packed.tensors["weight_scale"], scales.view(torch.uint8))
    assert torch.equal(bits(packed.tensors["weight"]), bits(codes))
    values = to_dtype(codes, scales, TORCHAO[packing.name], 32, torch.float32)
    assert torch.equal(packing.unpack(packed), values)


def test_transformers_reads_mxfp4_as_gpt_oss_has_it() -> None:
    weight = heavy_tailed((64, 96), torch.bfloat16)
    packed = MXFP4.pack(weight)
    blocks, scales = packed.tensors["weight"].view(1, 64, 3, 16), packed.tensors["weight_scale"][None]
    assert torch.equal(convert_moe_packed_tensors(blocks, scales)[0].mT.float(), MXFP4.unpack(packed))


@both
@given(weight=weights(in_features=(32, 96)))
def test_any_weight_is_within_half_a_step_and_nothing_saturates(packing: BlockFormat, weight: torch.Tensor) -> None:
    # Half of it: what is rounded up to 2^128, as the last eighth below it may be, is Inf to every reader.
    weight = weight / 2
    packed = packing.pack(weight)
    amaxes = weight.float().abs().unflatten(1, (-1, 32)).amax(2)
    scales = packed.tensors["weight_scale"]
    assert np.array_equal(scales.numpy(), exponents(amaxes, LARGEST[packing.name]))
    values = packing.unpack(packed).double().unflatten(1, (-1, 32))
    scale = torch.exp2(scales.double() - 127)[..., None]
    quotients = weight.double().unflatten(1, (-1, 32)) / scale
    assert (quotients.abs() <= LARGEST[packing.name]).all()
    # Codes have 1 or 3 bits of mantissa, and below the smallest normal code, 1 or 2^-6, steps of 0.5 or 2^-9.
    relative, least = {"mxfp4": (2.0**-2, 2.0**-2), "mxfp8": (2.0**-4, 2.0**-10)}[packing.name]
    assert ((values / scale - quotients).abs() <= (quotients.abs() * relative).clamp(min=least)).all()


@both
def test_the_exponent_of_an_amax_on_below_and_above_every_border(packing: BlockFormat) -> None:
    """FP32 beside each of them, where a logarithm would be rounded to the border."""
    largest = LARGEST[packing.name]
    borders = torch.tensor(largest) * torch.exp2(torch.arange(-127.0, 120))
    amaxes = torch.cat([borders, borders.nextafter(torch.tensor(0.0)), borders.nextafter(torch.tensor(torch.inf))])
    weight = torch.zeros(len(amaxes), 32)
    weight[:, 7] = -amaxes
    packed = packing.pack(weight).tensors
    assert np.array_equal(packed["weight_scale"].flatten().numpy(), exponents(amaxes, largest))


@both
def test_the_ends_of_fp32(packing: BlockFormat) -> None:
    weight = torch.zeros(5, 32)
    weight[:, 0] = torch.tensor([0.0, -0.0, 2.0**-149, 1.75 * 2.0**127 - 2.0**104, -(2.0**-126)])
    packed = packing.pack(weight)
    highest = {"mxfp8": 246, "mxfp4": 253}[packing.name]
    assert packed.tensors["weight_scale"].flatten().tolist() == [0, 0, 0, highest, 0]
    values = packing.unpack(packed)
    assert values.isfinite().all()
    assert not values[:3].any()
    assert values[3, 0] == pytest.approx(1.75 * 2.0**127, rel=2**-2)


def test_literal_bytes() -> None:
    weight = torch.zeros(2, 64)
    weight[0, :4] = torch.tensor([12.0, -1.0, 0.6, 6.1])
    weight[1, 32:35] = torch.tensor([3.0, -0.3, 0.25])
    packed = MXFP4.pack(weight).tensors
    assert packed["weight_scale"].tolist() == [[128, 0], [0, 126]]
    # 12 = 6 * 2, -1 = -0.5 * 2, 0.6 is nearer to 0.5 * 2 than to 0, 6.1 to 3 * 2.
    assert packed["weight"][0, :3].tolist() == [0x97, 0x51, 0x00]
    assert packed["weight"][1, 16:19].tolist() == [0x97, 0x01, 0x00]
    packed = MXFP8.pack(weight).tensors
    assert packed["weight_scale"].tolist() == [[122, 0], [0, 120]]
    assert packed["weight"][0, :2].view(torch.uint8).tolist() == [0x7C, 0xE0]


@both
def test_a_block_knows_nothing_of_the_others(packing: BlockFormat) -> None:
    assert packing.cut_steps == (1, 32)
    weight = heavy_tailed((12, 96), torch.bfloat16)
    whole = packing.pack(weight, torch.tensor(1e9)).tensors
    for axis, step in ((0, 5), (1, 32)):
        parts = [packing.pack(part).tensors for part in weight.split(step, dim=axis)]
        for suffix, tensor in whole.items():
            made = torch.cat([part[suffix].view(torch.uint8) for part in parts], dim=axis)
            assert torch.equal(bits(made), bits(tensor))


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_what_is_packed_packing_again_changes_no_value(packing: BlockFormat, dtype: torch.dtype) -> None:
    """Not always the bytes: codes of up to 3 are twice as large under half the scale."""
    weight = heavy_tailed((24, 128), dtype)
    values = packing.unpack(packing.pack(weight))
    assert torch.equal(packing.unpack(packing.pack(values.to(torch.bfloat16))), values)
