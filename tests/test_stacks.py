"""`make setup` without a word takes the newest stack that the Python at hand can have."""

import os
import subprocess
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
STACKS = {file.stem for file in (TOOLS / "stacks").glob("*.txt")}


def choose(python: Path, stack: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": str(python), "STACK": stack}
    return subprocess.run([TOOLS / "choose_stack"], env=environment, capture_output=True, text=True, timeout=60)


def python(version: str, directory: Path) -> Path:
    """Answers for a Python of a version that this machine may not have."""
    path = directory / "python3"
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(("version", "stack"), [("3.11", "oldest"), ("3.12", "newest"), ("3.13", "newest")])
def test_the_newest_that_a_python_can_have_is_the_default(version: str, stack: str, tmp_path: Path) -> None:
    path = python(version, tmp_path)
    assert choose(path).stdout == f"{stack} .venv {path}\n"
    assert choose(path, stack).stdout == f"{stack} .venv-{stack} {path}\n"


def test_a_python_without_a_stack_is_refused_with_those_that_have_one(tmp_path: Path) -> None:
    run = choose(python("3.10", tmp_path))
    assert run.returncode != 0
    assert run.stderr == (
        "setup: Python 3.10 has no stack: 3.12 or 3.13 is needed for the newest, 3.11 for the oldest\n"
    )


def test_a_stack_that_the_python_cannot_have_is_refused(tmp_path: Path) -> None:
    run = choose(python("3.11", tmp_path), "newest")
    assert run.returncode != 0
    assert "the stack newest needs Python 3.12 or 3.13" in run.stderr


def test_every_stack_has_a_megatron_bridge() -> None:
    assert {file.stem for file in (TOOLS / "stacks" / "bridge").glob("*.txt")} == STACKS
