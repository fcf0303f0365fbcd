"""Small `torch_dist` checkpoints, written by PyTorch itself."""

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from quantplug.checkpoint.torch_dist.roots import BACKEND_FILE, INDEX_FILE


def save(directory: Path, tensors: Mapping[str, torch.Tensor], **objects: Any) -> Path:
    """A checkpoint of these tensors and objects, each tensor being one chunk."""
    writer = dcp.FileSystemWriter(directory, single_file_per_rank=True)
    dcp.save({**tensors, **objects}, storage_writer=writer, no_dist=True)
    (directory / BACKEND_FILE).write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    torch.save({"iteration": 7}, directory / "common.pt")
    return directory


def edit_index(directory: Path, edit: Callable[[Metadata], None]) -> None:
    """Writes the index of a checkpoint again, with something changed in it."""
    path = directory / INDEX_FILE
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def put_object(directory: Path, key: str, value: Any) -> None:
    """Adds an object as Megatron-Core saves one: a list of it, and a file of its own."""
    name = f"__{len(list(directory.glob('*.distcp')))}_0.distcp"
    torch.save([value], directory / name)

    def edit(metadata: Metadata) -> None:
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        length = (directory / name).stat().st_size
        metadata.storage_data[MetadataIndex(key)] = _StorageInfo(name, 0, length)

    edit_index(directory, edit)


class Touching:
    """What makes a file when it is unpickled: the proof that something has run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))
