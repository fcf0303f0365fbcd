"""What the examples share at the terminal: one progress bar a stage, and errors that read like sentences."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from quantplug import QuantplugError
from quantplug.printable import printable, printable_lines

FIRST_RANK = int(os.environ.get("RANK", "0")) == 0
out = Console(quiet=not FIRST_RANK)
err = Console(stderr=True)


def say(text: str) -> None:
    """Prints a line on the first rank: no markup, and nothing in it, such as a path, that a terminal would obey."""
    out.print(printable(text), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """Prints an error that is the user's to mend without a traceback, and exits with status 1; 130 after Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        say("Stopped. Files that an export had finished are kept: the same command goes on from there.")
        raise SystemExit(130) from interrupt
    except (QuantplugError, OSError) as error:
        # soft_wrap: names and paths stay whole, to be searched for and copied.
        said = printable_lines(f"{type(error).__name__}: {error}")
        err.print(said, markup=False, highlight=False, style="red", soft_wrap=True)
        raise SystemExit(1) from error


class StageBars:
    """A progress callback: draws a bar for every stage it is called with, on the first rank's stderr."""

    def __init__(self) -> None:
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), *times)
        self._progress = Progress(*columns, console=err, disable=not FIRST_RANK or not sys.stderr.isatty())
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._progress.start()
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)
        if done == total:
            self._progress.stop()
