import pytest
import torch

from quantplug.formats.scale_types import E4M3_SCALE, scale_from_amax
from quantplug.formats.scales import weight_amax
from tests.formats.weights import DTYPES, heavy_tailed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 48), (700, 900)])
def test_weight_amax_is_the_exact_maximum_in_fp32(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = heavy_tailed(shape, dtype)
    weight[-1, -1] = -torch.finfo(dtype).max
    amax = weight_amax(weight)
    assert (amax.dtype, amax.shape) == (torch.float32, ())
    assert amax.item() == torch.finfo(dtype).max


def test_weight_amax_shows_nan() -> None:
    assert weight_amax(torch.tensor([[float("nan"), 1.0], [2.0, 3.0]])).isnan()


def test_scale_is_elementwise_finite_and_positive() -> None:
    amax = torch.tensor([0.0, -0.0, 2.0**-149, 448.0, 3.0, torch.finfo(torch.float32).max])
    expected = [1.0, 1.0, 2.0**-126, 1.0, (torch.tensor(3.0) / 448).item(), (amax[-1] / 448).item()]
    assert scale_from_amax(amax, 448.0).tolist() == expected


def test_e4m3_scales_are_finite_and_positive_where_e4m3_would_make_0_or_nan_of_them() -> None:
    amaxes = torch.tensor([0.0, 2.0**-149, 1e-9, 6.0, 6 * 448.0, 1e30])
    scales = E4M3_SCALE.from_amax(amaxes, torch.tensor(6.0))
    # The second one underflows in FP32, and so is as that of a block of zeros.
    assert scales.float().tolist() == [1.0, 1.0, 2.0**-9, 1.0, 448.0, 448.0]
