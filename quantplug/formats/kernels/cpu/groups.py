"""A group of weights, packed by the loops of `loops.groups`: what a call costs is paid once, not for each weight."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from quantplug.compiled.arguments import Array
from quantplug.formats.kernels.cpu.pieces import BITS_LIKE, bits, flat, pieces_of, shared_elements
from quantplug.formats.kernels.cpu.threads import run, run_each
from quantplug.formats.kernels.cpu.tiles import TILE


class ContiguousWeights(NamedTuple):
    """That of weights of one size, each contiguous and aligned; they must outlive the call of a loop.

    Attributes:
        addresses: int64 [n].
        like: An array of the integers that their bits are.
        elements: Of one weight.
    """

    addresses: Array
    like: Array
    elements: int

    @property
    def tiles(self) -> int:
        """Of all weights; the last one of each may be a part of one."""
        return -(-self.elements // TILE) * len(self.addresses)


PackTiles = Callable[[ContiguousWeights, Sequence[Array], int, int], None]
"""Packs tiles of weights, from a first one on and before a last: all of the first weight, then all of the next. The
arrays are those of `pack_group`."""


def pack_group(pack: PackTiles, weights: Sequence[torch.Tensor], beside: Sequence[Array]) -> None:
    """Packs weights on threads.

    Args:
        beside: What goes with the weights, given or to be filled, whose first axis counts them: [n], or [n, m] with m a
            divisor of their elements.
    """
    first, addresses = weights[0], [weight.data_ptr() for weight in weights]
    if first.is_contiguous() and not any(address % first.itemsize for address in addresses):
        memory = ContiguousWeights(np.array(addresses), BITS_LIKE[first.dtype], first.numel())
        step = -(-shared_elements(first.numel() * len(weights)) // TILE)
        starts = range(0, memory.tiles, step)
        run(lambda start: pack(memory, beside, start, min(start + step, memory.tiles)), starts)
        return

    def pack_copy(piece: Array, of_piece: Sequence[Array]) -> None:
        # Kept until the loop has ended: all that the loop is given is its address.
        copy = flat(piece)
        memory = ContiguousWeights(np.array([copy.ctypes.data]), copy, copy.size)
        pack(memory, of_piece, 0, memory.tiles)

    run_each(pack_copy, _pieces(weights, beside))


def _pieces(weights: Sequence[torch.Tensor], beside: Sequence[Array]) -> Iterator[tuple[Array, list[Array]]]:
    """Pieces of weights that are no memory to be read as it is, and what goes with each."""
    for number, weight in enumerate(weights):
        of_weight, end = [array[number : number + 1] for array in beside], 0
        for piece in pieces_of(bits(weight)):
            start, end = end, end + piece.size
            yield piece, [_part(array, start, end, weight.numel()) for array in of_weight]


def _part(of_weight: Array, start: int, end: int, elements: int) -> Array:
    """What goes with some elements of a weight: of [1, m] some of m, and what there is one of a weight itself."""
    if of_weight.ndim == 1:
        return of_weight
    count = of_weight.shape[1]
    return of_weight[:, start * count // elements : end * count // elements]
