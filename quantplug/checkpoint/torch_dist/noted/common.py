"""What a trainer noted beside the tensors: its arguments, the iteration, how keys were made; as plain data alone.

Megatron-LM keeps its whole `argparse.Namespace` there, with enums and dtypes in it. What is no plain data is left out.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from quantplug.checkpoint.torch_dist.files import MOST_BYTES, damaged, open_regular
from quantplug.checkpoint.torch_dist.index import Extent, Index
from quantplug.checkpoint.torch_dist.roots import COMMON_FILE, COMMON_OBJECT
from quantplug.checkpoint.torch_dist.saved import Span, UnusableSaveError, read_saved
from quantplug.checkpoint.untrusted.pickles import Made, only_one
from quantplug.errors import Offender

_DEEPEST, _MOST_VALUES = 3, 100_000  # A trainer notes a thousand settings, some of them lists of a layer each.

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
"""What can be asked of it without knowing a class."""


def read_common(directory: Path, index: Index | None = None) -> Mapping[str, Plain]:
    """What a trainer noted: the `args` of Megatron-LM by name, such as `num_layers`; empty where none are there.

    They are in `common.pt`, or in the object in its place where the index has one. Nothing in it runs.

    Raises:
        CheckpointError: It is absent or damaged.
    """
    kept = [extent for key, extent in index.objects.items() if key.startswith(COMMON_OBJECT)] if index else []
    if kept and not os.path.lexists(directory / COMMON_FILE):
        return _arguments(directory, kept[0])
    with open_regular(directory, COMMON_FILE) as file:
        size = file.seek(0, os.SEEK_END)
    return _arguments(directory, Extent(COMMON_FILE, 0, size))


def _arguments(directory: Path, extent: Extent) -> Mapping[str, Plain]:
    noted = only_one(read_object(directory, extent))
    try:
        arguments = _Plainly(_MOST_VALUES).of(noted.get("args"), _DEEPEST) if isinstance(noted, dict) else None
    except _EndlessError as error:
        raise damaged([Offender(str(directory / extent.file), "holds more than any trainer notes")]) from error
    return arguments if isinstance(arguments, dict) else {}


def read_object(directory: Path, extent: Extent) -> Any:
    """What the pickle of an object holds, as `read_pickle` gives it.

    Raises:
        CheckpointError: It cannot be read; names the file.
    """
    if extent.length > MOST_BYTES:
        raise damaged([Offender(str(directory / extent.file), f"has an object of {extent.length} bytes")])
    with open_regular(directory, extent.file) as file:
        try:
            return read_saved(file, Span(extent.offset, extent.offset + extent.length)).value
        except (UnusableSaveError, OSError) as error:
            raise damaged([Offender(str(directory / extent.file), str(error))]) from error


def is_endless(value: object) -> bool:
    """Whether it is a number that no setting has: so many digits are neither shown nor compared with a float."""
    return isinstance(value, int) and value.bit_length() > 64


class _EndlessError(ValueError):
    """A value that goes on and on."""


@dataclass
class _Plainly:
    """Takes the plain data out of values, as long as these end: what is shared within a pickle is walked each time.

    Attributes:
        left: How many values are still looked at.
    """

    left: int

    def of(self, value: Any, levels: int) -> Plain:
        """The plain data in a value; None for what is none, and for what lies deeper than asked for."""
        self.left -= 1
        if self.left < 0 or is_endless(value):
            raise _EndlessError
        if isinstance(value, bool | int | float | str):
            return value
        if levels == 0:
            return None
        if isinstance(value, list | tuple):
            return [self.of(each, levels - 1) for each in value]
        if isinstance(value, Made):
            # A namespace has a state of its attributes; an enum is called with its value.
            if not isinstance(value.state, dict):
                return self.of(value.arguments[0], levels - 1) if len(value.arguments) == 1 else None
            value = value.state
        if isinstance(value, dict):
            return {key: self.of(each, levels - 1) for key, each in value.items() if isinstance(key, str)}
        return None
