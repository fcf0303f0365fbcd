"""The memory of weights and of what is made of them, in the pieces that threads work on."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch

from quantplug.compiled.arguments import Array
from quantplug.formats.kernels.cpu import machine_code as loops

_PIECE = 1 << 18
"""Elements of a piece that is copied, so that the copy stays in a core's cache; other pieces are multiples of it."""

_LEAST_PIECES = 2
"""So many `_PIECE`s are some tens of microseconds of work, beside which to start it costs little."""

_PIECES_PER_THREAD = 4
"""So that a core that other work slows does not keep the others waiting for long."""

# The integer type tells the loops which float its bits are.
# NumPy has no BF16, so a weight is passed as its bits; no element is converted before the loop that needs it.
_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.uint32}


BITS_LIKE: dict[torch.dtype, Array] = {
    floats: torch.empty(0, dtype=integers).numpy() for floats, integers in _BITS.items()
}
"""Arrays without any element, of the integers as which loops take the bits of such floats."""


def bits(weight: torch.Tensor) -> Array:
    """The weight's own memory, with its strides."""
    return weight.detach().view(bits_of(weight.dtype)).numpy()


def bits_of(dtype: torch.dtype) -> torch.dtype:
    """The integers as which loops take the bits of such floats."""
    return _BITS[dtype]


def as_bytes(tensor: torch.Tensor) -> Array:
    """The memory of codes or E4M3 scales: NumPy has no FP8 types, and the loops make their bits themselves."""
    return tensor.view(torch.uint8).numpy()


def flat(piece: Array) -> Array:
    """The piece in a row, itself or a copy."""
    return contiguous(piece).reshape(-1)


def contiguous(piece: Array) -> Array:
    """The piece itself where it is contiguous and aligned, else a copy of it, whatever its strides."""
    # Neighbours of a row lie apart, as in a transposed view, and NumPy's own copy would miss the cache at each.
    if piece.ndim != 2 or piece.strides[0] >= piece.strides[1] or not piece.flags.aligned:
        return np.require(piece, requirements=("C", "A"))
    copy = np.empty(piece.shape, piece.dtype)
    loops.copy_transposed(piece, copy)
    return copy


def pieces_of(weight: Array) -> list[Array]:
    """The weight in row-major order: flat pieces where it is contiguous, some rows each where it is not."""
    most = piece_elements(weight)
    if weight.flags.c_contiguous and most >= weight.size:
        return [weight]
    # Neither kind cuts a block: flat pieces are multiples of `_PIECE`, and a row is a whole number of blocks.
    rows = weight.reshape(-1, 1) if weight.flags.c_contiguous else weight
    step = max(most * len(rows) // rows.size, 1)
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def piece_elements(weight: Array) -> int:
    """How many elements of a weight a thread takes at once."""
    # Each piece of these is copied first, and a larger copy would not stay in the cache.
    return shared_elements(weight.size) if weight.flags.c_contiguous else _PIECE


def shared_elements(elements: int) -> int:
    """How many of all elements, which are not copied, a thread takes at once."""
    threads = torch.get_num_threads()
    if threads == 1:
        return elements
    # Starting a loop takes the interpreter's lock: few pieces a thread, however large the weight.
    return _PIECE * max(_LEAST_PIECES, elements // (_PIECE * _PIECES_PER_THREAD * threads))


def alongside(of_weight: Sequence[Array], tensor: torch.Tensor, per: int = 1) -> list[Array]:
    """The flat bytes of a tensor in the same pieces as a weight of which `per` elements share a byte."""
    row = as_bytes(tensor).reshape(-1)
    if len(of_weight) == 1:
        return [row]
    ends = accumulate((piece.size // per for piece in of_weight), initial=0)
    return [row[start:end] for start, end in pairwise(ends)]
