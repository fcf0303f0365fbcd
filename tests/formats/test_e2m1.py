import math

import pytest
import torch
from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, f32_to_f4_unpacked, pack_uint4, unpack_uint4

from quantplug.formats import e2m1
from tests.formats.weights import bits


@pytest.mark.parametrize(
    ("value", "code"),
    [(0.0, 0), (0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6), (6.0, 7), (math.inf, 7)],
)
def test_ties_go_to_the_even_code_and_large_values_saturate(value: float, code: int) -> None:
    encoded = e2m1.encode(torch.tensor([value, -value]))
    assert encoded.tolist() == [code, code | 8 if value else 0]


@pytest.mark.parametrize(("bound", "lower"), [(0.25, 0), (0.75, 1), (1.25, 2), (1.75, 3), (2.5, 4), (3.5, 5), (5.0, 6)])
def test_one_ulp_beside_a_tie_goes_to_the_nearest(bound: float, lower: int) -> None:
    tie = torch.tensor([bound])
    below, above = torch.nextafter(tie, tie * 0), torch.nextafter(tie, tie * 2)
    assert e2m1.encode(torch.cat((below, above, -below, -above))).tolist() == [lower, lower + 1, lower + 8, lower + 9]


def test_minus_zero_is_code_0_and_a_negative_that_rounds_to_zero_is_code_8() -> None:
    assert e2m1.encode(torch.tensor([-0.0, -0.1, -(2.0**-149)])).tolist() == [0, 8, 8]


def test_encode_equals_torchao() -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 4
    assert torch.equal(e2m1.encode(values), f32_to_f4_unpacked(values))


def test_decode_equals_torchao_in_every_bit() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(bits(e2m1.decode(codes)), bits(f4_unpacked_to_f32(codes)))


def test_pairs_equal_torchao_and_the_even_column_is_the_low_nibble() -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    codes = e2m1.unpack_pairs(packed)
    assert torch.equal(codes, unpack_uint4(packed))
    assert torch.equal(e2m1.pack_pairs(codes), pack_uint4(codes))
    assert e2m1.pack_pairs(torch.tensor([[0x3, 0xA]], dtype=torch.uint8)).tolist() == [[0xA3]]
