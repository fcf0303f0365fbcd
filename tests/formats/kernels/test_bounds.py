"""The bounds by which BF16 is coded as E2M1 are those of the division: under every divisor, by NumPy's own.

A power of two in a divisor changes nothing but the exponents of its bounds, as long as none is a subnormal. So those
between 1 and 2 are enough, which are 2^23.
"""

import numpy as np
import pytest
import torch

from quantplug.formats.kernels.cpu.e2m1_bounds import bounds_of_scales

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
        bounds_of_scales(divisors, bounds)
        lanes = bounds[:, bound].view(np.uint16)
        assert (lanes == lanes[:, :1]).all()
        found = lanes[:, 0].astype(np.int64)
        for doubled, middle in enumerate(middles):
            bits = found + behind + _BINADE * doubled
            assert reached(values(bits) / divisors, np.float32(middle)).all()
            assert not reached(values(bits - 1) / divisors, np.float32(middle)).any()


@pytest.mark.parametrize("scale_2", [1.0, 2.0**-30, 2.0**-94, 2.0**-120, 2.0**10, 2.0**30, float("inf")])
def test_usual_scales_are_the_bytes_between_two_and_no_others(scale_2: float) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    divisors = values * np.float32(scale_2)
    first, last = bounds_of_scales(divisors, np.empty((256, 5, 8), np.uint32))
    usual = (divisors >= 2.0**-100) & (divisors <= 2.0**16)
    assert [number for number in range(256) if first <= number <= last] == np.flatnonzero(usual).tolist()
