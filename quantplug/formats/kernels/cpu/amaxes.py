"""The largest magnitudes of blocks of neighbours, as numba compiles them."""

from collections.abc import Callable, Sequence
from typing import Any

from numba import njit, types
from numba.extending import intrinsic, overload

from quantplug.compiled.arguments import Array
from quantplug.compiled.compiler import OPTIONS, room_of
from quantplug.compiled.vectors import Lanes, Memory
from quantplug.formats.kernels.cpu.codes import fp32, magnitude_bits
from quantplug.formats.kernels.cpu.tiles import TILE

_AT_ONCE, _LANES = 8, 16
"""Blocks, and elements of BF16 in a vector of 256 bits."""

# A shuffle of AVX2 moves lanes within halves of 8. Of each half first the two quarters are compared, then pairs within
# quarters, then single lanes: from two vectors one is made each time, with the larger of each two.
_HALVINGS = (((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 1, 4, 5), (2, 3, 6, 7)), ((0, 2, 4, 6), (1, 3, 5, 7)))


def block_amaxes(width: int) -> Any:
    """Fills the FP32 amaxes of blocks of `width` neighbours, which is a power of two and at least 16."""
    eight_of_bf16 = _eight_of_bf16(width)

    def fill(weight: Array, amaxes: Array) -> None:
        """From bits of n * width elements, at most a tile, to as many amaxes as blocks."""

    @overload(fill, strict=False)
    def fill_of_type(weight: Any, amaxes: Any) -> Callable[..., None]:
        return fill_of_bf16 if weight.dtype == types.uint16 else fill_of_any

    def fill_of_any(weight: Array, amaxes: Array) -> None:
        _by_tree(weight, amaxes)

    def fill_of_bf16(weight: Array, amaxes: Array) -> None:
        whole = amaxes.size // _AT_ONCE * _AT_ONCE
        for block in range(0, whole, _AT_ONCE):
            eight_of_bf16(weight, amaxes, block)
        if whole < amaxes.size:
            _by_tree(weight[whole * width :], amaxes[whole:])

    return njit(**OPTIONS)(lambda weight, amaxes: fill(weight, amaxes))


_half_a_tile = room_of(TILE // 2)


@njit(**OPTIONS)
def _pairwise_max(values: Array, half: Array, count: int) -> None:
    """The larger of each two neighbours."""
    for i in range(count):
        half[i] = max(values[2 * i], values[2 * i + 1])


@njit(**OPTIONS)
def _by_tree(weight: Array, amaxes: Array) -> None:
    """As `block_amaxes`, of any type. As a tree: a loop over each block would not become vector instructions."""
    longer, shorter = _half_a_tile(weight.dtype), _half_a_tile(weight.dtype)
    count = weight.size // 2
    for i in range(count):
        longer[i] = max(magnitude_bits(weight[2 * i]), magnitude_bits(weight[2 * i + 1]))
    while count > amaxes.size:
        count //= 2
        _pairwise_max(longer, shorter, count)
        longer, shorter = shorter, longer
    for i in range(amaxes.size):
        amaxes[i] = fp32(longer[i])


def _eight_of_bf16(width: int) -> Any:
    """For compiled code: the amaxes of eight blocks at once, the first of which has a number."""

    @intrinsic
    def eight(typing_context: Any, weight: Any, amaxes: Any, block: Any) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            elements = Memory.of(context, builder, signature.args[0], arguments[0])
            found = Memory.of(context, builder, signature.args[1], arguments[1])
            first = builder.mul(arguments[2], arguments[2].type(width))

            def largest_of(block: int) -> Lanes:
                """The block's magnitudes, the largest of each 16th, in one vector."""
                steps = range(block * width, (block + 1) * width, _LANES)
                vectors = [elements.lanes(elements.at(first, step), _LANES) & 0x7FFF for step in steps]
                largest = vectors[0]
                for vector in vectors[1:]:
                    largest = largest.max(vector)
                return largest

            vectors = [largest_of(block) for block in range(_AT_ONCE)]
            for lower, upper in _HALVINGS:
                vectors = [
                    _larger_of_two(*pair, lower, upper) for pair in zip(vectors[::2], vectors[1::2], strict=True)
                ]
            (both,) = vectors
            bits = both.taken(both, range(_AT_ONCE)).max(both.taken(both, range(_AT_ONCE, _LANES)))
            # BF16 is the upper half of FP32.
            found.write(bits.widened(32) << 16, found.at(arguments[2]))
            return context.get_dummy_value()

        return types.void(weight, amaxes, types.intp), generate

    return eight


def _larger_of_two(first: Lanes, second: Lanes, lower: Sequence[int], upper: Sequence[int]) -> Lanes:
    """Of each half of two vectors the larger of the lower and the upper lanes, the first's before the second's."""

    def taken(lanes: Sequence[int]) -> Lanes:
        of_both = [half + vector + lane for half in (0, _LANES // 2) for vector in (0, _LANES) for lane in lanes]
        return first.taken(second, of_both)

    return taken(lower).max(taken(upper))
