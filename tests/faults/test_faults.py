"""A thousand hurt directories: every command does its work or refuses in its own words, and touches nothing else.

Of each input: an exit status, no traceback, no control code, no hang, no directory left after an error, nothing of what
lies outside read into the result or changed. `QUANTPLUG_FAULTS=1000` runs all of them, the default every third.
"""

import os
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from quantplug.cli import app
from tests.faults.mutations import MUTATIONS, SECRET, good_checkpoint

INPUTS = int(os.environ.get("QUANTPLUG_FAULTS", "324"))
LONGEST = 10.0  # Seconds of work that an input may take; those here take some hundredths.
LONGEST_WAIT = 60.0  # Seconds until one that does not work is taken to wait for ever, also on a busy machine.
CASES = [(kind, range(start, INPUTS, len(MUTATIONS))) for start, kind in enumerate(MUTATIONS)]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, after a first run of both commands, which imports and compiles what they need."""
    directory = tmp_path_factory.mktemp("good")
    source = good_checkpoint(directory / "source")
    for arguments in (
        ("quantize", source, directory / "out", "--format", "w4a16_nvfp4"),
        ("verify", directory / "out"),
    ):
        assert CliRunner().invoke(app, [str(argument) for argument in arguments]).exit_code == 0
    return source


def sandbox(good: Path, directory: Path) -> Path:
    """A copy of the good checkpoint, beside files that are none of its business."""
    (directory / "outside").mkdir(parents=True)
    (directory / "outside" / "secret.txt").write_text(SECRET)
    save_file({"model.norm.weight": torch.full((32,), 3.0)}, directory / "outside" / "model.safetensors")
    return shutil.copytree(good, directory / "source")


def listing(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below a directory, links not followed: mode, size and time of change."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(directory))] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


@contextmanager
def watchdog() -> Iterator[None]:
    """Ends whatever waits for a pipe or counts to 2^31: there the test fails, and goes no further."""

    def bark(number: int, frame: object) -> None:
        raise AssertionError(f"worked for more than {LONGEST} s, or waited for {LONGEST_WAIT} s")

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, LONGEST), (signal.ITIMER_REAL, signal.SIGALRM, LONGEST_WAIT))
    before = {number: signal.signal(number, bark) for _, number, _ in timers}
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, number, _ in timers:
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def run(allowed: set[int], *arguments: str | Path) -> int:
    with watchdog():
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in allowed, result.output
    assert result.exit_code == 0 or result.output
    assert "Traceback" not in result.output
    assert all(line.isprintable() for line in result.output.split("\n")), repr(result.output)
    return result.exit_code


def check(good: Path, directory: Path, kind: str, seed: int) -> None:
    source, out = sandbox(good, directory), directory / "out"
    MUTATIONS[kind](source, random.Random(f"{kind} {seed}"))
    before = listing(directory)
    status = run({0, 2}, "quantize", source, out, "--format", "w4a16_nvfp4")
    if status:
        assert listing(directory) == before
    else:
        assert {name: it for name, it in listing(directory).items() if name.split("/")[0] != "out"} == before
        published = [path for path in out.rglob("*") if not path.is_dir()]
        assert not any(path.is_symlink() or SECRET.encode() in path.read_bytes() for path in published)
        assert all(path.name.isprintable() for path in published)
        run({0, 1}, "verify", out, "--source", source)
        shutil.rmtree(out)
    run({0, 1}, "verify", source)
    assert listing(directory) == before


def test_the_good_one_is_good(good: Path, tmp_path: Path) -> None:
    source = sandbox(good, tmp_path)
    assert run({0}, "quantize", source, tmp_path / "out", "--format", "w4a16_nvfp4") == 0


@pytest.mark.parametrize(("kind", "seeds"), CASES, ids=[kind for kind, _ in CASES])
def test_no_input_is_stumbled_over(kind: str, seeds: range, good: Path, tmp_path: Path) -> None:
    stumbled = []
    for seed in seeds:
        directory = tmp_path / str(seed)
        try:
            check(good, directory, kind, seed)
        except AssertionError as error:
            stumbled.append(f"{kind} {seed}: {error}"[:1000])
        shutil.rmtree(directory)
    assert not stumbled, "\n".join(stumbled)
