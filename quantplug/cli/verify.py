"""`quantplug verify`: the judge of quantized checkpoints."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from quantplug.cli.options import FamilyFiles, JsonFile, LogFile, Quiet, run_family_files
from quantplug.cli.terminal import Say, command_line, terminal

EXAMPLES = (
    "quantplug verify OUT",
    "quantplug verify OUT --source DIR --json report.json --html report.html",
    "quantplug verify OUT --source DIR --moments FILE",
    "quantplug verify OUT --source DIR --resume progress",
)


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The checkpoint to judge, of whichever tool.")],
    source: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The checkpoint it was quantized from: plain, FP8 in blocks, or MXFP4."),
    ] = None,
    moments: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Judge by errors of outputs: what write_input_moments wrote of the model."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep progress here: the same command, stopped, goes on where it was."),
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Findings to show of each check; 0 shows all.")] = 20,
    family: FamilyFiles = None,
    json: JsonFile = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page to look at here: one file, no network.")
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For the page: statistics of the calibration, of --stats-json."),
    ] = None,
    quiet: Quiet = False,
    log_file: LogFile = None,
) -> None:
    """Judges a quantized checkpoint by its files alone: no model, no GPU.

    Exit status: 0 without errors (warnings may remain), 1 with errors, 2 when it could not be asked so, 130 when Ctrl-C
    stops it.
    """
    from quantplug.calibration.statistics import CalibrationTable  # Help need not wait for torch.
    from quantplug.cli.report import print_report
    from quantplug.html_report import write_html
    from quantplug.verify import judge

    def kept() -> str:
        if resume is None:
            return f"Nothing was proved. With --resume FILE it goes on where it was.\n  {command_line()} --resume FILE"
        return f"What was found so far is kept in {resume}: run the same command again to go on.\n  {command_line()}"

    with terminal(Say(quiet, log_file, json, html), kept) as here:
        run_family_files(family or ())
        statistics = None if stats is None else CalibrationTable.load(stats)
        with here.byte_bar() as bar:
            judgement = judge(directory, source, partial(bar, "reading"), resume=resume, moments=moments)
        report = judgement.report
        # Before the table is printed: where the file cannot be written, the exit status is 2 and nothing looks like a
        # verdict.
        here.write_json_text(report.to_json())
        if html is not None:
            write_html(judgement, html, statistics)
        print_report(report, here.console, limit)
        # 1 is a verdict, 2 that there is none: scripts must be able to tell a bad checkpoint from a mistyped path.
        raise typer.Exit(0 if report.ok else 1)
