"""What is asked of a command that gets a hurt input: an end in its own words, soon, and nothing else touched."""

import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from quantplug.cli import app
from tests.faults.mutations import SECRET

LONGEST = 10.0  # Seconds of work that an input may take; those here take some hundredths.
LONGEST_WAIT = 60.0  # Seconds until one that does not work is taken to wait for ever, also on a busy machine.


def sandbox(directory: Path, **good: Path) -> None:
    """Copies of good directories by name, beside files that are none of their business."""
    (directory / "outside").mkdir(parents=True)
    (directory / "outside" / "secret.txt").write_text(SECRET)
    save_file({"model.norm.weight": torch.full((32,), 3.0)}, directory / "outside" / "model.safetensors")
    for name, source in good.items():
        shutil.copytree(source, directory / name)


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
    """The exit status of a command that ends as commands do."""
    with watchdog():
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in allowed, result.output
    assert result.exit_code == 0 or result.output
    assert "Traceback" not in result.output
    assert_printable(result.output)
    return result.exit_code


def assert_printable(text: str) -> None:
    assert all(line.isprintable() for line in text.split("\n")), repr(text)


def assert_written_alone(directory: Path, out: str, before: dict[str, tuple[int, int, int]]) -> None:
    """A command has written one directory, all of it files with nothing of others in them."""
    after = listing(directory)
    assert {name: it for name, it in after.items() if name.split("/")[0] != out} == before
    published = [path for path in (directory / out).rglob("*") if not path.is_dir()]
    assert not any(path.is_symlink() or SECRET.encode() in path.read_bytes() for path in published)
    assert all(path.name.isprintable() for path in published)


def stumbles(kind: str, seeds: Iterable[int], tmp_path: Path, check: Callable[[Path, int], None]) -> list[str]:
    """What went wrong with the inputs of a kind, each in a directory of its own."""
    stumbled = []
    for seed in seeds:
        directory = tmp_path / str(seed)
        try:
            check(directory, seed)
        except AssertionError as error:
            stumbled.append(f"{kind} {seed}: {error}"[:1000])
        shutil.rmtree(directory)
    return stumbled
