"""Rounding with feedback of errors, as GPTQ has it (Frantar et al., arXiv 2210.17323), to NVFP4.

Of a linear with inputs x the expected squared error of an output is e H e^T, with e the error of a row of weights and
H the mean of x^T x. Columns are rounded one after another; what rounding one of them does to the outputs is made up
for, as far as may be, by the columns that are still to come. With U the upper Cholesky factor of H^-1 (H^-1 = U^T U)
that is, for column j with the error d = (w_j - q_j) / U_jj:

    w_k -= d * U_jk      for every k > j                                        (equations 2 and 3, step 3 of section 3)

and d^2 is what the rounding of column j adds to the error, so that 1 / U_jj^2 weights its square. The scale of a block
is found when its turn comes, of the weights as they are then, by the weighted search of `formats.search`.

All is computed in FP64. So another order of sums, as other kernels or layouts bring, changes a weight by 1e-16 of
itself, and the code that it is rounded to as good as never.
"""

import torch

from quantplug.calibration.inputs.importance import importance_of
from quantplug.formats import NVFP4, e2m1
from quantplug.formats.constants import NVFP4_BLOCK
from quantplug.formats.search.candidates import BY_ERROR

_LEAST_MOMENT = 1e-6
"""What every channel has of the mean moment at least."""


def inverse_factors(moments: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper Cholesky factors [n, in, in] of the inverses of FP64 second moments [n, in, in], in their place.

    Args:
        moments: Symmetric, positive semidefinite.
        damping: Share of each channel's own moment that is added to it: with few tokens none would be invertible. The
            paper adds a share of their mean, in which the others' moments drown where few channels are large.

    Returns:
        The factors, and for each whether there is one.
    """
    diagonals = moments.diagonal(dim1=-2, dim2=-1)
    means = diagonals.mean(-1, keepdim=True)
    # Of one unit, so that nothing under- or overflows; without any input all errors weigh alike.
    moments /= torch.where(means > 0, means, torch.ones_like(means))[..., None]
    # A channel that no token used has none: beside the mean it gets next to nothing, where all have none, the same.
    diagonals += torch.where(means > 0, damping * diagonals + _LEAST_MOMENT, 1.0)
    lower, first = torch.linalg.cholesky_ex(moments)
    # What has no factor is told by number, and not by an error that knows no weight: its place takes the identity's.
    lower[first != 0] = torch.eye(moments.shape[-1]).to(moments)
    upper, second = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return upper, (first == 0) & (second == 0)


def rounded(
    weights: torch.Tensor, factors: torch.Tensor, amaxes: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights rounded to NVFP4 with feedback.

    Args:
        weights: FP64 [n, out, in], written over.
        factors: FP64 [n, in, in], of `inverse_factors`.
        amaxes: FP32 [n], which scales of the wholes are made of.
        block: Columns after which feedback reaches those behind them; a multiple of 16. Changes no result.

    Returns:
        The rounded weights, FP64 [n, out, in], and their E4M3 scales [n, out, in / 16].
    """
    count, rows, columns = weights.shape
    packing = NVFP4.searched(BY_ERROR)
    scales = torch.empty(count, rows, columns // NVFP4_BLOCK, dtype=torch.float8_e4m3fn, device=weights.device)
    diagonals = factors.diagonal(dim1=-2, dim2=-1)
    importance = importance_of(diagonals.square().reciprocal(), damping=0.0)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.empty(count, rows, end - start, dtype=weights.dtype, device=weights.device)
        for first in range(start, end, NVFP4_BLOCK):
            last = first + NVFP4_BLOCK
            now = weights[:, :, first:last].float()
            packed = packing.pack_group(list(now), amaxes, importance=importance[:, first:last].contiguous())
            found = torch.stack([one.tensors["weight_scale"].view(torch.uint8) for one in packed])
            wholes = torch.stack([one.tensors["weight_scale_2"] for one in packed])
            scales.view(torch.uint8)[:, :, first // NVFP4_BLOCK] = found[:, :, 0]
            # The very FP32 product that a reader multiplies codes by.
            steps = found.view(torch.float8_e4m3fn)[:, :, 0].float() * wholes[:, None]
            for column in range(first, last):
                values = weights[:, :, column]
                nearest = e2m1.decode(e2m1.encode((values / steps).float())) * steps
                error = (values - nearest) / diagonals[:, None, column]
                errors[:, :, column - start] = error
                weights[:, :, column] = nearest.double()
                if column + 1 < end:
                    weights[:, :, column + 1 : end] -= error[..., None] * factors[:, None, column, column + 1 : end]
        if end < columns:
            weights[:, :, end:].baddbmm_(errors, factors[:, start:end, end:], alpha=-1)
    return weights, scales
