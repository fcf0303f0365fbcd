"""Files of a Megatron checkpoint, which is anybody's: regular ones inside of it, and only so much of them.

`save_checkpoint` notes the SHA-256 of every file in one of its own, `quantplug.json`; trainers note none.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

from quantplug.checkpoint.untrusted.files import open_file
from quantplug.errors import CheckpointError, Offender, SourceError

MOST_BYTES = 256 * 2**20
"""Largest index or settings that are read: an index of a million chunks of tensors has 150 MB."""

OWN_FILE = "quantplug.json"
"""What `save_checkpoint` notes beside the files that Megatron-Core writes."""

Digests = Mapping[str, Mapping[str, object]]
"""Path of a file below a checkpoint to its `bytes` and its `sha256`."""


def damaged(offenders: Sequence[Offender]) -> CheckpointError:
    """What is raised of files that are not what a trainer wrote."""
    return CheckpointError(
        "The checkpoint is damaged or incomplete.",
        offenders,
        "Copy it again from where it was saved, or save it again; links must stay within its directory.",
    )


def read_file(directory: Path, name: str, most: int = MOST_BYTES) -> bytes:
    """All of a small file of a checkpoint.

    Args:
        name: Its path below the directory.
        most: Bytes that it may have.

    Raises:
        CheckpointError: It is absent, no regular file, outside of the directory, too large, or may not be read.
    """
    with open_regular(directory, name) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise damaged([Offender(str(directory / name), f"has more than {most} bytes")])
    return content


def open_regular(directory: Path, name: str) -> BufferedReader:
    """Opens a regular file of a checkpoint for reading.

    Raises:
        CheckpointError: It is absent, no regular file, outside of the directory, or may not be read.
    """
    try:
        return open_file(directory, name)
    except SourceError as error:  # The same rules, said of a checkpoint of another kind.
        raise damaged(error.offenders) from error


def read_own_file(directory: Path) -> dict[str, Any]:
    """What `save_checkpoint` noted: `extra`, `versions`, `files` and the like; nothing if it did not write this.

    Raises:
        CheckpointError: It is damaged.
    """
    # A link that leads nowhere is damage; only where there is nothing at all did somebody else write the checkpoint.
    if not os.path.lexists(directory / OWN_FILE):
        return {}
    content = read_file(directory, OWN_FILE)
    try:
        noted = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise damaged([Offender(str(directory / OWN_FILE), f"is not JSON: {error}")]) from error
    parts = (noted.get("extra"), noted.get("files", {})) if isinstance(noted, dict) else (None,)
    if not all(isinstance(part, dict) for part in parts):
        raise damaged([Offender(str(directory / OWN_FILE), "is no object with the objects extra and files")])
    return dict(noted)


def require_as_saved(directory: Path, digests: Digests) -> None:
    """Refuses files that are not what was saved.

    Args:
        digests: Of all files, or of some.

    Raises:
        CheckpointError: Names every file.
    """
    offenders = []
    for name, saved in digests.items():
        try:
            with open_regular(directory, name) as file:
                if saved != digest_of(file):
                    offenders.append(Offender(str(directory / name), "is not what was saved: its SHA-256 differs"))
        except CheckpointError as error:
            offenders.extend(error.offenders)
    if offenders:
        raise damaged(offenders)


def digest_of(file: BufferedReader) -> dict[str, object]:
    """Size and SHA-256 of an open file, read in pieces: it may be larger than memory."""
    return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
