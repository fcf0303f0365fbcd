"""Files of a Megatron checkpoint, which is anybody's: regular ones inside of it, and only so much of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import IO

from quantplug.checkpoint.untrusted.files import open_file
from quantplug.errors import CheckpointError, Offender, SourceError

MOST_BYTES = 256 * 2**20
"""Largest index or settings that are read: an index of a million chunks of tensors has 150 MB."""


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


def open_regular(directory: Path, name: str) -> IO[bytes]:
    """Opens a regular file of a checkpoint for reading.

    Raises:
        CheckpointError: It is absent, no regular file, outside of the directory, or may not be read.
    """
    try:
        return open_file(directory, name)
    except SourceError as error:  # The same rules, said of a checkpoint of another kind.
        raise damaged(error.offenders) from error
