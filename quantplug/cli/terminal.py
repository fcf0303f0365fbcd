"""What the commands share at a terminal: results, a log of them, errors that end with a status, a bar of bytes."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

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

from quantplug.atomic import write_atomically
from quantplug.errors import ArgumentError, Offender, QuantplugError
from quantplug.printable import printable, printable_lines

USAGE_ERROR = 2
"""The exit status of a command that could not do what it was asked, as click's own for wrong options."""


INTERRUPTED = 130
"""The exit status of a command that Ctrl-C ended: 128 and the number of SIGINT, as shells have it."""

STDOUT = Path("-")
"""What `--json` is given to write to the standard output, in place of what people read."""

_LOG_WIDTH = 160


@dataclass(frozen=True)
class Say:
    """How a command says what it has found: options that all commands have.

    Attributes:
        quiet: Whether the standard output stays empty, but for JSON that is asked for there.
        log_file: What is appended to, with all that is shown, errors too, and the times of stages.
        json: Where the result is written as JSON; `STDOUT` for the standard output.
        html: Where a page of the result is written, by those commands that have one.
    """

    quiet: bool = False
    log_file: Path | None = None
    json: Path | None = None
    html: Path | None = None


class _Logged(Console):
    """A console of which everything goes into a log too, where there is one."""

    def __init__(self, log: Console | None, *, stderr: bool = False, quiet: bool = False) -> None:
        super().__init__(stderr=stderr, quiet=quiet)
        self._log = log

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **options)
        if self._log is not None:
            self._log.width = max(self.width, _LOG_WIDTH)
            self._log.print(*objects, **options)


class Terminal:
    """Where a command says its results, its errors and how far it is.

    Attributes:
        console: For results; silent where that is asked for.
    """

    def __init__(self, say: Say, log: Console | None = None) -> None:
        self._say = say
        self._log = log
        self.console: Console = _Logged(log, quiet=say.quiet or say.json == STDOUT)
        self._errors: Console = _Logged(log, stderr=True)

    def write_json(self, content: Mapping[str, Any]) -> None:
        """Writes a result where `--json` says; nothing without it.

        Raises:
            OSError: The file cannot be written.
        """
        if self._say.json is not None:
            self.write_json_text(json.dumps(content, indent=2, allow_nan=False) + "\n")

    def write_json_text(self, text: str) -> None:
        """The same of what is JSON already."""
        if self._say.json == STDOUT:
            typer.echo(text, nl=False)
        elif self._say.json is not None:
            # Before anything is printed: where the file cannot be written, nothing looks like a result.
            write_atomically(self._say.json, text)

    def print_error(self, message: str) -> None:
        """Prints on stderr, neither as markup nor wrapped: names and paths whole, to be searched for and copied."""
        self._errors.print(printable_lines(message), markup=False, highlight=False, soft_wrap=True)

    def exit_with(self, message: str, cause: Exception | None = None) -> NoReturn:
        """Prints a message on stderr and exits with `USAGE_ERROR`."""
        self.print_error(message)
        raise typer.Exit(USAGE_ERROR) from cause

    def note(self, text: str) -> None:
        """Writes a line with the time into the log, where there is one, and nowhere else."""
        if self._log is not None:
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            self._log.print(f"{now} {printable(text)}", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def byte_bar(self) -> Iterator["ByteBar"]:
        """The bar, on stderr where that is a terminal, and nowhere else: a pipe gets results alone."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        hidden = self._say.quiet or not sys.stderr.isatty()
        # On stderr, so that results can be sent through a pipe, and gone when it is done.
        with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
            yield ByteBar(progress, self.note)


@contextmanager
def terminal(say: Say, stopped: Callable[[], str] = lambda: "Nothing was written.") -> Iterator[Terminal]:
    """A terminal for one command: an error that is the user's to mend is printed without a traceback.

    It then exits with `USAGE_ERROR`, and with `INTERRUPTED` after Ctrl-C.

    Args:
        stopped: What to say of what is kept when Ctrl-C ends the command, and of how to go on.
    """
    with ExitStack() as opened:
        here = Terminal(say)
        try:
            writable(say.json, say.html, say.log_file)
            if say.log_file is not None:
                file = opened.enter_context(say.log_file.open("a", encoding="utf-8"))
                here = Terminal(say, Console(file=file, color_system=None, width=_LOG_WIDTH))
            here.note(command_line())
            yield here
            here.note("done")
        # What is left are bugs, whose traceback is wanted. An OSError says of its own accord what file it is about.
        except (KeyboardInterrupt, QuantplugError, OSError) as problem:
            _end(here, problem, stopped)


def _end(here: Terminal, problem: BaseException, stopped: Callable[[], str]) -> NoReturn:
    if isinstance(problem, Exception):
        here.exit_with(str(problem), problem)
    here.print_error(f"Stopped.\n{stopped()}")
    raise typer.Exit(INTERRUPTED) from problem


def writable(*reports: Path | None) -> None:
    """Looks, before the work, whether the directories of reports are there.

    Raises:
        ArgumentError: One is not.
    """
    parents = dict.fromkeys(report.parent for report in reports if report is not None)
    if offenders := [Offender(str(parent), "is not a directory") for parent in parents if not parent.is_dir()]:
        remedy = "Make that directory, or write the report elsewhere."
        raise ArgumentError("The report cannot be written.", offenders, remedy)


def command_line() -> str:
    """The command as it was given, to be copied into a shell."""
    return shlex.join(("quantplug", *sys.argv[1:]))


class ByteBar:
    """A progress callback that draws one bar of bytes, with speed and time left; a new stage starts it afresh."""

    def __init__(self, progress: Progress, note: Callable[[str], None]) -> None:
        self._progress = progress
        self._note = note
        self._task = progress.add_task("", total=None)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._progress.tasks[self._task].description != stage:
            self._note(f"{stage}: {total:,} bytes")
            # Starts the clock anew as well: the speed of one stage says nothing about the time that the next one takes.
            self._progress.reset(self._task, description=stage, total=total)
        self._progress.update(self._task, completed=done, total=total)


def plain(text: str) -> Text:
    """The text itself: no markup, and control characters spelled out, since a checkpoint's names are anybody's."""
    return Text(printable(text), overflow="fold")
