"""The command line of quantplug."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

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

from quantplug.calibration.render import print_statistics
from quantplug.calibration.statistics import CalibrationTable
from quantplug.cli.tables import print_report, print_result
from quantplug.errors import QuantplugError
from quantplug.export.quantize_checkpoint import WeightOnlyFormat, quantize_checkpoint
from quantplug.verify import VerifyReport, verify_checkpoint

USAGE_ERROR = 2

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Quantized Hugging Face checkpoints from Transformer Engine models, and proof that they are right."""


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The checkpoint to judge, of whichever tool.")],
    source: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The checkpoint it was quantized from: plain, FP8 in blocks, or MXFP4."),
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the full report here.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Findings to show of each check; 0 shows all.")] = 20,
) -> None:
    """Judges a quantized checkpoint by its files alone: no model, no GPU.

    Exit status: 0 without errors (warnings may remain), 1 with errors, 2 when it could not be asked so.
    """
    try:
        report = _with_progress(directory, source)
        if json is not None:
            report.write_json(json)
    except (QuantplugError, OSError) as problem:
        Console(stderr=True).print(str(problem), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(USAGE_ERROR) from problem
    print_report(report, Console(), limit)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Directory or hub id: plain, FP8 in blocks, or MXFP4.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A directory that is new or empty.")],
    format: Annotated[WeightOnlyFormat, typer.Option(help="Formats that quantize weights alone.")],  # noqa: A002
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Modules to leave as they are, such as 'model.layers.0.*'; repeatable."),
    ] = None,
    quantize_mtp: Annotated[
        bool, typer.Option("--quantize-mtp", help="Quantize the layers of multi-token prediction too.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Carry over code that the source brings for its readers to run.")
    ] = False,
) -> None:
    """Quantizes the weights of a Hugging Face checkpoint: no Megatron-Core model, no GPU, no data.

    Killed, it goes on where it was when the same command is run again. Exit status: 0, or 2 when it cannot be done.
    """
    start = time.perf_counter()
    try:
        with _byte_progress() as progress:
            task = progress.add_task("reading", total=None)

            def show(stage: str, done: int, total: int) -> None:
                if progress.tasks[task].description != stage:
                    progress.reset(task, description=stage, total=total)
                progress.update(task, completed=done)

            result = quantize_checkpoint(
                source,
                destination,
                format,
                exclude=exclude or (),
                quantize_mtp=quantize_mtp,
                trust_remote_code=trust_remote_code,
                progress=show,
            )
    except (QuantplugError, OSError) as problem:
        Console(stderr=True).print(str(problem), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(USAGE_ERROR) from problem
    print_result(result, time.perf_counter() - start, Console())


@app.command()
def stats(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What examples/quantize.py wrote to --stats-json.")],
    plot: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Draw amax by layer and expert here (.png, .pdf or .svg).")
    ] = None,
) -> None:
    """Shows the "Quantization Statistics" table of a calibrated model.

    Exit status: 0, or 2 when the file cannot be read, or the plot cannot be drawn.
    """
    try:
        table = CalibrationTable.load(file)
        if plot is not None:
            _save_plot(table, plot)
    except (QuantplugError, OSError) as problem:
        Console(stderr=True).print(str(problem), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(USAGE_ERROR) from problem
    print_statistics(table, Console())


def _save_plot(table: CalibrationTable, path: Path) -> None:
    try:
        from quantplug.calibration.plots import save_plot  # An extra: all else works without matplotlib.
    except ModuleNotFoundError as missing:
        Console(stderr=True).print(
            f'--plot draws with matplotlib: {missing}.\nWhat to do: pip install "quantplug[plots]"', markup=False
        )
        raise typer.Exit(USAGE_ERROR) from missing
    save_plot(table, path)


def _with_progress(directory: Path, source: Path | None) -> VerifyReport:
    with _byte_progress() as progress:
        task = progress.add_task("reading", total=None)
        return verify_checkpoint(
            directory, source, lambda done, total: progress.update(task, completed=done, total=total)
        )


@contextmanager
def _byte_progress() -> Iterator[Progress]:
    """A bar of bytes, with speed and time left, on stderr when that is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        yield progress
