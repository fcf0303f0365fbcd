"""Where an export goes: checked to be free before any work, then filled with safetensors files and their index."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quantplug.atomic import finish_file
from quantplug.errors import DestinationError, Offender
from quantplug.formats import TensorSpec

INDEX_NAME = "model.safetensors.index.json"


def check_destination(export_dir: Path, rank: int = 0) -> None:
    """Refuses a directory that one rename cannot fill.

    Raises:
        DestinationError: It holds anything, is no directory or below a file, is a mount point (renaming over one fails)
            or the current directory (renaming over it leaves the process in one that is gone).
    """
    path, reason = export_dir, _obstacle(export_dir)
    for parent in export_dir.parents:
        if parent.exists() and not parent.is_dir():
            path, reason = parent, "exists and is not a directory"
    if reason is not None:
        raise DestinationError(
            "The export directory cannot be used.",
            [Offender(str(path), reason, rank=rank)],
            "Choose a directory that is new or empty; nothing is overwritten.",
        )


def _obstacle(export_dir: Path) -> str | None:
    if not export_dir.is_dir():
        return "exists and is not a directory" if export_dir.exists() or export_dir.is_symlink() else None
    if any(export_dir.iterdir()):
        return "is not empty"
    if export_dir.resolve().is_mount():
        return "is a mount point; choose a directory in it"
    if export_dir.samefile(Path.cwd()):
        return "is the current directory; choose a directory in it"
    return None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    finish_file(path)


class SafetensorsSink:
    """Writes tensors, in the plan's order, to the plan's safetensors files, and the index of what was written.

    Holds one file's tensors in memory at a time.
    """

    def __init__(self, directory: Path, shards: Sequence[Sequence[str]], expected: Mapping[str, TensorSpec]) -> None:
        self._directory = directory
        self._shards = shards
        self._expected = expected
        self._pending: dict[str, torch.Tensor] = {}
        self._weight_map: dict[str, str] = {}
        self._total_size = 0
        self._shard = 0

    def write(self, name: str, tensor: torch.Tensor) -> None:
        spec = self._expected[name]
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), f"{name} is not as planned"
        self._pending[name] = tensor
        if len(self._pending) == len(self._shards[self._shard]):
            self._flush()

    def close(self) -> None:
        assert not self._pending, f"{len(self._pending)} tensors were left over"
        assert self._weight_map.keys() == self._expected.keys(), "not everything planned was written"
        index = {"metadata": {"total_size": self._total_size}, "weight_map": dict(sorted(self._weight_map.items()))}
        write_json(self._directory / INDEX_NAME, index)

    def _flush(self) -> None:
        filename = f"model-{self._shard + 1:05d}-of-{len(self._shards):05d}.safetensors"
        assert list(self._pending) == list(self._shards[self._shard]), "tensors came out of the plan's order"
        save_file(self._pending, self._directory / filename, metadata={"format": "pt"})
        finish_file(self._directory / filename)
        self._weight_map.update(dict.fromkeys(self._pending, filename))
        self._total_size += sum(tensor.nbytes for tensor in self._pending.values())
        self._pending = {}
        self._shard += 1
