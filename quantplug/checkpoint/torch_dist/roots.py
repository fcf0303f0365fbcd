"""Which directory of what a trainer wrote is the checkpoint to read, and whether it is of the format that is read.

Megatron-LM and Megatron-Bridge write, below what they are told to save to:
    latest_checkpointed_iteration.txt   the newest iteration, or the word `release`
    iter_0000100/, release/             checkpoints; Bridge puts run_config.yaml and train_state.pt into each
    latest_train_state.pt               Bridge only; it says the same as the text file

Formats are those of Megatron-LM's `--ckpt-format` (megatron/training/arguments.py), and Megatron-Core's zarr of old.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from quantplug.checkpoint.torch_dist.files import damaged, read_file
from quantplug.errors import CheckpointError, Offender

TRACKER_FILE = "latest_checkpointed_iteration.txt"
BACKEND_FILE = "metadata.json"
INDEX_FILE = ".metadata"
COMMON_FILE = "common.pt"
COMMON_OBJECT = "common_state/"  # Of Megatron-Core 0.19, which keeps the same in an object of the index.

_RELEASE = "release"
_ITERATION = re.compile(r"iter_(\d{7,12})")
_MOST_TRACKER_BYTES, _MOST_BACKEND_BYTES = 64, 2**16

_CONVERT = (
    "Load it with the trainer that wrote it and save it as torch_dist: Megatron-LM and Megatron-Bridge do both in one "
    "run with --ckpt-convert-format torch_dist --ckpt-convert-save DIR (ckpt_convert_format, ckpt_convert_save)."
)
_SAVE_AGAIN = (
    "Load it with the trainer that wrote it, and save the weights with --ckpt-format torch_dist; or as a Hugging Face "
    "checkpoint, which `quantplug quantize` reads."
)
_WAYS_OUT: Mapping[str, str] = {
    "torch": _CONVERT,
    "zarr": _CONVERT,
    "torch_dcp or fsdp_dtensor": _SAVE_AGAIN,
    "fsdp_dtensor": _SAVE_AGAIN,
}


def find_iteration(path: str | Path, iteration: int | None = None) -> Path:
    """The directory of the one `torch_dist` checkpoint that is meant.

    Args:
        path: What a trainer saved to, one iteration in it, or a directory that `dist_checkpointing.save` wrote.
        iteration: Which iteration of those that a trainer saved; None for the newest, by what the trainer noted.

    Raises:
        CheckpointError: There is no checkpoint, or not this iteration, and then those that are there are named; or it
            is of another format, which is named with the way out; or a file of it is damaged.
    """
    root = Path(path)
    if not root.is_dir():
        reason = "is a file" if root.exists() else "does not exist"
        raise _no_checkpoint(root, reason, "Give the directory that the trainer saved to.")
    if _format_of(root) is None:
        root = _iteration_of(root, iteration)
    elif iteration is not None and root.name != _name_of(iteration):
        raise _no_checkpoint(
            root,
            f"is one checkpoint, and not that of iteration {iteration}",
            "Give the directory above it, or no iteration.",
        )
    _require_torch_dist(root)
    return root


def _iteration_of(root: Path, iteration: int | None) -> Path:
    """The checkpoint of an iteration below what a trainer saved to."""
    there = _iterations(root)
    name = _newest(root, there) if iteration is None else _name_of(iteration)
    if name is None:
        raise _no_checkpoint(
            root,
            f"holds no {BACKEND_FILE}, no {TRACKER_FILE} and no iteration",
            "Give the directory that the trainer saved to, or one iteration in it; a Hugging Face directory is "
            "quantized by quantize_checkpoint (quantplug quantize).",
        )
    if name in there and not (root / name).is_dir():
        raise damaged([Offender(str(root / name), "is not a directory")])
    if name not in there:
        listed = ", ".join(there) or "none"
        asked = f"has no {name}" if iteration is not None else f"has no {name}, which {TRACKER_FILE} names"
        raise _no_checkpoint(
            root, f"{asked}; there are: {listed}", "Choose one that is there: iteration=N, or --iteration N."
        )
    return root / name


def _iterations(root: Path) -> list[str]:
    """Names of the checkpoints below a directory, the newest last."""
    found = [(int(match[1]), entry.name) for entry in _entries(root) if (match := _ITERATION.fullmatch(entry.name))]
    return [*([_RELEASE] if (root / _RELEASE).is_dir() else []), *(name for _, name in sorted(found))]


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError as error:
        raise damaged([Offender(str(directory), f"cannot be read: {error.strerror}")]) from error


def _newest(root: Path, there: list[str]) -> str | None:
    """The checkpoint that a trainer noted last; where it noted none, the only one that is there."""
    if os.path.lexists(root / TRACKER_FILE):
        noted = read_file(root, TRACKER_FILE, _MOST_TRACKER_BYTES).strip()
        if noted == _RELEASE.encode():
            return _RELEASE
        if not noted.isdigit():
            raise damaged([Offender(str(root / TRACKER_FILE), f"names no iteration: {noted!r}")])
        return _name_of(int(noted))
    if len(there) > 1:
        # The last one may be what a killed trainer left, so that none is chosen for the user.
        raise _no_checkpoint(
            root,
            f"has no {TRACKER_FILE}, and several checkpoints: {', '.join(there)}",
            "Choose one of them: iteration=N, --iteration N, or its directory.",
        )
    return there[0] if there else None


def _name_of(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def _format_of(directory: Path) -> str | None:
    """The format of the checkpoint that a directory itself is; None if it is none."""
    if os.path.lexists(directory / BACKEND_FILE):
        return _stated_backend(directory)
    if any(entry.name.startswith("mp_rank_") for entry in _entries(directory)):
        return "torch"
    # Megatron-Core writes metadata.json last: without it this is what a killed save, or an incomplete copy, left.
    has_index = os.path.lexists(directory / INDEX_FILE)
    # Keys are text in an index, which another reader takes apart.
    if os.path.lexists(directory / COMMON_FILE) or (
        has_index and COMMON_OBJECT.encode() in read_file(directory, INDEX_FILE)
    ):
        raise damaged([Offender(str(directory / BACKEND_FILE), "is missing")])
    if has_index:
        # PyTorch's own distributed checkpoint, of shards that FSDP made. Bridge says which of the two it is.
        config = directory / "run_config.yaml"
        is_stated = config.is_file() and re.search(
            rb"^\s*ckpt_format: fsdp_dtensor\s*$", read_file(directory, config.name), re.MULTILINE
        )
        return "fsdp_dtensor" if is_stated else "torch_dcp or fsdp_dtensor"
    return None


def _stated_backend(directory: Path) -> str:
    content = read_file(directory, BACKEND_FILE, _MOST_BACKEND_BYTES)
    try:
        stated = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise damaged([Offender(str(directory / BACKEND_FILE), f"is not JSON: {error}")]) from error
    backend = stated.get("sharded_backend") if isinstance(stated, dict) else None
    if not isinstance(backend, str):
        raise damaged([Offender(str(directory / BACKEND_FILE), "names no sharded_backend")])
    return backend


def _require_torch_dist(directory: Path) -> None:
    found = _format_of(directory)
    if found is None:
        raise damaged([Offender(str(directory / BACKEND_FILE), "is missing")])
    if found != "torch_dist":
        raise CheckpointError(
            f"The checkpoint is of the format {found}, and torch_dist alone is read.",
            [Offender(str(directory), f"holds a checkpoint of the format {found}")],
            _WAYS_OUT.get(found, "Save it with Megatron-Core's torch_dist (--ckpt-format torch_dist)."),
        )


def _no_checkpoint(directory: Path, reason: str, remedy: str) -> CheckpointError:
    return CheckpointError("There is no such checkpoint.", [Offender(str(directory), reason)], remedy)
