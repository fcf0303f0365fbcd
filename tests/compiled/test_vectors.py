"""Lanes of a vector, each operation by itself, against NumPy: of every length, also where no register is so long."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numba import njit, types
from numba.extending import intrinsic

from quantplug.compiled.compiler import OPTIONS, room_of
from quantplug.compiled.vectors import Lanes, Memory

COUNTS = (4, 16, 32)
U16, U32 = np.dtype(np.uint16), np.dtype(np.uint32)


def loop_of(make: Callable[[Lanes, Lanes], Lanes], count: int) -> Callable[[Any, Any, Any], None]:
    """Writes what is made of the first lanes of two arrays."""

    @intrinsic
    def apply(typing_context: Any, one: Any, other: Any, out: Any) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pairs = zip(signature.args, arguments, strict=True)
            first, second, target = (Memory.of(context, builder, kind, array) for kind, array in pairs)
            zero = context.get_constant(types.intp, 0)
            lanes = [memory.lanes(memory.at(zero), count) for memory in (first, second)]
            target.write(make(*lanes), target.at(zero))
            return context.get_dummy_value()

        return types.void(one, other, out), generate

    # numba sees a function that the intrinsic is a variable of, and nothing else of this module.
    return njit(**OPTIONS)(lambda one, other, out: apply(one, other, out))


def signed(numbers: np.ndarray) -> np.ndarray:
    return numbers.view(np.int16)


OPERATIONS: dict[str, tuple[Callable[[Lanes, Lanes], Lanes], Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "and": (lambda a, b: a & b, lambda a, b: a & b),
    "and a number": (lambda a, b: a & 0x7FFF, lambda a, b: a & U16.type(0x7FFF)),
    "or": (lambda a, b: a | b, lambda a, b: a | b),
    "sum, which wraps": (lambda a, b: a + b, lambda a, b: a + b),
    "difference, which wraps": (lambda a, b: a - b, lambda a, b: a - b),
    "shifts without the sign": (lambda a, b: (a >> 7) + (b << 3), lambda a, b: (a >> 7) + (b << 3)),
    "above": (lambda a, b: a.above(b), lambda a, b: np.where(a > b, a - b, 0)),
    "max": (lambda a, b: a.max(b), np.maximum),
    "min of a number": (lambda a, b: a.min(0x8001), lambda a, b: np.minimum(a, U16.type(0x8001))),
    "where more": (lambda a, b: a.where_more(b, 8), lambda a, b: np.where(a > b, 8, 0)),
    "where more, signed": (lambda a, b: a.where_more_signed(b, 1), lambda a, b: np.where(signed(a) > signed(b), 1, 0)),
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_that_of_numpy_in_each_lane(name: str, count: int) -> None:
    make, expected = OPERATIONS[name]
    loop = loop_of(make, count)

    @given(arrays(U16, (2, count)))
    @example(np.stack([np.arange(count, dtype=U16) + U16.type(0x7FFE), np.full(count, 0x8000, U16)]))
    def check(both: np.ndarray) -> None:
        out = np.empty(count, U16)
        loop(both[0], both[1], out)
        assert out.tolist() == expected(both[0], both[1]).astype(U16).tolist()

    check()


@pytest.mark.parametrize("count", COUNTS)
def test_any_lane_that_is_more_is_found(count: int) -> None:
    @intrinsic
    def any_more(typing_context: Any, one: Any, other: Any) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pairs = zip(signature.args, arguments, strict=True)
            zero = context.get_constant(types.intp, 0)
            first, second = (
                memory.lanes(memory.at(zero), count)
                for memory in (Memory.of(context, builder, kind, array) for kind, array in pairs)
            )
            return first.any_more(second)

        return types.boolean(one, other), generate

    loop = njit(**OPTIONS)(lambda one, other: any_more(one, other))

    @given(arrays(U16, count), st.lists(st.integers(0, count - 1), max_size=2), st.booleans())
    def check(one: np.ndarray, places: list[int], more: bool) -> None:
        other = one.copy()
        other[places] += U16.type(1 if more else 0xFFFF)
        assert loop(one, other) == (one > other).any()

    check()


@given(st.data())
def test_taken_lanes_are_counted_on_from_the_first_vector_to_the_second(data: st.DataObject) -> None:
    lanes = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=8))
    one, other, out = np.arange(4, dtype=U16), np.arange(4, 8, dtype=U16), np.empty(len(lanes), U16)
    loop_of(lambda a, b: a.taken(b, lanes), 4)(one, other, out)
    assert out.tolist() == lanes


def test_lanes_are_narrowed_widened_and_read_as_others() -> None:
    numbers = np.array([0x1234, 0xFFFF, 0x8000, 0x00FF], U16)
    narrow, wide, pairs = np.empty(4, np.uint8), np.empty(4, U32), np.empty(2, U32)
    loop_of(lambda a, b: a.narrowed(8), 4)(numbers, numbers, narrow)
    loop_of(lambda a, b: a.widened(32), 4)(numbers, numbers, wide)
    loop_of(lambda a, b: a.as_lanes_of(32), 4)(numbers, numbers, pairs)
    assert narrow.tolist() == [0x34, 0xFF, 0x00, 0xFF]
    assert wide.tolist() == numbers.tolist()
    assert pairs.tolist() == [0xFFFF1234, 0x00FF8000]


@pytest.mark.parametrize("count", COUNTS)
def test_memory_is_read_and_written_where_it_is_said_and_nowhere_else(count: int) -> None:
    @intrinsic
    def spread(typing_context: Any, numbers: Any, out: Any, index: Any) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source = Memory.of(context, builder, signature.args[0], arguments[0])
            target = Memory.of(context, builder, signature.args[1], arguments[1])
            lanes = source.spread(source.at(arguments[2], 1), count)
            target.write(lanes, target.at(arguments[2]))
            return context.get_dummy_value()

        return types.void(numbers, out, types.intp), generate

    numbers, out = np.arange(10, dtype=U16), np.full(count + 10, 99, U16)
    njit(**OPTIONS)(lambda numbers, out, index: spread(numbers, out, index))(numbers, out, 5)
    assert out.tolist() == [99] * 5 + [6] * count + [99] * 5


_FOUR, _TWO_BY_TWO = room_of(4), room_of(2, 2)


def test_rooms_are_apart_and_keep_what_is_written() -> None:
    @njit(**OPTIONS)
    def work(rounds: int, out: Any) -> None:
        whole, numbers, floats = _FOUR(np.uint16), _FOUR(np.uint16), _FOUR(np.float32)
        for i in range(4):
            whole[i], numbers[i], floats[i] = i, 0, i + 0.5
        # In a loop too a room is taken once.
        for _ in range(rounds):
            other = _FOUR(np.uint16)
            for i in range(4):
                other[i] = 7
                numbers[i] += other[i]
        for i in range(4):
            out[0, i], out[1, i], out[2, i], out[3, i] = whole[i], numbers[i], floats[i], floats.size

    out = np.empty((4, 4))
    work(9000, out)
    assert out.tolist() == [[0, 1, 2, 3], [7 * 9000 % 2**16] * 4, [0.5, 1.5, 2.5, 3.5], [4] * 4]


def test_a_room_of_two_dimensions_has_its_rows_one_after_another() -> None:
    @njit(**OPTIONS)
    def work(out: Any) -> None:
        room = _TWO_BY_TWO(np.float32)
        for i in range(2):
            for j in range(2):
                room[i, j] = 10 * i + j
        for i in range(2):
            for j in range(2):
                out[i, j] = room[i][j] + 100 * len(room)

    out = np.empty((2, 2), np.float32)
    work(out)
    assert out.tolist() == [[200, 201], [210, 211]]
