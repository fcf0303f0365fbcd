"""Small loops, imported where one has to be compiled."""

from typing import Any

from numba import njit

from quantplug.compiled.compiler import OPTIONS


@njit(**OPTIONS)  # type: ignore[misc]
def scaled(values: Any, factor: Any, offset: Any, out: Any) -> None:
    for i in range(values.size):
        out[i] = values[i] * factor + offset


@njit(**OPTIONS)  # type: ignore[misc]
def turned(values: Any, out: Any) -> None:
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            out[j, i] = values[i, j]


@njit(**OPTIONS)  # type: ignore[misc]
def every(values: Any, step: Any, out: Any) -> None:
    """A step of 0 is an error."""
    for i in range(0, values.size, step):
        out[i] = values[i]
