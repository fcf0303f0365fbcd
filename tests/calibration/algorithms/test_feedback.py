"""Feedback of errors, held against least squares solved anew for every column."""

import pytest
import torch

from quantplug.calibration.algorithms.feedback import inverse_factors, rounded
from quantplug.formats import NVFP4
from quantplug.formats.constants import NVFP4_MAX

CODES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
CODES = torch.cat((CODES, -CODES))


def correlated(count: int, columns: int) -> torch.Tensor:
    """Second moments FP64 [count, columns, columns] of few rows, so that they are of low rank."""
    generator = torch.Generator().manual_seed(columns)
    rows = torch.randn(count, 40, columns, generator=generator).double()
    mix = torch.randn(columns, columns, generator=generator).double()
    rows = rows @ mix * torch.linspace(0.05, 4, columns).double()
    return rows.mT @ rows / 40


def test_each_column_is_rounded_from_where_least_squares_leaves_it() -> None:
    moments, weights = correlated(2, 64), torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2)).double()
    amaxes = weights.abs().amax((1, 2)).float()
    own = moments.diagonal(dim1=1, dim2=2)
    damped = moments + torch.diag_embed(0.01 * own + 1e-6 * own.mean(1, keepdim=True))
    factors, has_factors = inverse_factors(moments.clone(), 0.01)
    assert has_factors.all()

    values, scales = rounded(weights.clone(), factors, amaxes, 32)

    for hessian, weight, value, scale, amax in zip(damped, weights, values, scales, amaxes, strict=True):
        steps = scale.double().repeat_interleave(16, 1) * (amax / NVFP4_MAX).double()
        for column in range(64):
            # The best that all later columns can do about the errors so far: the minimum of e H e^T over them.
            known, left = slice(0, column), slice(column, 64)
            error = value[:, known] - weight[:, known]
            moved = weight[:, left] - error @ torch.linalg.solve(hessian[left, left], hessian[known, left].T).T
            distances = (moved[:, :1] / steps[:, column, None] - CODES).abs()
            chosen = (value[:, column, None] / steps[:, column, None] - CODES).abs()
            assert chosen.amin(1).max() < 1e-6
            taken = distances.gather(1, chosen.argmin(1)[:, None])[:, 0]
            torch.testing.assert_close(taken, distances.amin(1), rtol=0, atol=1e-6)


def test_it_loses_less_of_the_outputs_than_rounding_alone() -> None:
    moments, weights = correlated(3, 96), torch.randn(3, 24, 96, generator=torch.Generator().manual_seed(3)).double()
    amaxes = weights.abs().amax((1, 2)).float()
    factors, _ = inverse_factors(moments.clone(), 0.01)
    values, _ = rounded(weights.clone(), factors, amaxes, 128)
    by_max = torch.stack(
        [NVFP4.unpack(NVFP4.pack(weight.float(), amax)) for weight, amax in zip(weights, amaxes, strict=True)]
    )

    def loss(made: torch.Tensor) -> torch.Tensor:
        error = made.double() - weights
        return (error @ moments * error).sum((1, 2))

    assert torch.all(loss(values) < 0.5 * loss(by_max))


@pytest.mark.parametrize("block", [16, 48, 128])
def test_blocks_of_columns_change_nothing(block: int) -> None:
    moments, weights = correlated(2, 96), torch.randn(2, 7, 96, generator=torch.Generator().manual_seed(4)).double()
    factors, _ = inverse_factors(moments, 0.01)
    amaxes = weights.abs().amax((1, 2)).float()
    expected, scales = rounded(weights.clone(), factors, amaxes, 96)
    values, found = rounded(weights.clone(), factors, amaxes, block)
    assert torch.equal(values, expected)
    assert torch.equal(found.view(torch.uint8), scales.view(torch.uint8))


def test_dead_channels_and_inputs_of_nothing_are_rounded_as_they_are() -> None:
    moments = correlated(2, 32)
    moments[0, 5], moments[0, :, 5] = 0, 0
    moments[1] = 0
    weights = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(6)).double()
    factors, has_factors = inverse_factors(moments, 0.01)
    assert has_factors.all()
    values, _ = rounded(weights.clone(), factors, weights.abs().amax((1, 2)).float(), 16)
    assert values.isfinite().all()
    assert (values[1] - weights[1]).abs().max() < 0.5
    assert (values[0, :, 5] - weights[0, :, 5]).abs().max() < 0.5


def test_what_has_no_inverse_is_told() -> None:
    moments = -torch.eye(16).double().repeat(2, 1, 1)
    moments[1] *= -1
    moments[0, 0, 0] = 40  # So that the mean is above 0, and what is below is not made up for.
    _, has_factors = inverse_factors(moments, 0.01)
    assert has_factors.tolist() == [False, True]
