"""`quantplug verify`: the judge of quantized checkpoints."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from quantplug.cli.terminal import byte_bar, user_errors, writable

_GO_ON = "run the same command again to go on."
_KEPT_NOTHING = "Nothing was proved. With --resume FILE it goes on where it was."


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The checkpoint to judge, of whichever tool.")],
    source: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The checkpoint it was quantized from: plain, FP8 in blocks, or MXFP4."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep progress here: the same command, stopped, goes on where it was."),
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the full report here.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page to look at here: one file, no network.")
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For the page: statistics of the calibration, of --stats-json."),
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Findings to show of each check; 0 shows all.")] = 20,
) -> None:
    """Judges a quantized checkpoint by its files alone: no model, no GPU.

    Exit status: 0 without errors (warnings may remain), 1 with errors, 2 when it could not be asked so, 130 when Ctrl-C
    stops it.
    """
    from quantplug.calibration.statistics import CalibrationTable  # Help need not wait for torch.
    from quantplug.cli.report import print_report
    from quantplug.html_report import write_html
    from quantplug.verify import verify_checkpoint

    kept = _KEPT_NOTHING if resume is None else f"What was found so far is kept in {resume}: {_GO_ON}"
    with user_errors(lambda: kept):
        writable(json, html)
        statistics = None if stats is None else CalibrationTable.load(stats)
        with byte_bar() as bar:
            report = verify_checkpoint(directory, source, partial(bar, "reading"), resume=resume)
        if json is not None:
            # Before the table is printed: where the file cannot be written, the exit status is 2 and nothing looks like
            # a verdict.
            report.write_json(json)
        if html is not None:
            write_html(report, html, statistics)
    print_report(report, Console(), limit)
    # 1 is a verdict, 2 that there is none: scripts must be able to tell a bad checkpoint from a mistyped path.
    raise typer.Exit(0 if report.ok else 1)
