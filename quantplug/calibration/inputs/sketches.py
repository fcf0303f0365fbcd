"""Few random sums of a linear's inputs, which say how large any error of its weights is in its outputs.

Of inputs X [tokens, in] and independent standard normal numbers G [k, tokens] the sums S = G X / sqrt(k * tokens) have
E[S^T S] = X^T X / tokens. So ||D S^T||^2 is, for any D [out, in] that is chosen without a look at S, an unbiased
estimate of the mean squared norm of the outputs D x, with a relative deviation of sqrt(2 / k) at most (Johnson and
Lindenstrauss, Contemporary Mathematics 26, 1984, have the idea). Moments by channel do not know what error feedback
makes up for between channels. These do, in k numbers a channel, where all products of two channels would be as many as
there are channels.
"""

from collections.abc import Iterable, Sequence
from zlib import crc32

import torch

from quantplug.calibration.inputs.linears import Linear
from quantplug.calibration.inputs.moments import FEW_TOKENS, layer_moments
from quantplug.calibration.inputs.sums import InputSums, add_over, add_up, in_parts, zeros_of
from quantplug.calibration.shared_amax import TENSOR_AXES, Axis

SKETCH_ROWS = 32
"""Random sums of each linear: squared errors of outputs that all lie in one direction are known to a quarter."""


class Sketches:
    """Random sums of rows, [weights, `SKETCH_ROWS`, in], of this rank's channels."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self._of = {id(linear): zeros_of(linear, (SKETCH_ROWS, linear.columns)) for linear in linears}
        self._normal = {id(linear): _Normal(linear, _sees_rows_of_its_own(linear)) for linear in linears}

    def take(self, linear: Linear, number: int, rows: torch.Tensor) -> None:
        """Adds rows [n, in] that a weight multiplies."""
        mine = self._of[id(linear)]
        mine.rows[number] += len(rows)
        for part in in_parts(rows):
            mine.sums[number] += self._normal[id(linear)].numbers(SKETCH_ROWS, len(part)) @ part.double()

    def reduced(self, linears: Sequence[Linear]) -> list[InputSums]:
        """Over all ranks that see rows of the same channels. A collective: one call an axis, whatever the model."""
        found = [self._of[id(linear)] for linear in linears]
        add_up(linears, [part for one in found for part in (one.sums, one.rows)])
        # A row that comes by several times meets other numbers each time: it is the squares that are repeated.
        return [
            InputSums(one.rows // linear.repeats, one.sums / linear.repeats**0.5)
            for linear, one in zip(linears, found, strict=True)
        ]


def sketch_of(linear: Linear, found: InputSums, squares: InputSums, few_tokens: float = FEW_TOKENS) -> torch.Tensor:
    """S of each weight, FP64 [weights, `SKETCH_ROWS`, in]: of an expert's tokens and, as `moments_of`, the layer's.

    A collective over the expert and tensor parallel ranks of a linear, if it is one of routed experts.

    Args:
        linear: The linear.
        found: Its random sums over all ranks that see its rows.
        squares: Its sums of squares over them.
        few_tokens: How many of the layer's are put to an expert's own.
    """
    rows = found.rows.to(found.sums)[:, None, None]
    if not linear.is_routed:
        return found.sums / (SKETCH_ROWS * rows).sqrt()
    of_layer = layer_moments(linear, squares)
    # Every rank that has other experts or channels draws other numbers.
    alike = _Normal(linear, linear.axes.keys()).numbers(*found.sums.shape)
    if of_layer is None:
        return alike / SKETCH_ROWS**0.5
    if linear.is_row_parallel:
        beside = alike * of_layer.sqrt()
    else:
        total = add_over(linear.expert_group, rows.sum().reshape(1))
        # Each sum beside the one before it of the layer: in that of the same number the own tokens are, too.
        beside = (add_over(linear.expert_group, found.sums.sum(0)) / total.sqrt()).roll(1, 0)
    return (found.sums + few_tokens**0.5 * beside) / (SKETCH_ROWS * (rows + few_tokens)).sqrt()


class _Normal:
    """Standard normal numbers, the same in every run, and others on ranks that differ along some dimensions."""

    def __init__(self, linear: Linear, axes: Iterable[Axis]) -> None:
        places = sorted((axis.name, linear.axes[axis].rank()) for axis in axes)
        self._device = linear.weights[0].weight.device
        self._generator = torch.Generator(self._device).manual_seed(crc32(f"{linear.name} {places}".encode()))

    def numbers(self, *shape: int) -> torch.Tensor:
        """FP64, on the linear's device."""
        return torch.randn(shape, generator=self._generator, dtype=torch.float64, device=self._device)


def _sees_rows_of_its_own(linear: Linear) -> set[Axis]:
    """The dimensions whose ranks see other rows. Those that have slices of the channels of the same ones do not."""
    return {axis for axis in linear.axes if axis not in TENSOR_AXES or linear.has_parts_of_rows}
