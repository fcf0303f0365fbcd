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
from quantplug.checkpoint.torch_dist.pickles import Made
from quantplug.checkpoint.torch_dist.roots import COMMON_FILE, COMMON_OBJECT
from quantplug.checkpoint.torch_dist.saved import Span, UnusableSaveError, read_saved
from quantplug.errors import Offender

_DEEPEST = 4

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
"""What can be asked of it without knowing a class."""


@dataclass(frozen=True)
class CommonState:
    """What a trainer noted.

    Attributes:
        arguments: Megatron-LM's arguments by name, such as `num_layers`; empty where none are there.
        values: All else that is plain, such as `iteration` and `content_metadata`.
    """

    arguments: Mapping[str, Plain]
    values: Mapping[str, Plain]


def read_common(directory: Path, index: Index | None = None) -> CommonState:
    """Reads `common.pt`, or the object in its place where the index has one. Nothing in it runs.

    Raises:
        CheckpointError: It is absent or damaged.
    """
    kept = [extent for key, extent in index.objects.items() if key.startswith(COMMON_OBJECT)] if index else []
    if kept and not os.path.lexists(directory / COMMON_FILE):
        return _common(read_object(directory, kept[0]))
    with open_regular(directory, COMMON_FILE) as file:
        size = file.seek(0, os.SEEK_END)
    return _common(read_object(directory, Extent(COMMON_FILE, 0, size)))


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


def _common(value: Any) -> CommonState:
    # An object is kept as a list, with one for every rank that had it.
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    values = _plain(value, _DEEPEST)
    if not isinstance(values, dict):
        return CommonState({}, {})
    arguments = values.pop("args", None)
    return CommonState(arguments if isinstance(arguments, dict) else {}, values)


def _plain(value: Any, levels: int) -> Plain:
    """The plain data in a value; None for what is none, and for what lies deeper than asked for."""
    if isinstance(value, bool | int | float | str):
        return value
    if levels == 0:
        return None
    if isinstance(value, list | tuple):
        return [_plain(each, levels - 1) for each in value]
    if isinstance(value, Made):
        # A namespace has a state of its attributes; an enum is called with its value.
        if not isinstance(value.state, dict):
            return _plain(value.arguments[0], levels - 1) if len(value.arguments) == 1 else None
        value = value.state
    if isinstance(value, dict):
        return {key: _plain(each, levels - 1) for key, each in value.items() if isinstance(key, str)}
    return None
