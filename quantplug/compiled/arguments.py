"""What a call of a loop hands over: an array is its address and shape, a number itself; all in words of 64 bits."""

import ctypes
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
Argument = Array | float


class ArgumentKind(NamedTuple):
    """What a loop is compiled for.

    Attributes:
        dtype: NumPy's character for the type of the elements, or of the number.
        dims: Of an array; 0 for a number.
    """

    dtype: str
    dims: int


FLOAT, INTEGER = ArgumentKind("d", 0), ArgumentKind("q", 0)


def as_words(arguments: Sequence[Argument]) -> tuple[tuple[ArgumentKind, ...], list[int]]:
    """Kinds of the arguments, and their words one after another; arrays must outlive the call.

    Args:
        arguments: Arrays that are aligned and in C's order, integers of 64 bits or fewer, and floats.
    """
    kinds, words = [], []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            # The machine code knows no strides: it would read and write beside such an array.
            assert argument.flags.c_contiguous, "an array of a loop has strides"
            kinds.append(ArgumentKind(argument.dtype.char, argument.ndim))
            words.append(_address(argument))
            words.extend(argument.shape)
        elif isinstance(argument, float):
            kinds.append(FLOAT)
            words.append(_float_bits(argument))
        else:
            kinds.append(INTEGER)
            words.append(argument)
    return tuple(kinds), words


def _address(array: Array) -> int:
    # NumPy describes an array in a dictionary to tell its address, and ctypes asks for its buffer alone, in a third of
    # the time: it takes none that is read-only or empty.
    if array.flags.writeable and array.size:
        return ctypes.addressof(ctypes.c_char.from_buffer(array.data))
    return int(array.__array_interface__["data"][0])


def _float_bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
