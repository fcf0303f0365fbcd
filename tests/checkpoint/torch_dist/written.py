"""Small `torch_dist` checkpoints, written by PyTorch itself."""

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from quantplug.checkpoint.torch_dist.roots import BACKEND_FILE, INDEX_FILE
from quantplug.mappings.families import find_family


def save(directory: Path, tensors: Mapping[str, torch.Tensor], **objects: Any) -> Path:
    """A checkpoint of these tensors and objects, each tensor being one chunk."""
    writer = dcp.FileSystemWriter(directory, single_file_per_rank=True)
    dcp.save({**tensors, **objects}, storage_writer=writer, no_dist=True)
    (directory / BACKEND_FILE).write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    torch.save({"iteration": 7}, directory / "common.pt")
    return directory


def save_model(hf: Path, directory: Path, change: Callable[[dict[str, torch.Tensor]], object] = dict) -> Path:
    """A checkpoint of the dense model in a Hugging Face directory, layers one by one, written without Megatron.

    Args:
        change: What is done to the tensors, by Megatron's names, before they are saved.
    """
    config = json.loads((hf / "config.json").read_text())
    family = find_family(config["architectures"][0])
    dims, table = family.dimensions(config), family.by_megatron()
    stored = load_file(hf / "model.safetensors")
    tensors = {
        key.name: table[key.module].layout.merge(tuple(stored[name] for name in names), dims).contiguous()
        for names, key in family.expected(dims)
    }
    change(tensors)
    return save(directory, tensors)


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


def put_chunks(directory: Path, key: str, shape: Sequence[int], chunks: Mapping[tuple[int, ...], torch.Tensor]) -> None:
    """Adds a tensor that several ranks saved: each chunk, by its offsets, in one more file."""
    name = f"__{len(list(directory.glob('*.distcp')))}_0.distcp"
    places: dict[tuple[int, ...], _StorageInfo] = {}
    with (directory / name).open("wb") as file:
        for offsets, tensor in chunks.items():
            start = file.tell()
            torch.save(tensor, file)
            places[offsets] = _StorageInfo(name, start, file.tell() - start)

    def edit(metadata: Metadata) -> None:
        boxes = [ChunkStorageMetadata(torch.Size(at), tensor.shape) for at, tensor in chunks.items()]
        dtype = next(iter(chunks.values())).dtype
        metadata.state_dict_metadata[key] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), boxes)
        for offsets, place in places.items():
            metadata.storage_data[MetadataIndex(key, offsets)] = place

    edit_index(directory, edit)


class Touching:
    """What makes a file when it is unpickled: the proof that something has run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))
