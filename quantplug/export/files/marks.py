"""Marks of finished files, so that an export that goes on keeps only those that are still as they were written.

A mark lies beside the directory that becomes the checkpoint, not in it. It costs one look at a file that has just been
written, and so is in the page cache; it is read by the next run alone.
"""

import hashlib
from pathlib import Path

import torch

from quantplug.export.pipeline.fingerprint import fingerprint

_WORDS = 1024  # In a row: changed words are found by their row and their column.
_CHUNK_ROWS = 1024  # Of 1,024 words of 4 bytes: 4 MiB at a time, whatever the size of the file.


def leave_mark(path: Path, content: Path) -> None:
    """Says of a file what it holds; before it gets its name, so that no finished file is without.

    A mark that a crash tears is one that does not agree, and its file is written again: it needs no sync.

    Args:
        content: Where what it holds is until then.
    """
    _mark_of(path).write_text(_mark(content), encoding="utf-8")


def is_as_marked(path: Path) -> bool:
    """Whether a file is one that was finished, and still holds what it held then."""
    mark = _mark_of(path)
    if path.is_symlink() or not path.is_file() or not mark.is_file():
        return False
    return mark.read_text(encoding="utf-8") == _mark(path)


def _mark_of(path: Path) -> Path:
    # Above the directory that is published, which must hold nothing but the checkpoint.
    return path.parent.parent / f"{path.name}.mark"


def _mark(path: Path) -> str:
    """Changes with any changed bit; no cryptographic hash, which would take longer than packing."""
    # Bytes of a file read as FP32, whose bits are summed as integers: the widest type that has a compiled loop.
    # PyTorch's own sums take ten times as long, and keep a core busy for milliseconds after each, waiting for the next.
    words = torch.zeros(_CHUNK_ROWS, _WORDS, dtype=torch.float32)
    content, marks = words.view(torch.uint8).numpy().reshape(-1).data, hashlib.sha256()
    with path.open("rb") as file:
        while count := file.readinto(content):
            # The last chunk is short: what the one before it has left behind it must not count.
            words.view(torch.uint8).view(-1)[count:] = 0
            marks.update(f"{count} {fingerprint(words)}\n".encode())
    return marks.hexdigest()
