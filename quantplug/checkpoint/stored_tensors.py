"""What lies beside a config, by headers alone: an export needs none of it, and holds against it what is there."""

import os
from pathlib import Path

from quantplug.checkpoint.reader import TensorHeader, open_safetensors, read_headers, weight_files, weight_map


def stored_tensors(directory: Path) -> dict[str, TensorHeader]:
    """The tensors of the files that hold a checkpoint's weights, by name; empty where none of them are there.

    Raises:
        SourceError: The index or a file is damaged.
    """
    tensors: dict[str, TensorHeader] = {}
    for name in weight_files(directory):
        if os.path.lexists(directory / name):
            with open_safetensors(directory, name) as file:
                tensors |= read_headers(file, name)
    return tensors


def stored_names(directory: Path) -> frozenset[str]:
    """The names of a checkpoint's tensors by its index, which may be there without them, or by its one file.

    Raises:
        SourceError: The index or the file is damaged.
    """
    listed = weight_map(directory)
    return frozenset(stored_tensors(directory) if listed is None else listed)
