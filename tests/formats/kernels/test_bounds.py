"""The bounds by which BF16 is coded as E2M1 and E4M3 are those of the division: under every divisor, by NumPy's own.

A power of two in a divisor changes nothing but the exponents of its bounds, as long as none is a subnormal. So those
between 1 and 2 are enough, which are 2^23.
"""

from types import ModuleType

import numpy as np
import pytest
import torch

from quantplug.formats.kernels.cpu.bf16 import e2m1, e4m3

_DIVISORS, _AT_ONCE, _BINADE = 1 << 23, 1 << 18, 1 << 7


def values(bits: np.ndarray) -> np.ndarray:
    """FP32 values of BF16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


# The middles between values of E2M1; a tie goes to the even code, so that two are reached and the others passed. What
# is compared with a bound lies `behind` it, in bits, by those of the least value whose quotient has the next code.
@pytest.mark.parametrize(
    ("bound", "behind", "middles", "reached"),
    [
        (0, 1, [0.25], np.greater),
        (1, 1, [0.75], np.greater_equal),
        (2, _BINADE, [1.25, 2.5, 5.0], np.greater),
        (3, _BINADE, [1.75, 3.5], np.greater_equal),
        (4, 0, [5.0], np.greater),
    ],
)
def test_behind_a_bound_is_the_least_value_whose_quotient_has_the_next_code(
    bound: int, behind: int, middles: list[float], reached: np.ufunc
) -> None:
    for start in range(0, _DIVISORS, _AT_ONCE):
        divisors = (np.arange(_DIVISORS + start, _DIVISORS + start + _AT_ONCE) * 2.0**-23).astype(np.float32)
        bounds = np.empty((_AT_ONCE, 5, 8), np.uint32)
        e2m1.bounds_of_scales(divisors, bounds)
        lanes = bounds[:, bound].view(np.uint16)
        assert (lanes == lanes[:, :1]).all()
        found = lanes[:, 0].astype(np.int64)
        for doubled, middle in enumerate(middles):
            assert_reached(found + behind + _BINADE * doubled, divisors, middle, reached)


def test_behind_each_bound_of_e4m3_is_the_least_value_whose_quotient_has_the_next_code() -> None:
    # A binade of codes from that of 2^-5 on, which begins where the quotient is nearer to it than to the one before.
    # E4M3's even codes have an even mantissa: every other tie is reached.
    middles = [2.0**-5 * (1 - 2.0**-5), *(2.0**-5 * (1 + (2 * code - 1) / 16) for code in range(1, 8))]
    step = _AT_ONCE >> 2
    for start in range(0, _DIVISORS, step):
        divisors = (np.arange(_DIVISORS + start, _DIVISORS + start + step) * 2.0**-23).astype(np.float32)
        bounds = np.empty((step, 18, 8), np.uint32)
        assert e4m3.bounds_of_scales(divisors, bounds) == (0, step - 1)
        halves, single = bounds[:, :11].view(np.uint16), bounds[:, 11:].view(np.uint8)
        assert (halves == halves[..., :1]).all()
        assert (single == single[..., :1]).all()
        counted_from, most, infinite, *before_small = halves[..., 0].astype(np.int64).T
        assert (counted_from + infinite == 0x7F80).all()
        of_codes = [np.zeros(step, np.int64), *(single[..., 0].astype(np.int64) + 1).T]
        for code, (behind, middle) in enumerate(zip(of_codes, middles, strict=True)):
            reached = np.greater if code % 2 else np.greater_equal
            assert_reached(counted_from + _BINADE + behind, divisors, middle, reached)
        for code, before in enumerate(before_small, start=1):
            reached = np.greater if code % 2 else np.greater_equal
            assert_reached(before + 1, divisors, (code - 0.5) * 2.0**-9, reached)
        # The largest code is 448's, and begins in the middle between it and 416.
        assert_reached(counted_from + most, divisors, 432.0, np.greater_equal)


def assert_reached(bits: np.ndarray, divisors: np.ndarray, middle: float, reached: np.ufunc) -> None:
    """By the quotients of these bits, and not by those of the next smaller ones."""
    assert reached(values(bits) / divisors, np.float32(middle)).all()
    assert not reached(values(bits - 1) / divisors, np.float32(middle)).any()


@pytest.mark.parametrize(("code", "most"), [(e2m1, 2.0**16), (e4m3, 2.0**100)])
@pytest.mark.parametrize("scale_2", [1.0, 2.0**-30, 2.0**-94, 2.0**-120, 2.0**10, 2.0**30, 2.0**96, float("inf")])
def test_usual_scales_are_the_bytes_between_two_and_no_others(code: ModuleType, most: float, scale_2: float) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    divisors = values * np.float32(scale_2)
    first, last = code.bounds_of_scales(divisors, np.empty((256, 18, 8), np.uint32))
    usual = (divisors >= 2.0**-100) & (divisors <= most)
    assert [number for number in range(256) if first <= number <= last] == np.flatnonzero(usual).tolist()
