"""The decoder against torch's own cast, torchao's and transformers', bit for bit."""

import pytest
import torch
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quantplug.verify.numbers import decode


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32)


def test_e2m1_values_are_those_of_the_specification() -> None:
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    expected = torch.tensor([*magnitudes, *(-value for value in magnitudes)])
    assert torch.equal(bits(decode.E2M1_VALUES), bits(expected))


def test_e4m3_equals_torchs_cast_on_every_byte() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float()
    nan = expected.isnan()
    assert torch.equal(decode.decode_e4m3(codes).isnan(), nan)
    assert torch.equal(bits(decode.decode_e4m3(codes)[~nan]), bits(expected[~nan]))


def test_the_low_nibble_is_the_even_column() -> None:
    assert decode.decode_e2m1_pairs(torch.tensor([[0x21, 0xF7]], dtype=torch.uint8)).tolist() == [[0.5, 1.0, 6.0, -6.0]]


@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (7, 48), (96, 160)])
@pytest.mark.parametrize("tensor_scale", [1.0, 3.1e-5, 0.7])
def test_nvfp4_equals_torchao(rows: int, columns: int, tensor_scale: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 0x7F, (rows, columns // 16), dtype=torch.uint8, generator=generator)
    scale = torch.tensor(tensor_scale)
    oracle = NVFP4Tensor(packed, scales.view(torch.float8_e4m3fn), 16, torch.float32, per_tensor_scale=scale)
    assert torch.equal(bits(decode.decode_nvfp4(packed, scales, scale)), bits(oracle.dequantize(torch.float32)))


def test_mxfp4_equals_transformers() -> None:
    """Which writes the matrix [in, out]; every code and every scale that FP32 can hold times 6."""
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (1, 96, 5, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 253, (1, 96, 5), dtype=torch.uint8, generator=generator)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0].T
    assert torch.equal(bits(decode.decode_mxfp4(blocks[0], scales[0])), bits(expected))


def test_mxfp4_scale_of_nan() -> None:
    blocks = torch.full((1, 2, 16), 0x22, dtype=torch.uint8)
    decoded = decode.decode_mxfp4(blocks, torch.tensor([[127, 255]], dtype=torch.uint8))
    assert decoded[0, :32].tolist() == [1.0] * 32
    assert decoded[0, 32:].isnan().all()


def test_spread_blocks_cuts_the_edge_and_starts_inside_a_block() -> None:
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    whole = scales.repeat_interleave(4, dim=0).repeat_interleave(4, dim=1)[:7, :6]
    assert torch.equal(decode.spread_blocks(scales, 0, 7, 6, (4, 4)), whole)
    assert torch.equal(decode.spread_blocks(scales, 3, 2, 6, (4, 4)), whole[3:5])
