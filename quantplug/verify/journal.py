"""What a verify has found out so far, in a file, so that one that was interrupted goes on where it was.

One line of JSON for each tensor that was looked at. The first line binds the file to both directories, by what the file
system says of every file that is read, and to the code that looked: where either is another one, all begins anew. Each
line carries a digest of itself and of those above it, so that what a crash has cut or mixed up counts as not there: a
journal can only spare work. One that came to its end is removed, for a later verify has to look at the disk again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch

import quantplug
from quantplug.checkpoint.lock import take_lock
from quantplug.errors import ArgumentError, Offender
from quantplug.verify.checks import Check
from quantplug.verify.inventory.checkpoint import Checkpoint, TensorInfo
from quantplug.verify.report import Finding, Severity
from quantplug.verify.threads import in_threads

_KIND = "quantplug verify"
_DIGITS = 16  # of a line's digest, which guards against accidents

Result = TypeVar("Result")


@cache
def _code() -> str:
    """A digest of the package: a version tells releases apart, and not what somebody has changed since."""
    sources = sorted(Path(quantplug.__file__).parent.rglob("*.py"))
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Journal:
    """The file, open and locked; a context manager, left without an error when the verify has come to its end.

    Args:
        path: Need not exist yet.
        checkpoints: All that are read.
        beside: Files that are read beside them.

    Raises:
        ArgumentError: It cannot be written, is in one of the directories, is in use, or is somebody else's.
    """

    def __init__(self, path: Path, checkpoints: Sequence[Checkpoint], beside: Sequence[Checkpoint] = ()) -> None:
        read = (*checkpoints, *beside)
        files = [(str(it.directory.resolve()), sorted(it.identities.items())) for it in read]
        mark = hashlib.sha256(f"{_code()} {files}".encode(errors="surrogatepass")).hexdigest()
        self._path, self._first = path, {"of": _KIND, "mark": mark}
        self._found: dict[tuple[str, str], Any] = {}
        self._chain = hashlib.sha256()
        if any(path.resolve().is_relative_to(it.directory.resolve()) for it in checkpoints):
            raise _unusable(path, "is in a directory that is verified")
        if os.path.lexists(path) and not path.is_file():
            raise _unusable(path, "is not a file")
        try:
            self._descriptor = take_lock(path)
        except BlockingIOError as error:
            raise _unusable(path, "is in use by a verify that still runs") from error
        except OSError as error:
            raise _unusable(path, f"cannot be written: {error.strerror}") from error
        try:
            self._take_up()
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            # Before the lock is let go: nobody else can have begun to write to it.
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def found(self, stage: str, name: str) -> Any | None:
        """What was kept of a tensor; None if nothing was."""
        return self._found.get((stage, name))

    def keep(self, stage: str, name: str, value: Any) -> None:
        """Notes what was found out of a tensor, as JSON."""
        self._write({"stage": stage, "name": name, "found": value})

    def _take_up(self) -> None:
        """Reads what is there, as far as it holds; all of another verify's is dropped."""
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            content = file.read()
        end = 0
        for number, line in enumerate(content.splitlines(keepends=True)):
            entry = self._entry(line)
            if number == 0 and content and (entry is None or entry.get("of") != _KIND):
                raise _unusable(self._path, "is there and is no journal of a verify")
            if entry is None or (number == 0 and entry != self._first):
                break
            self._chain.update(line)
            if number:
                self._found[entry["stage"], entry["name"]] = entry["found"]
            end += len(line)
        os.ftruncate(self._descriptor, end)
        os.lseek(self._descriptor, end, os.SEEK_SET)
        if not end:
            self._chain = hashlib.sha256()
            self._write(self._first)

    def _entry(self, line: bytes) -> dict[str, Any] | None:
        """What a line says, if it is whole and follows those above it."""
        digest, _, text = line.partition(b" ")
        if not line.endswith(b"\n") or digest != self._digest(text):
            return None
        entry: dict[str, Any] = json.loads(text)
        return entry

    def _write(self, entry: Mapping[str, Any]) -> None:
        text = json.dumps(entry).encode() + b"\n"
        line = self._digest(text) + b" " + text
        self._chain.update(line)
        while line:
            line = line[os.write(self._descriptor, line) :]

    def _digest(self, text: bytes) -> bytes:
        digest = self._chain.copy()
        digest.update(text)
        return digest.hexdigest()[:_DIGITS].encode()


def in_journal(
    journal: Journal | None,
    stage: str,
    look: Callable[[TensorInfo], Result],
    tensors: Iterable[TensorInfo],
    form: "Form[Result]",
) -> Iterator[tuple[TensorInfo, Result]]:
    """Each tensor with what `look` gives of it, in order, or has given before; see `in_threads`."""
    if journal is None:
        yield from in_threads(look, tensors)
        return

    def look_once(info: TensorInfo) -> tuple[bool, Result]:
        kept = journal.found(stage, info.name)
        return (True, look(info)) if kept is None else (False, form.of_json(kept))

    for info, (is_new, result) in in_threads(look_once, tensors):
        if is_new:
            journal.keep(stage, info.name, form.to_json(result))
        yield info, result


@dataclass(frozen=True)
class Form(Generic[Result]):
    """How a result is JSON, and the result again."""

    to_json: Callable[[Result], Any]
    of_json: Callable[[Any], Result]


def findings_to_json(findings: Iterable[Finding]) -> list[list[str]]:
    return [[finding.severity, finding.check, finding.subject, finding.message] for finding in findings]


def findings_of_json(kept: Iterable[Sequence[str]]) -> list[Finding]:
    return [Finding(Severity(severity), Check(check), *said) for severity, check, *said in kept]


def _unusable(path: Path, reason: str) -> ArgumentError:
    return ArgumentError(
        "The progress of the verify cannot be kept there.",
        [Offender(str(path), reason)],
        "Name a new file outside of both directories.",
    )
