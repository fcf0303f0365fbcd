"""What a command proves of the checkpoint that it wrote, where a page of it is asked for."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from quantplug.cli.terminal import ByteBar

if TYPE_CHECKING:
    from quantplug.verify import VerifyReport


def proved(directory: Path, source: Path | None, html: Path | None, bar: ByteBar) -> "VerifyReport | None":
    """Verifies what was written, and writes the page; None, and nothing done, where no page is asked for."""
    if html is None:
        return None
    from quantplug.html_report import write_html  # Without a page, nothing need wait for the judge.
    from quantplug.verify import judge

    judgement = judge(directory, source, partial(bar, "verifying"))
    write_html(judgement, html)
    return judgement.report


def print_proved(report: "VerifyReport | None", console: Console) -> None:
    """Prints the verdict of what was written; where it is not OK, that is the command's exit status, 1."""
    if report is None:
        return
    from quantplug.cli.report import print_report

    print_report(report, console, limit=20)
    if not report.ok:
        raise typer.Exit(1)
