"""Sums over the rows of linears' inputs, over all ranks: of squares by channel, or of products of channels.

They are made and kept in FP64, so that another order of the rows, as another layout brings, changes them by 1e-16.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from modelopt.torch.utils.distributed import DistributedProcessGroup

from quantplug.calibration.inputs.linears import Linear
from quantplug.calibration.shared_amax import Axis
from quantplug.formats.constants import NVFP4_BLOCK
from quantplug.megatron.agreement import collective_device

_ROWS = 4096
"""Rows that are in FP64 at a time."""


@dataclass
class InputSums:
    """Of one linear.

    Attributes:
        rows: int64 [weights], on CPU.
        sums: FP64 [weights, in] of squares, [weights, in, in] of products, [weights, in / 16, 16, 16] of those in
            blocks, or [weights, k, in] of random sums; zeros where no row came by.
    """

    rows: torch.Tensor
    sums: torch.Tensor


class ChannelSums(ABC):
    """Sums of one kind over rows, of this rank's channels."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self._of = {id(linear): zeros_of(linear, self._shape(linear)) for linear in linears}

    @abstractmethod
    def _shape(self, linear: Linear) -> tuple[int, ...]:
        """Of the sums of one weight."""

    @abstractmethod
    def _over(self, part: torch.Tensor) -> torch.Tensor:
        """The sums over FP64 rows [n, in]."""

    def take(self, linear: Linear, number: int, rows: torch.Tensor) -> None:
        """Adds rows [n, in] that a weight multiplies."""
        for part in in_parts(rows):
            self.add(linear, number, part.double())

    def add(self, linear: Linear, number: int, part: torch.Tensor) -> None:
        """Adds rows that are in FP64 already, few enough for that."""
        mine = self._of[id(linear)]
        mine.rows[number] += len(part)
        mine.sums[number] += self._over(part)

    def reduced(self, linears: Sequence[Linear]) -> list[InputSums]:
        """Over all ranks that see rows of the same channels. A collective: one call an axis, whatever the model."""
        found = [self._of[id(linear)] for linear in linears]
        add_up(linears, [part for one in found for part in (one.sums, one.rows)])
        return [_once(linear, one) for linear, one in zip(linears, found, strict=True)]


class Squares(ChannelSums):
    """Sums of squares by channel, [weights, in]."""

    def _shape(self, linear: Linear) -> tuple[int, ...]:
        return (linear.columns,)

    def _over(self, part: torch.Tensor) -> torch.Tensor:
        return part.square().sum(0)


class Totals(ChannelSums):
    """Sums of the channels themselves, [weights, in]."""

    def _shape(self, linear: Linear) -> tuple[int, ...]:
        return (linear.columns,)

    def _over(self, part: torch.Tensor) -> torch.Tensor:
        return part.sum(0)


class BlockProducts(ChannelSums):
    """Sums of products of any two channels of a block of 16, [weights, in / 16, 16, 16]."""

    def _shape(self, linear: Linear) -> tuple[int, ...]:
        return (linear.columns // NVFP4_BLOCK, NVFP4_BLOCK, NVFP4_BLOCK)

    def _over(self, part: torch.Tensor) -> torch.Tensor:
        blocks = part.unflatten(-1, (-1, NVFP4_BLOCK)).transpose(0, 1)
        return blocks.mT @ blocks


class BlockProductsAndTotals:
    """Both, of the same rows."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self._products, self._totals = BlockProducts(linears), Totals(linears)

    def take(self, linear: Linear, number: int, rows: torch.Tensor) -> None:
        """Adds rows [n, in] that a weight multiplies."""
        for part in in_parts(rows):
            wide = part.double()
            self._products.add(linear, number, wide)
            self._totals.add(linear, number, wide)

    def reduced(self, linears: Sequence[Linear]) -> list[InputSums]:
        """The products, as `BlockProducts` has them. A collective: one call an axis."""
        return self._products.reduced(linears)

    def totals(self, linears: Sequence[Linear]) -> list[InputSums]:
        """The sums of channels over all ranks that see their rows. A collective: one call an axis."""
        return self._totals.reduced(linears)


class Products:
    """Sums of products of any two channels, of all ranks' channels: the Hessian of a linear's squared error, halved."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        sizes = {id(linear): linear.columns * _slices(linear) for linear in linears}
        self._of = {id(linear): zeros_of(linear, (sizes[id(linear)],) * 2) for linear in linears}

    def take(self, linear: Linear, number: int, rows: torch.Tensor) -> None:
        """Adds rows [n, in] that a weight multiplies. A collective where ranks have slices of its channels."""
        mine = self._of[id(linear)]
        mine.rows[number] += len(rows)
        for part in in_parts(rows):
            whole = whole_columns(linear, part).double()
            mine.sums[number] += whole.T @ whole

    def reduced(self, linears: Sequence[Linear]) -> list[InputSums]:
        """Over all ranks that see rows of the same linear. A collective: one call for each linear and axis."""
        found = [self._of[id(linear)] for linear in linears]
        for linear, one in zip(linears, found, strict=True):
            # One by one: a flat copy of a layer's matrices would double the largest thing that is held here.
            for part in (one.sums, one.rows):
                add_up([linear], [part], copies=1)
        return [_once(linear, one) for linear, one in zip(linears, found, strict=True)]


def whole_columns(linear: Linear, part: torch.Tensor) -> torch.Tensor:
    """[n, in of this rank] to [n, in] of all tensor parallel ranks, where they have slices of the columns."""
    group = linear.tensor_group if linear.is_row_parallel else None
    if group is None:
        return part
    device = collective_device()
    mine = part.contiguous().to(device)
    parts = [torch.empty_like(mine) for _ in range(group.world_size())]
    dist.all_gather(parts, mine, group=group.group)
    return torch.cat(parts, 1).to(part.device)


def in_parts(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows [n, in] as many at a time as are to be in FP64 at once."""
    return rows.split(_ROWS)


def add_over(group: DistributedProcessGroup | None, tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over a group; itself where there is none. A collective."""
    if group is None:
        return tensor
    there = tensor.to(collective_device(), copy=True)
    dist.all_reduce(there, group=group.group)
    return there.to(tensor.device)


def _slices(linear: Linear) -> int:
    group = linear.tensor_group if linear.is_row_parallel else None
    return 1 if group is None else int(group.world_size())


def zeros_of(linear: Linear, shape: tuple[int, ...]) -> InputSums:
    """Sums of this shape for each weight of a linear, of no rows yet."""
    count, device = len(linear.weights), linear.weights[0].weight.device
    return InputSums(
        torch.zeros(count, dtype=torch.int64), torch.zeros(count, *shape, dtype=torch.float64, device=device)
    )


def _once(linear: Linear, found: InputSums) -> InputSums:
    """Each row counted once, however many ranks have sent it."""
    return InputSums(found.rows // linear.repeats, found.sums / linear.repeats)


def add_up(linears: Sequence[Linear], parts: Sequence[torch.Tensor], copies: int = 2) -> None:
    """Adds tensors of linears, `copies` for each in order, over the ranks that see other rows, in place."""
    owners = [linear for linear in linears for _ in range(copies)]
    # In this order on every rank, so that no two wait for each other in different groups.
    for axis in Axis:
        members = [(owner, part) for owner, part in zip(owners, parts, strict=True) if axis in owner.row_axes]
        if not members or members[0][0].axes[axis].world_size() == 1:
            continue
        group = members[0][0].axes[axis].group
        # Counts are below 2^53, which FP64 holds exactly.
        bucket = torch.cat([part.to(collective_device(), torch.float64).flatten() for _, part in members])
        dist.all_reduce(bucket, group=group)
        for (_, part), summed in zip(members, bucket.split([part.numel() for _, part in members]), strict=True):
            part.copy_(summed.view(part.shape))
