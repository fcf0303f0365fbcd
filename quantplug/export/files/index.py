"""The index of a sharded checkpoint, and JSON files that are complete or absent."""

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from quantplug.atomic import write_atomically
from quantplug.checkpoint.reader import INDEX_FILE
from quantplug.errors import DestinationError, Offender
from quantplug.export.plan.types import ShardFile
from quantplug.formats import TensorSpec


def write_index(directory: Path, files: Sequence[ShardFile], expected: Mapping[str, TensorSpec]) -> None:
    """Writes the index of what is in the files, by their own headers, which must be what was planned."""
    for file in files:
        # Read by safetensors itself, with which servers read, and not by what wrote the file.
        with safe_open(directory / file.name, framework="pt") as opened:
            assert set(opened.keys()) == set(file.tensors), f"{file.name} does not hold what was planned"
    write_json(directory / INDEX_FILE, index_of(files, expected))


def index_of(files: Sequence[ShardFile], expected: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """What the index says of these files."""
    weight_map = {name: file.name for file in files for name in file.tensors}
    total_size = sum(expected[name].nbytes for name in weight_map)
    # Names in order, so that the same checkpoint has the same index however many ranks wrote it.
    return {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}


def refuse_strays(directory: Path, names: Container[str]) -> None:
    """Refuses to publish what this export has not written: whoever can write there could add what readers take.

    Files that a killed export left half-written (`*.part`) are none of these: they are removed.

    Args:
        names: Paths below the directory of the files that belong there.

    Raises:
        DestinationError: There is anything else, or something that is no file in place of one; names all of it.
    """
    strays = [
        path
        for path in sorted(directory.rglob("*"))
        # `is_dir` and `is_file` follow links, so that these are asked for first: a link is refused wherever it leads.
        if not (path.suffix == ".part" and path.is_file())
        and (path.is_symlink() or not path.is_dir())
        and (path.is_symlink() or not path.is_file() or str(path.relative_to(directory)) not in names)
    ]
    if strays:
        raise DestinationError(
            "Files that this export has not written are among its own.",
            [Offender(str(path), "is not in the plan") for path in strays],
            "Remove them once nothing writes there any more; the same export run again goes on from what is finished.",
        )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json_bytes(content))


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """A JSON file as every one of ours is spelled."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
