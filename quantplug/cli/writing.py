"""The course of a command that writes a checkpoint: its clock, its bar, what is proved and said, its exit status."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from quantplug.cli.options import run_family_files
from quantplug.cli.result import no_room, print_result, result_json
from quantplug.cli.terminal import ByteBar, Say, Terminal, command_line, terminal
from quantplug.errors import ArgumentError, Offender

if TYPE_CHECKING:
    from quantplug.export.files.finish import ExportResult
    from quantplug.verify import VerifyReport


def write_and_say(
    say: Say,
    destination: Path,
    write: Callable[[ByteBar], "ExportResult"],
    *,
    families: Sequence[Path],
    dry_run: bool,
    source: Callable[[], Path] | None = None,
) -> None:
    """Writes a checkpoint and says what was written; where a page is asked for, verifies it and writes the page.

    Args:
        destination: Where `write` writes.
        write: Does it, or plans it; says to the bar how far it is.
        families: Files to run before.
        source: Finds the directory with which what was written is compared; None where it can be compared with none.

    Raises:
        typer.Exit: It cannot be done, or what was written is not right.
    """
    # A clock that no time server sets back.
    start = time.perf_counter()
    with terminal(say, partial(_kept_of, destination)) as here:
        run_family_files(families)
        _refuse_page_of_nothing(say.html, dry_run=dry_run)
        with here.byte_bar() as bar:
            result = write(bar)
            seconds = time.perf_counter() - start
            report = None
            if say.html is not None:
                report = _proved(destination, None if source is None else source(), say.html, bar)
        _say_result(result, seconds, here)
        if report is not None:
            _say_proved(report, here)


def _refuse_page_of_nothing(html: Path | None, *, dry_run: bool) -> None:
    """Refuses a page of what a dry run has not written.

    Raises:
        ArgumentError: One is asked for.
    """
    if dry_run and html is not None:
        raise ArgumentError(
            "A page shows what was written, and a dry run writes nothing.",
            [Offender("--html", f"is {html}, beside --dry-run")],
            "Leave one of them out; --json FILE has the plan for programs.",
        )


def _proved(directory: Path, source: Path | None, html: Path, bar: ByteBar) -> "VerifyReport":
    """Verifies what was written, and writes the page."""
    from quantplug.html_report import write_html  # Without a page, nothing need wait for the judge.
    from quantplug.verify import judge

    judgement = judge(directory, source, partial(bar, "verifying"))
    write_html(judgement, html)
    return judgement.report


def _say_result(result: "ExportResult", seconds: float, here: Terminal) -> None:
    """Says what was written; of a dry run what would be, and exits where the disk has no room for it."""
    here.write_json(result_json(result, seconds))
    print_result(result, seconds, here.console)
    if result.preview is not None and (problem := no_room(result.preview)) is not None:
        here.exit_with(problem)


def _say_proved(report: "VerifyReport", here: Terminal) -> None:
    """Says the verdict of what was written; where it is not OK, that is the command's exit status, 1."""
    from quantplug.cli.report import print_report  # As above.

    print_report(report, here.console, limit=20)
    if not report.ok:
        raise typer.Exit(1)


def _kept_of(destination: Path) -> str:
    """What a run that was stopped has left, and how to go on."""
    from quantplug.export.files.staging import unfinished_of  # Help need not wait for torch.

    unfinished = unfinished_of(destination)
    # It becomes visible as a whole: what is there was written to its end, and only its report is missing.
    if destination.is_dir() and any(destination.iterdir()):
        return f"{destination} is complete, but not verified: quantplug verify {destination} does that."
    if not unfinished.exists():
        return f"Nothing was finished, and nothing is left: run the same command to begin again.\n  {command_line()}"
    return (
        f"Finished files are kept in {unfinished}: the same command goes on from there; or delete that directory.\n"
        f"  {command_line()}"
    )
