"""The index of a `torch_dist` checkpoint: which tensors and objects it holds, and where in which file.

`.metadata` is a pickle of PyTorch's `torch.distributed.checkpoint.metadata.Metadata`. It is read as plain data and held
to the classes below: no other name may stand in it, and nothing of it is run.
"""

import gc
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from quantplug.checkpoint.torch_dist.files import damaged, read_file
from quantplug.checkpoint.torch_dist.roots import INDEX_FILE
from quantplug.checkpoint.untrusted.files import file_problem
from quantplug.checkpoint.untrusted.pickles import Made, Named, UnusablePickleError, read_pickle, said
from quantplug.errors import Offender

_MOST_SIZE = 2**48  # Of an axis, an offset or a file: what is larger is made up.
_MOST_AXES = 8
_METADATA = "torch.distributed.checkpoint.metadata."
_PLANNER = "torch.distributed.checkpoint.planner."
DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
        *("int64", "int32", "int16", "int8", "uint8", "bool"),
    )
}
# What PyTorch 2.4 to 2.15 and Megatron-Core 0.12 to 0.19 put into it.
_ALLOWED = frozenset(
    {
        *DTYPES,
        *(
            _METADATA + name
            for name in (
                *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
                *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
            )
        ),
        # Megatron-Core hangs the plans of all ranks on it (`state_dict_saver.py`, `all_local_plans`). PyTorch 2.11
        # writes a copy without them, 2.14 what it was given. Nothing here reads them.
        *(
            _PLANNER + name
            for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
        ),
        "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan",
        "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
        "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata",
        "torch.Size",
        "torch.serialization._get_layout",
        "collections.OrderedDict",
        "collections.defaultdict",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",
    }
)


@dataclass(frozen=True)
class Extent:
    """Bytes of a file of the checkpoint: one `torch.save` of a tensor, or of an object.

    Attributes:
        file: Its name in the directory.
        offset: Of the first byte.
        length: In bytes.
    """

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class StoredChunk:
    """A box of a tensor, as one rank wrote it.

    Attributes:
        offsets: Where it begins in the tensor, along each axis.
        sizes: Its shape.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    extent: Extent


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint.

    Attributes:
        shape: Of all of it, whatever ranks held.
        chunks: What it is made of, in order of their offsets: each element of it lies in one of them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds, by key.

    Attributes:
        tensors: Weights, amaxes, and the optimizer's, as far as they are there.
        objects: Pickles: settings of quantizers, states of random generators and the like.
    """

    directory: Path
    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, Extent]


def read_index(directory: Path) -> Index:
    """Reads `.metadata`, and no file of weights.

    Raises:
        CheckpointError: It is absent, too large or damaged; names a class that it may not hold, or files outside of the
            directory; or a file is absent or shorter than it says. Names every file.
    """
    path = directory / INDEX_FILE
    try:
        with _collector_paused():
            found = _read(read_pickle(read_file(directory, INDEX_FILE), _ALLOWED), directory)
    except (UnusablePickleError, _UnusableIndexError) as error:
        raise damaged([Offender(str(path), str(error))]) from error
    _require_files(found)
    return found


def require_covered(index: Index, keys: Iterable[str]) -> None:
    """Refuses tensors whose chunks overlap, leave holes or go beyond them.

    Raises:
        CheckpointError: Names every tensor.
    """
    problems = ((key, _cover_problem(index.tensors[key])) for key in keys)
    offenders = [Offender(key, problem) for key, problem in problems if problem is not None]
    if offenders:
        raise damaged(offenders)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without the garbage collector, which would look at the millions of objects of a large index again and again.

    That takes as long as making them. What is dropped here has no cycles, but for what a stranger made up, and goes
    without it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _UnusableIndexError(ValueError):
    """The text is the reason."""


def _read(root: Any, directory: Path) -> Index:
    metadata = _state(root, "Metadata")
    places: defaultdict[str, dict[tuple[int, ...] | None, Extent]] = defaultdict(dict)
    for index, info in _pairs(metadata.get("storage_data")):
        key, offsets, extent = _place(index, info)
        places[key][offsets] = extent
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, Extent] = {}
    for key, entry in _pairs(metadata.get("state_dict_metadata")):
        if not isinstance(key, str):
            raise _UnusableIndexError("has a key that is no text")
        if _is_made(entry, "BytesStorageMetadata"):
            objects[key] = _extent_of(key, places[key], None)
        else:
            tensors[key] = _tensor(key, entry, places[key])
    return Index(directory, tensors, objects)


def _tensor(key: str, entry: Any, places: Mapping[tuple[int, ...] | None, Extent]) -> StoredTensor:
    fields = _state(entry, "TensorStorageMetadata")
    chunks = fields.get("chunks")
    if not isinstance(chunks, list):
        raise _UnusableIndexError(f"says nothing of the chunks of {key}")
    read = (_chunk(key, chunk, places) for chunk in chunks)
    ordered = tuple(sorted(read, key=lambda chunk: (chunk.offsets, chunk.extent.file, chunk.extent.offset)))
    return StoredTensor(_sizes(fields.get("size")), _dtype(key, fields.get("properties")), ordered)


def _chunk(key: str, chunk: Any, places: Mapping[tuple[int, ...] | None, Extent]) -> StoredChunk:
    fields = _state(chunk, "ChunkStorageMetadata")
    offsets = _sizes(fields.get("offsets"))
    return StoredChunk(offsets, _sizes(fields.get("sizes")), _extent_of(key, places, offsets))


def _extent_of(key: str, places: Mapping[tuple[int, ...] | None, Extent], offsets: tuple[int, ...] | None) -> Extent:
    extent = places.get(offsets)
    # A tensor without axes may be noted with no offsets or with none of them.
    if extent is None and not offsets:
        extent = places.get(None, places.get(()))
    if extent is None:
        raise _UnusableIndexError(f"does not say where {key} is" + (f" at {list(offsets)}" if offsets else ""))
    return extent


def _place(index: Any, info: Any) -> tuple[str, tuple[int, ...] | None, Extent]:
    named, fields = _state(index, "MetadataIndex"), _state(info, "_StorageInfo")
    key, offsets = named.get("fqn"), named.get("offset")
    file = fields.get("relative_path")
    if not isinstance(key, str) or not isinstance(file, str):
        raise _UnusableIndexError("has a place of something without a name")
    if fields.get("transform_descriptors"):
        raise _UnusableIndexError(f"says that {key} is transformed on disk: {said(fields['transform_descriptors'])}")
    extent = Extent(file, _count(fields.get("offset")), _count(fields.get("length")))
    return key, None if offsets is None else _sizes(offsets), extent


def _dtype(key: str, properties: Any) -> torch.dtype:
    # (dtype, layout, requires_grad, memory format, pinned): its `__getstate__`.
    state = properties.state if isinstance(properties, Made) else None
    named = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(named, Named) or named.name not in DTYPES:
        raise _UnusableIndexError(f"does not say the dtype of {key}")
    dtype: torch.dtype = DTYPES[named.name]
    return dtype


def _is_made(value: Any, name: str) -> bool:
    return isinstance(value, Made) and value.of.rpartition(".")[2] == name


def _state(value: Any, name: str) -> Mapping[Any, Any]:
    """The fields of what would be an object of a class of that name."""
    if not _is_made(value, name):
        raise _UnusableIndexError(f"has something else where a {name} belongs")
    state = value.state
    # A dataclass with slots has (None, fields).
    if isinstance(state, tuple) and len(state) == 2:
        state = state[1] if state[0] is None else state[0]
    return state if isinstance(state, dict) else {}


def _pairs(value: Any) -> Iterator[tuple[Any, Any]]:
    """The entries of a dict, or of what would be a kind of dict."""
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, Made) and all(isinstance(item, tuple) and len(item) == 2 for item in value.items):
        yield from value.items
    else:
        raise _UnusableIndexError("has no table of what is stored")


def _sizes(value: Any) -> tuple[int, ...]:
    """What would be a `torch.Size`; older writers have plain tuples and lists."""
    if isinstance(value, Made) and value.of == "torch.Size" and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, tuple | list) or len(value) > _MOST_AXES:
        raise _UnusableIndexError("has something else where sizes belong")
    return tuple(map(_count, value))


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_SIZE:
        raise _UnusableIndexError(f"has {said(value)} where a size belongs")
    return value


def _require_files(index: Index) -> None:
    """Refuses files that are not there, not all there, or not in the directory."""
    ends: defaultdict[str, int] = defaultdict(int)
    extents = [chunk.extent for tensor in index.tensors.values() for chunk in tensor.chunks]
    for extent in (*extents, *index.objects.values()):
        ends[extent.file] = max(ends[extent.file], extent.offset + extent.length)
    offenders = []
    for name, end in sorted(ends.items()):
        # Writers put all files beside the index: a path that leads anywhere else is made up.
        problem = "is not a file beside the index" if os.sep in name else file_problem(index.directory, name)
        if problem is None and (size := (index.directory / name).stat().st_size) < end:
            problem = f"is cut short: it has {size} bytes"
        if problem is not None:
            offenders.append(Offender(str(index.directory / name), problem))
    if offenders:
        raise damaged(offenders)


def _cover_problem(tensor: StoredTensor) -> str | None:
    """Why chunks do not make up a tensor; None if each element lies in exactly one of them."""
    whole = StoredChunk((0,) * len(tensor.shape), tensor.shape, Extent("", 0, 0))
    for chunk in tensor.chunks:
        if len(chunk.offsets) != len(tensor.shape) or len(chunk.sizes) != len(tensor.shape):
            return f"a chunk {list(chunk.sizes)} at {list(chunk.offsets)} is no part of {list(tensor.shape)}"
    # Along an axis that all chunks have all of, all of them are alike.
    axes = [
        axis
        for axis, size in enumerate(tensor.shape)
        if any((chunk.offsets[axis], chunk.sizes[axis]) != (0, size) for chunk in tensor.chunks)
    ]
    # How often an element is covered, as a function of its place, changes at corners of boxes alone, and these changes
    # say all of it. So boxes cover the whole exactly once where their signed corners add up to those of the whole.
    corners: Counter[tuple[int, ...]] = Counter()
    for chunk in tensor.chunks:
        _count_corners(chunk, axes, corners, 1)
    _count_corners(whole, axes, corners, -1)
    return "its chunks overlap, leave holes or go beyond it" if any(corners.values()) else None


def _count_corners(box: StoredChunk, axes: Iterable[int], corners: Counter[tuple[int, ...]], sign: int) -> None:
    sides = [((box.offsets[axis], 1), (box.offsets[axis] + box.sizes[axis], -1)) for axis in axes]
    for corner in product(*sides):
        corners[tuple(at for at, _ in corner)] += sign * math.prod(of_side for _, of_side in corner)
