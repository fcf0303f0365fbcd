"""The bounds by which BF16 is coded as E2M1 are those of the division: under every divisor, by NumPy's own.

A power of two in a divisor changes nothing but the exponents of its bounds, as long as none is a subnormal. So those
between 1 and 2 are enough, which are 2^23.
"""

import numpy as np
import pytest

from quantplug.formats.kernels.cpu.e2m1_bounds import e2m1_bounds

_DIVISORS, _AT_ONCE, _BINADE = 1 << 23, 1 << 20, 1 << 7


def values(bits: np.ndarray) -> np.ndarray:
    """FP32 values of BF16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


# The middles between values of E2M1; a tie goes to the even code, so that two are reached and the others passed.
@pytest.mark.parametrize(
    ("row", "middles", "reached"),
    [
        (0, [0.25], np.greater),
        (1, [0.75], np.greater_equal),
        (2, [1.25, 2.5, 5.0], np.greater),
        (3, [1.75, 3.5], np.greater_equal),
    ],
)
def test_a_bound_is_the_least_value_whose_quotient_has_the_next_code(
    row: int, middles: list[float], reached: np.ufunc
) -> None:
    for start in range(0, _DIVISORS, _AT_ONCE):
        divisors = (np.arange(_DIVISORS + start, _DIVISORS + start + _AT_ONCE) * 2.0**-23).astype(np.float32)
        bounds = np.empty((4, _AT_ONCE), np.int16)
        e2m1_bounds(divisors, bounds)
        for doubled, middle in enumerate(middles):
            bits = bounds[row] + _BINADE * doubled
            assert reached(values(bits) / divisors, np.float32(middle)).all()
            assert not reached(values(bits - 1) / divisors, np.float32(middle)).any()
