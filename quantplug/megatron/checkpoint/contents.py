"""What a checkpoint holds, read before Megatron is asked for anything."""

from collections.abc import Mapping
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

from quantplug.checkpoint.torch_dist.aside import Aside, kind_of, left_aside, unwrapped
from quantplug.checkpoint.torch_dist.index import Index, read_index, require_covered
from quantplug.checkpoint.torch_dist.noted.arguments import read_arguments
from quantplug.checkpoint.torch_dist.noted.common import Plain
from quantplug.checkpoint.torch_dist.noted.vocabulary import padded_to
from quantplug.megatron.checkpoint.keys import Stored


@dataclass(frozen=True)
class Contents:
    """What is in a checkpoint.

    Attributes:
        directory: Where it is.
        index: What of it may be a model's.
        aside: What is there beside the model.
        arguments: Those of its trainer, by the names of Megatron-LM.
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
        """Multiple to which the vocabulary is padded, if the arguments say so."""
        return padded_to(self.arguments)


def read_contents(directory: Path) -> Contents:
    """Reads what a checkpoint says of itself, and no file of weights. No collective.

    Raises:
        CheckpointError: The index is damaged, or names something to be run; a tensor that may be a model's has holes;
            or a file is absent or too short.
    """
    index = unwrapped(read_index(directory))
    own = Index(
        directory,
        {key: tensor for key, tensor in index.tensors.items() if kind_of(key) is None},
        {key: extent for key, extent in index.objects.items() if kind_of(key) is None},
    )
    require_covered(own, own.tensors)
    return Contents(directory, own, left_aside(index), read_arguments(directory, index))


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
