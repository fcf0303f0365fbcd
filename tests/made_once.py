"""Directories that the processes of a test run share: each is made by the first that asks for it.

With pytest-xdist every worker has a session of its own, and would make the same checkpoints once more.
"""

import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest


@dataclass(frozen=True)
class MadeOnce:
    """Directories by name, below one of the run's own."""

    shared: Path

    @classmethod
    def of_run(cls, factory: pytest.TempPathFactory) -> "MadeOnce":
        own = factory.getbasetemp()  # Of a worker: in that of the run.
        shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "made_once"
        shared.mkdir(exist_ok=True)
        return cls(shared)

    def __call__(self, name: str, make: Callable[[Path], object]) -> Path:
        """The directory of a name; `make` is called with a path to make it at. Nobody may change it afterwards."""
        made = self.shared / name
        with (self.shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # Until the file is closed.
            if not made.exists():
                with TemporaryDirectory(dir=self.shared) as work:
                    make(Path(work) / name)
                    (Path(work) / name).rename(made)
        return made
