"""What a checkpoint holds, read before Megatron is asked for anything."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from quantplug.checkpoint.torch_dist.aside import Aside, kind_of
from quantplug.checkpoint.torch_dist.common import Plain, read_common
from quantplug.checkpoint.torch_dist.index import Index, read_index, require_covered
from quantplug.megatron.checkpoint.keys import Stored

_WRAPPED = re.compile(r"((?:module\.)*).*", re.DOTALL)


@dataclass(frozen=True)
class Contents:
    """What is in a checkpoint.

    Attributes:
        directory: Where it is.
        index: What of it may be a model's.
        aside: What is there beside the model.
        arguments: Megatron-LM's, by name, if it wrote the checkpoint.
    """

    directory: Path
    index: Index
    aside: tuple[Aside, ...]
    arguments: Mapping[str, Plain]

    @property
    def tensors(self) -> Stored:
        """The tensors, by key."""
        return self.index.tensors

    @property
    def keys(self) -> frozenset[str]:
        """Keys of tensors and objects."""
        return frozenset([*self.index.tensors, *self.index.objects])

    @property
    def padded_to(self) -> int | None:
        """Multiple to which the vocabulary is padded, if the arguments say so.

        As Megatron-LM's `_vocab_size_with_padding` does (megatron/training/tokenizer).
        """
        multiple, tp = (self.arguments.get(it) for it in ("make_vocab_size_divisible_by", "tensor_model_parallel_size"))
        return multiple * tp if isinstance(multiple, int) and isinstance(tp, int) else None


def read_contents(directory: Path) -> Contents:
    """Reads what a checkpoint says of itself, and no file of weights. No collective.

    Raises:
        CheckpointError: The index is damaged, or names something to be run; a tensor that may be a model's has holes;
            or a file is absent or too short.
    """
    index = _unwrapped(read_index(directory))
    aside = {key: kind for key in (*index.tensors, *index.objects) if (kind := kind_of(key)) is not None}
    own = Index(
        directory,
        {key: tensor for key, tensor in index.tensors.items() if key not in aside},
        {key: extent for key, extent in index.objects.items() if key not in aside},
    )
    require_covered(own, own.tensors)
    counted = tuple(
        Aside(kind, len(keys), sum(nbytes for key in keys for nbytes in _lengths(index, key)))
        for kind in dict.fromkeys(aside.values())
        for keys in [[key for key in aside if aside[key] == kind]]
    )
    return Contents(directory, own, counted, read_common(directory, index).arguments)


def index_for_torch(index: Index) -> Metadata:
    """The index as torch's own reader wants it, made anew: nothing of a pickle is handed on."""
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for key, tensor in index.tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(it.offsets), torch.Size(it.sizes)) for it in tensor.chunks]
        entries[key] = TensorStorageMetadata(TensorProperties(tensor.dtype), torch.Size(tensor.shape), chunks)
        for chunk in tensor.chunks:
            extent = chunk.extent
            place = MetadataIndex(key, torch.Size(chunk.offsets))
            places[place] = _StorageInfo(extent.file, extent.offset, extent.length)
    for key, extent in index.objects.items():
        entries[key] = BytesStorageMetadata()
        places[MetadataIndex(key)] = _StorageInfo(extent.file, extent.offset, extent.length)
    return Metadata(entries, storage_data=places)


def _unwrapped(index: Index) -> Index:
    """The index without the names that wrappers such as DDP, saved as a whole, put before all keys of a model."""
    own = [key for key in (*index.tensors, *index.objects) if kind_of(key) is None]
    # Before all of them, or it is no wrapper's.
    wrapped = min(map(_wrappers, own), key=len, default="")
    return Index(
        index.directory,
        {key.removeprefix(wrapped): tensor for key, tensor in index.tensors.items()},
        {key.removeprefix(wrapped): extent for key, extent in index.objects.items()},
    )


def _wrappers(key: str) -> str:
    match = _WRAPPED.fullmatch(key)
    return match[1] if match else ""


def _lengths(index: Index, key: str) -> Iterator[int]:
    if key in index.objects:
        yield index.objects[key].length
    else:
        yield from (chunk.extent.length for chunk in index.tensors[key].chunks)
