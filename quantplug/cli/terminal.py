"""What the commands share at a terminal: errors that end with a status, a bar of bytes, and text as it is."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from quantplug.errors import ArgumentError, Offender, QuantplugError
from quantplug.printable import printable, printable_lines

USAGE_ERROR = 2
"""The exit status of a command that could not do what it was asked, as click's own for wrong options."""


INTERRUPTED = 130
"""The exit status of a command that Ctrl-C ended: 128 and the number of SIGINT, as shells have it."""


@contextmanager
def user_errors(stopped: Callable[[], str] = lambda: "Nothing was written.") -> Iterator[None]:
    """Prints an error that is the user's to mend on stderr, without a traceback, and exits with `USAGE_ERROR`.

    Args:
        stopped: What to say of what is kept when Ctrl-C ends the command, and of how to go on.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        _print_whole(f"Stopped.\n{stopped()}")
        raise typer.Exit(INTERRUPTED) from interrupt
    # What is left are bugs, whose traceback is wanted. An OSError says of its own accord what file it is about.
    except (QuantplugError, OSError) as problem:
        exit_with(str(problem), problem)


def exit_with(message: str, cause: Exception) -> NoReturn:
    """Prints a message on stderr and exits with `USAGE_ERROR`."""
    _print_whole(message)
    raise typer.Exit(USAGE_ERROR) from cause


def writable(*reports: Path | None) -> None:
    """Looks, before the work, whether the directories of reports are there.

    Raises:
        ArgumentError: One is not.
    """
    parents = dict.fromkeys(report.parent for report in reports if report is not None)
    if offenders := [Offender(str(parent), "is not a directory") for parent in parents if not parent.is_dir()]:
        remedy = "Make that directory, or write the report elsewhere."
        raise ArgumentError("The report cannot be written.", offenders, remedy)


def _print_whole(message: str) -> None:
    # Neither markup nor wrapping: names and paths are shown as they are, whole, to be searched for and copied.
    Console(stderr=True).print(printable_lines(message), markup=False, highlight=False, soft_wrap=True)


class ByteBar:
    """A progress callback that draws one bar of bytes, with speed and time left; a new stage starts it afresh."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("reading", total=None)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._progress.tasks[self._task].description != stage:
            # Starts the clock anew as well: the speed of one stage says nothing about the time that the next one takes.
            self._progress.reset(self._task, description=stage, total=total)
        self._progress.update(self._task, completed=done, total=total)


@contextmanager
def byte_bar() -> Iterator[ByteBar]:
    """The bar, on stderr where that is a terminal, and nowhere else: a pipe gets results alone."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # On stderr, so that results can be sent through a pipe, and gone when it is done.
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        yield ByteBar(progress)


def plain(text: str) -> Text:
    """The text itself: no markup, and control characters spelled out, since a checkpoint's names are anybody's."""
    return Text(printable(text), overflow="fold")
