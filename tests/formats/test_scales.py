import pytest
import torch

from quantplug.formats.scales import scale_from_amax, tensor_scale, weight_amax
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


@pytest.mark.parametrize("amax", [torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([[2.0]], dtype=torch.bfloat16)])
def test_given_amax_of_one_element_becomes_an_fp32_scalar(amax: torch.Tensor) -> None:
    scale = tensor_scale(torch.ones(2, 3), amax, 4.0)
    assert (scale.dtype, scale.shape, scale.item()) == (torch.float32, (), 0.5)
