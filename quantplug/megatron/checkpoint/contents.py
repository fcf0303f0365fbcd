"""What a checkpoint holds, read before Megatron is asked for anything."""

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


@dataclass(frozen=True)
class Contents:
    """What is in a checkpoint.

    Attributes:
        directory: Where it is.
        index: What of it may be a model's.
        aside: What is there beside the model.
        padded_to: Multiple to which its vocabulary is padded, if its settings say so.
    """

    directory: Path
    index: Index
    aside: tuple[Aside, ...]
    padded_to: int | None

    @property
    def tensors(self) -> Stored:
        """The tensors, by key."""
        return self.index.tensors

    @property
    def keys(self) -> frozenset[str]:
        """Keys of tensors and objects."""
        return frozenset([*self.index.tensors, *self.index.objects])


def read_contents(directory: Path) -> Contents:
    """Reads what a checkpoint says of itself, and no file of weights. No collective.

    Raises:
        CheckpointError: The index is damaged, or names something to be run; a tensor that may be a model's has holes;
            or a file is absent or too short.
    """
    index = read_index(directory)
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
    return Contents(directory, own, counted, _padded_to(read_common(directory, index).arguments))


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


def _lengths(index: Index, key: str) -> Iterator[int]:
    if key in index.objects:
        yield index.objects[key].length
    else:
        yield from (chunk.extent.length for chunk in index.tensors[key].chunks)


def _padded_to(arguments: Mapping[str, Plain]) -> int | None:
    """What Megatron-LM pads a vocabulary to (`_vocab_size_with_padding`, megatron/training/tokenizer)."""
    multiple, tp = (arguments.get(name) for name in ("make_vocab_size_divisible_by", "tensor_model_parallel_size"))
    return multiple * tp if isinstance(multiple, int) and isinstance(tp, int) else None
