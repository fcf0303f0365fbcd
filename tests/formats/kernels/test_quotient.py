"""The quotient of 16-bit values by a reciprocal and one correction is the rounded quotient: all of them are tried.

Without overflow and underflow a power of two in either changes nothing but the exponent of each step. So significands
between 1 and 2 are enough: those of BF16, of 8 bits, and of FP16, of 11, under all 2^23 that a divisor can have.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numba import njit

from tests.formats.kernels.fused import fused, fused_multiply_add

_DIVISORS = 1 << 23


@njit(nogil=True, error_model="numpy")
def wrong(mantissa_bits, start, stop):  # type: ignore[no-untyped-def]  # pragma: no cover
    """How many quotients of all significands by the divisors 1 + i / 2^23, from i = start on, are rounded otherwise."""
    count = 0
    for i in range(start, stop):
        divisor = np.float32(_DIVISORS + i) * np.float32(2.0**-23)
        reciprocal = np.float32(np.float32(1) / divisor)
        of_divisor = 0
        for k in range(1 << mantissa_bits):
            value = np.float32((1 << mantissa_bits) + k) * np.float32(1 / (1 << mantissa_bits))
            product = np.float32(value * reciprocal)
            quotient = fused(fused(product, -divisor, value), reciprocal, product)
            of_divisor += np.int32(quotient != np.float32(value / divisor))
        count += of_divisor
    return count


@pytest.mark.parametrize(("mantissa_bits", "every"), [(7, 1), (10, 8)])
def test_every_quotient_is_rounded_as_ieee_says(mantissa_bits: int, every: int) -> None:
    """Of FP16 one divisor in eight, in runs: all of them, which take a minute and a half, gave 0 too."""
    step = _DIVISORS // 64
    parts = [(start, start + step // every) for start in range(0, _DIVISORS, step)]
    with ThreadPoolExecutor(2) as threads:
        assert sum(threads.map(lambda part: wrong(mantissa_bits, *part), parts)) == 0


def test_the_product_alone_is_not() -> None:
    values = np.arange(128, 256).astype(np.float32)
    divisors = np.float32(1) + np.arange(1000).astype(np.float32)[:, None] / np.float32(2**23)
    assert ((values * (np.float32(1) / divisors)) != values / divisors).any()


def test_the_fused_operation_rounds_once() -> None:
    a = np.float32(1 + 2.0**-12)
    assert fused_multiply_add(a, a, np.float32(-1)) == np.float32(2.0**-11 + 2.0**-24)
    assert a * a - np.float32(1) == np.float32(2.0**-11)
