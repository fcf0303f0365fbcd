"""`quantplug stats`: the amaxes of a calibrated model, and where they come from."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantplug.cli.options import JsonFile, LogFile, Quiet
from quantplug.cli.terminal import Say, Terminal, terminal

if TYPE_CHECKING:
    from quantplug.calibration.statistics import CalibrationTable

EXAMPLES = (
    "quantplug stats stats.json",
    "quantplug stats stats.json --filter 'decoder.layers.3.*' --all",
    "quantplug stats stats.json --plot amax.png",
)


def stats(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What examples/quantize.py wrote to --stats-json.")],
    every_row: Annotated[
        bool, typer.Option("--all", help="A line for each quantizer, not one for each layer and kind of module.")
    ] = False,
    matching: Annotated[
        str | None,
        typer.Option("--filter", metavar="PATTERN", help="Only names like 'decoder.layers.3.*' or '*.linear_fc1.*'."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Draw amax by layer and expert here (.png, .pdf or .svg).")
    ] = None,
    json: JsonFile = None,
    quiet: Quiet = False,
    log_file: LogFile = None,
) -> None:
    """Shows the "Quantization Statistics" table of a calibrated model.

    A line for each layer and kind of module: how many quantizers, their amaxes, tokens and cold experts. Below it those
    whose amax is far from that of their peers.

    Exit status: 0, or 2 when the file cannot be read, or the plot cannot be drawn.
    """
    from quantplug.calibration.show.render import print_statistics  # Help need not wait for torch.
    from quantplug.calibration.statistics import CalibrationTable

    with terminal(Say(quiet, log_file, json)) as here:
        table = CalibrationTable.load(file)
        if matching is not None:
            table = table.matching(matching)
        if plot is not None:
            _save_plot(table, plot, here)
        here.write_json_text(table.to_json())
        # After the plot: nothing that looks like a result is printed where the exit status says that there is none.
        print_statistics(table, here.console, every_row=every_row)


def _save_plot(table: "CalibrationTable", path: Path, here: Terminal) -> None:
    try:
        from quantplug.calibration.show.plots import save_plot  # An extra: all else works without matplotlib.
    except ModuleNotFoundError as missing:
        here.exit_with(f'--plot draws with matplotlib: {missing}.\nWhat to do: pip install "quantplug[plots]"', missing)
    save_plot(table, path)
