"""The index of a sharded checkpoint, and JSON files that are complete or absent."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from quantplug.atomic import write_atomically
from quantplug.checkpoint.reader import INDEX_FILE
from quantplug.errors import DestinationError, Offender
from quantplug.export.plan.types import ShardFile
from quantplug.formats import TensorSpec


def write_index(directory: Path, files: Sequence[ShardFile], expected: Mapping[str, TensorSpec]) -> None:
    """Writes the index of what is in the files, by their own headers, which must be what was planned.

    Raises:
        DestinationError: There are other files, which readers of a whole directory would take for a part of it.
    """
    _refuse_strays(directory, files)
    weight_map: dict[str, str] = {}
    for file in files:
        with safe_open(directory / file.name, framework="pt") as opened:
            names = set(opened.keys())
        assert names == set(file.tensors), f"{file.name} does not hold what was planned"
        weight_map |= dict.fromkeys(names, file.name)
    total_size = sum(expected[name].nbytes for name in weight_map)
    write_json(
        directory / INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    )


def _refuse_strays(directory: Path, files: Sequence[ShardFile]) -> None:
    strays = {path.name for path in directory.glob("*.safetensors")} - {file.name for file in files}
    if strays:
        raise DestinationError(
            "Files that this export has not written are among its own.",
            [Offender(str(directory / name), "is not in the plan") for name in sorted(strays)],
            "Remove them once nothing writes there any more; the same export run again goes on from what is finished.",
        )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
