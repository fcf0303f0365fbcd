"""`quantplug stats`: the amax of every expert, and where it comes from."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from quantplug.cli.terminal import exit_with, user_errors

if TYPE_CHECKING:
    from quantplug.calibration.statistics import CalibrationTable


def stats(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What examples/quantize.py wrote to --stats-json.")],
    plot: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Draw amax by layer and expert here (.png, .pdf or .svg).")
    ] = None,
) -> None:
    """Shows the "Quantization Statistics" table of a calibrated model.

    Exit status: 0, or 2 when the file cannot be read, or the plot cannot be drawn.
    """
    from quantplug.calibration.show.render import print_statistics  # Help need not wait for torch.
    from quantplug.calibration.statistics import CalibrationTable

    with user_errors():
        table = CalibrationTable.load(file)
        if plot is not None:
            _save_plot(table, plot)
    # After the plot: nothing that looks like a result is printed where the exit status says that there is none.
    print_statistics(table, Console())


def _save_plot(table: "CalibrationTable", path: Path) -> None:
    try:
        from quantplug.calibration.show.plots import save_plot  # An extra: all else works without matplotlib.
    except ModuleNotFoundError as missing:
        exit_with(f'--plot draws with matplotlib: {missing}.\nWhat to do: pip install "quantplug[plots]"', missing)
    save_plot(table, path)
