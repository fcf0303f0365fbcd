"""One safetensors file, written in any order, some rows at a time: its header is known before any data is.

The library's own writer needs all tensors of a file in memory at once; here a file costs no memory beyond the rows at
hand. Layout by the format's specification (safetensors README, "Format"): 8 bytes of header length, a JSON header
padded with spaces, then the data without holes. Like the library we put wide types first, so that each is aligned.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from quantplug.atomic import finish_file, sync_directory
from quantplug.checkpoint.safetensors.dtypes import NAMES
from quantplug.formats import TensorSpec

_HEADER_ALIGNMENT = 8
_ADVISED, _LEAST_ADVISED = 8 * 2**20, 64 * 2**10
"""Bytes of a stretch of a file with which the disk is told to begin, and of the smallest tensor that counts for it."""

OnFull = Callable[[Path, Path], None]


class SafetensorsFile:
    """A file that takes its final name once all of its tensors are in it and on disk.

    Several ranks can write one file, each some of its bytes: one of them makes it and, when all have synced theirs,
    gives it its name.

    Args:
        shares: Bytes that this rank writes of each tensor, if it is not to write them all.
        on_full: As in `name_file`; it is called where this rank writes all.
    """

    def __init__(
        self,
        path: Path,
        specs: Sequence[TensorSpec],
        shares: Mapping[str, int] | None = None,
        on_full: OnFull | None = None,
    ) -> None:
        self._path = path
        self._on_full = on_full
        self._partial = partial_path(path)
        self._specs = {spec.name: spec for spec in specs}
        self._is_shared = shares is not None
        if shares is None:
            self._missing = {spec.name: spec.nbytes for spec in specs}
        else:
            # Bytes still to come, so that the last write is known as such, in whatever order rows arrive. A rank's
            # empty share never comes.
            self._missing = {name: nbytes for name, nbytes in shares.items() if nbytes}
        _, self._offsets, _ = _plan(specs)
        if not self._is_shared:
            make_file(path, specs)
        # Of a shared file another rank has made this one already.
        self._file = os.open(self._partial, os.O_WRONLY)
        self._start = self._stop = 0  # Of what has been written since the disk was told to begin.

    def write(self, name: str, tensor: torch.Tensor, row: int = 0) -> None:
        """Puts a tensor, or rows of it, in their place; the last ones finish the file.

        Args:
            name: One of the specs'.
            tensor: On CPU, of the spec's type: the whole tensor, or some rows of it.
            row: Number of the first of these rows.

        Raises:
            OSError: The disk refused it.
        """
        spec = self._specs[name]
        # The header is on disk already: bytes of another type or shape would be read as what it says.
        assert tensor.dtype == spec.dtype, f"{name} is not as planned"
        assert _is_part_of(tensor.shape, row, spec.shape), f"{name} is not as planned"
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        # Rows are contiguous, so those from `row` on begin after all bytes of the rows before. A scalar has no rows.
        start = row * (spec.nbytes // spec.shape[0]) if row else 0
        _write_all(self._file, data.data, self._offsets[name] + start)
        self._begin_sync(self._offsets[name] + start, data.nbytes)
        self._missing[name] -= tensor.nbytes
        assert self._missing[name] >= 0, f"{name} was written twice"
        if not self._missing[name]:
            del self._missing[name]
        if not self._missing:
            self._finish()

    def close(self) -> None:
        """Gives up an unfinished file; without effect on a finished one."""
        if self._missing and self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _begin_sync(self, offset: int, nbytes: int) -> None:
        """Lets the disk begin with what has been written, so that the fsync at the end has little left to wait for.

        By its name the advice would drop pages. But Linux drops none that is not on disk yet: it begins to write them,
        and goes on (mm/fadvise.c, `generic_fadvise`). Where that is otherwise, advice changes no data. It has every
        core hand in its lists of pages, so that it is given in stretches, and small tensors are left to the fsync.
        """
        if nbytes < _LEAST_ADVISED:
            return
        # Large tensors come in the order in which they lie in the file, but for those of other types.
        if offset != self._stop:
            self._advise()
            self._start = offset
        self._stop = offset + nbytes
        if self._stop - self._start >= _ADVISED:
            self._advise()

    def _advise(self) -> None:
        if self._start < self._stop:
            os.posix_fadvise(self._file, self._start, self._stop - self._start, os.POSIX_FADV_DONTNEED)
            self._start = self._stop

    def _finish(self) -> None:
        if self._is_shared:
            # The rank that gives the file its name syncs only what it sees: on a network file system each writer's own
            # data is its own to sync.
            os.fsync(self._file)
        os.close(self._file)
        self._file = -1
        if not self._is_shared:
            name_file(self._path, self._on_full)


def make_file(path: Path, specs: Sequence[TensorSpec]) -> None:
    """Makes a file of its full size that has its header and no data yet, under a name of its own (`.part`).

    Raises:
        OSError: The directory is missing or cannot be written, or the disk is full.
    """
    header, _, size = _plan(specs)
    # Readable by its owner alone until it is whole; `finish_file` gives it the mode of an ordinary file.
    file = os.open(partial_path(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        # Its full size at once, so that any rank can write at any place of it.
        os.ftruncate(file, size)
        _write_all(file, memoryview(header), 0)
    finally:
        os.close(file)


def name_file(path: Path, on_full: OnFull | None = None) -> None:
    """Gives a file whose data is all there its final name.

    Args:
        on_full: Called before that, with its final name and the one that it still has.
    """
    finish_file(partial_path(path))
    # Between data and name: whoever notes down that the file is there must not do so before the data is, and must have
    # done so when the name appears.
    if on_full is not None:
        on_full(path, partial_path(path))
    partial_path(path).replace(path)
    sync_directory(path.parent)


def partial_path(path: Path) -> Path:
    """The name that a file has until all of it is there."""
    return path.with_name(f"{path.name}.part")


def _is_part_of(shape: Sequence[int], row: int, whole: Sequence[int]) -> bool:
    """Whether a tensor of that shape fits as rows from number `row` on."""
    if not whole or not shape:
        return tuple(shape) == tuple(whole)
    return tuple(shape[1:]) == tuple(whole[1:]) and row + shape[0] <= whole[0]


def file_size(specs: Sequence[TensorSpec]) -> int:
    """Bytes that a file of these tensors has."""
    return _plan(specs)[2]


def _plan(specs: Sequence[TensorSpec]) -> tuple[bytes, dict[str, int], int]:
    """The header, where each tensor starts in the file, and the size of the file."""
    # transformers writes this into its own files (modeling_utils.py), and releases of it refused files without.
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    # Sorting keeps the order of equals, so the layout depends on the plan alone and a resumed export finds the same
    # one.
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
        starts[spec.name], end = end, end + spec.nbytes
        entries[spec.name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [starts[spec.name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Data begins after 8 + len(text) bytes, a multiple of 8 as well: with wide types first every tensor is aligned to
    # its type.
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}, len(header) + end


def _write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        # A call writes at most 2 GiB on Linux, and may write less of what it is given (write(2)).
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
