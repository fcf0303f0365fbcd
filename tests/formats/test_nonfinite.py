import pytest
import torch

from quantplug.formats import first_nonfinite
from tests.formats.weights import DTYPES

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 48), (1000, 300), (7,), (2, 3, 4)])
def test_finite_weights_have_no_reason(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert first_nonfinite(torch.full(shape, torch.finfo(dtype).min, dtype=dtype)) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([NAN], "1 NaN; first at [2, 17]"),
        ([-INF], "1 Inf; first at [2, 17]"),
        ([INF, NAN, NAN, NAN], "3 NaN, 1 Inf; first at [2, 17]"),
    ],
)
def test_reason_counts_and_gives_the_first_index(values: list[float], reason: str, dtype: torch.dtype) -> None:
    weight = torch.ones(5, 48, dtype=dtype)
    weight[2, 17 : 17 + len(values)] = torch.tensor(values, dtype=dtype)
    assert first_nonfinite(weight) == reason


def test_a_nan_in_the_last_chunk_is_found() -> None:
    weight = torch.zeros(1000, 300)
    weight[999, 299] = NAN
    assert first_nonfinite(weight) == "1 NaN; first at [999, 299]"


def test_strided_views_are_indexed_as_seen() -> None:
    weight = torch.zeros(48, 5)
    weight[17, 2] = NAN
    assert first_nonfinite(weight.t()) == "1 NaN; first at [2, 17]"


def test_float64_beyond_fp32_counts_as_inf() -> None:
    assert first_nonfinite(torch.tensor([[1.0, 1e300]], dtype=torch.float64)) == "1 Inf; first at [0, 1]"
