"""Rows of the tensors of a checkpoint, read where they lie: no tensor is read whole to have some of it.

Each chunk is one `torch.save`, whose pickle says how its tensor lies in the data beside it. Nothing of that is run, and
it must agree with the index.
"""

import math
import os
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from types import TracebackType
from typing import IO, Any, Self

import torch

from quantplug.checkpoint.reader import identity_of
from quantplug.checkpoint.torch_dist.files import damaged, open_regular
from quantplug.checkpoint.torch_dist.index import DTYPES, Index, StoredChunk, StoredTensor
from quantplug.checkpoint.torch_dist.saved import Saved, Span, UnusableSaveError, read_saved
from quantplug.checkpoint.untrusted.pickles import Made, Named, Outside
from quantplug.errors import Offender, SourceError

_MOST_OPEN = 64  # Files: a checkpoint of a thousand ranks has two thousand, and a process may have a thousand open.
_MOST_KNOWN = 4096  # Chunks whose place is remembered; to find it again costs a tenth of a millisecond.
_REBUILD = "torch._utils._rebuild_tensor_v"
_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class Segment:
    """A tensor of the checkpoint, or the part of it that one layer, or one expert of one, has.

    Attributes:
        key: Of the tensor.
        place: Its place along the first axes of the tensor, which are those of layers and experts.
        of: How many places these axes must have.
    """

    key: str
    place: tuple[int, ...] = ()
    of: tuple[int, ...] = ()


class _UnusableChunkError(ValueError):
    """The text is the reason."""


@dataclass(frozen=True)
class _Laid:
    """How a chunk lies in its file: from `start` on, its first axis in steps of `row_bytes`.

    Attributes:
        strides: In elements, where it is not contiguous; None where it is.
    """

    start: int
    stop: int
    strides: tuple[int, ...] | None


class TorchDistReader:
    """The tensors of a checkpoint, read row by row. A context manager; it can be read until it is left.

    Args:
        index: What `read_index` gave.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        files = {chunk.extent.file for tensor in index.tensors.values() for chunk in tensor.chunks}
        self._opened_as = {file: identity_of(index.directory / file) for file in files}
        self._files: OrderedDict[str, IO[bytes]] = OrderedDict()
        self._by_place: dict[tuple[str, int], defaultdict[tuple[int, ...], list[StoredChunk]]] = {}
        self._laid = lru_cache(maxsize=_MOST_KNOWN)(self._look_up)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def shape(self, segment: Segment) -> tuple[int, ...]:
        """Shape of what it holds, without the axes that its place takes."""
        return self.index.tensors[segment.key].shape[len(segment.place) :]

    def numel(self, segment: Segment) -> int:
        """How many elements it holds."""
        return math.prod(self.shape(segment))

    def read(self, segment: Segment, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [stop - start, ...] of a tensor on CPU, in its own type; of one without axes, all of it.

        Args:
            start: First row.
            stop: The row behind the last; None for all.

        Raises:
            CheckpointError: A chunk is not what the index says; names the tensor and the file.
            SourceError: A file is gone or has become another one since the checkpoint was opened.
        """
        shape = self.shape(segment)
        if not shape:
            return self._read_box(segment, self.empty(segment, ()), ())
        stop = shape[0] if stop is None else stop
        rows = self.empty(segment, (stop - start, *shape[1:]))
        return self._read_box(segment, rows, (start, *(0 for _ in shape[1:])))

    def read_rows(self, segments: Sequence[Segment], start: int, rows: torch.Tensor) -> None:
        """Fills a tensor [rows, ...] with rows of segments that lie one below another, from `start` on; as `read`."""
        stop, above = start + len(rows), 0
        for segment in segments:
            height = self.shape(segment)[0]
            first, last = max(start - above, 0), min(stop - above, height)
            if first < last:
                target = rows[first + above - start : last + above - start]
                self._read_box(segment, target, (first, *(0 for _ in target.shape[1:])))
            above += height

    def empty(self, segment: Segment, shape: Sequence[int]) -> torch.Tensor:
        """A tensor of the type of a segment, for rows to be read into."""
        return torch.empty(shape, dtype=self.index.tensors[segment.key].dtype)

    def may_have_changed(self, segment: Segment) -> bool:
        """Whether a file that it lies in has been touched since the checkpoint was opened."""
        files = {chunk.extent.file for chunk in self._chunks_at(segment)}
        return any(identity_of(self.index.directory / file) != self._opened_as[file] for file in files)

    def _read_box(self, segment: Segment, found: torch.Tensor, starts: tuple[int, ...]) -> torch.Tensor:
        """Fills a tensor with a box of a segment, which begins at `starts`."""
        stops = tuple(start + size for start, size in zip(starts, found.shape, strict=True))
        taken = len(segment.place)
        for chunk in self._chunks_at(segment):
            offsets, sizes = chunk.offsets[taken:], chunk.sizes[taken:]
            first = [max(start, offset) for start, offset in zip(starts, offsets, strict=True)]
            last = [min(stop, offset + size) for stop, offset, size in zip(stops, offsets, sizes, strict=True)]
            if any(begin >= end for begin, end in zip(first, last, strict=True)):
                continue
            inside = tuple(at - offset for at, offset in zip(segment.place, chunk.offsets, strict=False))
            target = found[tuple(slice(b - s, e - s) for b, e, s in zip(first, last, starts, strict=True))]
            begin, end = (first[0] - offsets[0], last[0] - offsets[0]) if first else (0, 1)
            self._fill(target, segment.key, chunk, inside, begin, end)
        return found

    def _fill(
        self, target: torch.Tensor, key: str, chunk: StoredChunk, place: tuple[int, ...], begin: int, end: int
    ) -> None:
        """Puts rows of a chunk where they belong."""
        laid = self._laid(key, chunk)
        dtype, sizes = self.index.tensors[key].dtype, chunk.sizes
        if laid.strides is not None:
            # No writer that is known makes them: a whole chunk is read, and looked at as it lies.
            whole = torch.empty((laid.stop - laid.start) // dtype.itemsize, dtype=dtype)
            self._read_into(whole, key, chunk, laid.start)
            rows = whole.as_strided(sizes, laid.strides)[place]
            target.copy_(rows[begin:end] if rows.dim() else rows)
            return
        below = sizes[len(place) + 1 :]
        row_bytes = math.prod(below) * dtype.itemsize
        # Rows of the chunk are contiguous, and so are those of all layers and experts that it holds.
        row = 0
        for at, size in zip(place, sizes, strict=False):
            row = row * size + at
        rows_of_place = sizes[len(place)] if len(sizes) > len(place) else 1
        start = laid.start + (row * rows_of_place + begin) * row_bytes
        if target.is_contiguous():
            self._read_into(target, key, chunk, start)
        else:  # Columns of a slice that tensor parallelism has cut.
            lines = torch.empty((end - begin, *below), dtype=dtype)
            self._read_into(lines, key, chunk, start)
            target.copy_(lines)

    def _read_into(self, target: torch.Tensor, key: str, chunk: StoredChunk, start: int) -> None:
        file = self._open(key, chunk)
        view = target.reshape(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(view):
            count = os.preadv(file.fileno(), [view[done:]], start + done)
            if not count:
                raise damaged([Offender(key, f"{chunk.extent.file} ends amid its data")])
            done += count

    def _open(self, key: str, chunk: StoredChunk) -> IO[bytes]:
        """The file of a chunk, if it is still the one that was opened first."""
        name = chunk.extent.file
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        file = open_regular(self.index.directory, name)
        now, opened = identity_of(self.index.directory / name), self._opened_as[name]
        if now is None or opened is None or now.file != opened.file:
            file.close()
            raise SourceError(
                "The source has changed while it was read.",
                [Offender(key, f"{self.index.directory / name}, which held it, is another file")],
                "Wait until nothing writes there any more, then run the same command again.",
            )
        while len(self._files) >= _MOST_OPEN:
            self._files.popitem(last=False)[1].close()
        self._files[name] = file
        return file

    def _look_up(self, key: str, chunk: StoredChunk) -> _Laid:
        """Where a chunk lies in its file, by its own pickle."""
        extent = chunk.extent
        try:
            saved = read_saved(self._open(key, chunk), Span(extent.offset, extent.offset + extent.length))
            return _laid_out(saved, chunk, self.index.tensors[key])
        except (UnusableSaveError, _UnusableChunkError, OSError) as error:
            raise damaged([Offender(key, f"{self.index.directory / extent.file}: {error}")]) from error

    def _chunks_at(self, segment: Segment) -> Sequence[StoredChunk]:
        """The chunks that hold something of a layer, or an expert."""
        taken = len(segment.place)
        by_place = self._by_place.get((segment.key, taken))
        if by_place is None:
            by_place = self._by_place[segment.key, taken] = defaultdict(list)
            for chunk in self.index.tensors[segment.key].chunks:
                for place in _places(chunk, taken):
                    by_place[place].append(chunk)
        return by_place.get(segment.place, ())


def _places(chunk: StoredChunk, taken: int) -> Iterator[tuple[int, ...]]:
    return product(*(range(at, at + size) for at, size in zip(chunk.offsets[:taken], chunk.sizes[:taken], strict=True)))


def _laid_out(saved: Saved, chunk: StoredChunk, tensor: StoredTensor) -> _Laid:
    """Where a tensor lies, by what its pickle would call: `_rebuild_tensor_v2(storage, offset, size, stride, …)`."""
    made = saved.value
    # A parameter is a tensor with two words more.
    if isinstance(made, Made) and made.of == "torch._utils._rebuild_parameter":
        made = made.arguments[0] if made.arguments else None
    if not isinstance(made, Made) or not made.of.startswith(_REBUILD) or len(made.arguments) < 4:
        raise _UnusableChunkError("holds something else than a tensor")
    storage, offset, sizes, strides, *more = made.arguments
    sizes, strides = _numbers(sizes), _numbers(strides)
    key, dtype = _storage_of(storage, more)
    if sizes != chunk.sizes or dtype != tensor.dtype or len(strides) != len(sizes):
        raise _UnusableChunkError(
            f"holds {dtype} {list(sizes)}, where the index says {tensor.dtype} {list(chunk.sizes)}"
        )
    span = saved.storages.get(key)
    begin = _numbers((offset,))[0]
    # How far the last element lies behind the first one.
    reach = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) if all(sizes) else -1
    if span is None or (begin + reach + 1) * dtype.itemsize > span.stop - span.start:
        raise _UnusableChunkError("has less data than its sizes ask for")
    start = span.start + begin * dtype.itemsize
    return _Laid(start, start + (reach + 1) * dtype.itemsize, None if _is_contiguous(sizes, strides) else strides)


def _storage_of(storage: Any, more: Sequence[Any]) -> tuple[str, torch.dtype]:
    place = storage.place if isinstance(storage, Outside) else None
    if not isinstance(place, tuple) or len(place) < 3 or place[0] != "storage" or not isinstance(place[1], Named):
        raise _UnusableChunkError("does not say where its data is")
    # Types without a storage of their own are said beside the tensor (`_rebuild_tensor_v3`).
    beside = next((DTYPES[each.name] for each in more if isinstance(each, Named) and each.name in DTYPES), None)
    dtype = beside or _STORAGES.get(place[1].name)
    if dtype is None or not isinstance(place[2], str):
        raise _UnusableChunkError(f"is of the type {place[1].name}, which is not read")
    return place[2], dtype


def _numbers(value: Any) -> tuple[int, ...]:
    if isinstance(value, Made) and value.of == "torch.Size" and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, tuple | list) or not all(isinstance(each, int) and 0 <= each < 2**48 for each in value):
        raise _UnusableChunkError("has something else where sizes belong")
    return tuple(value)


def _is_contiguous(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        # An axis of one element may have any stride.
        if size != 1 and stride != expected:
            return not all(sizes)
        expected *= size
    return True
