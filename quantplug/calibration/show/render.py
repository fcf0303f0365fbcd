"""The "Quantization Statistics" table as text: on a wide terminal, on a narrow one, and in a pipe."""

from collections import Counter

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from quantplug.calibration.statistics import AmaxSource, CalibrationTable, StatisticsRow

TITLE = "Quantization Statistics"
# Below this width, folding a name into what the other columns leave makes it unreadable.
LEAST_NAME_WIDTH = 24

COLD = "cold"

_STYLES = {
    AmaxSource.MISSING: "bold red",
    AmaxSource.FALLBACK: "yellow",
    AmaxSource.FAN_OUT: "yellow",
    AmaxSource.DISABLED: "dim",
    AmaxSource.DYNAMIC: "dim",
}


def print_statistics(table: CalibrationTable, console: Console) -> None:
    """Prints the table so that every name can be read in full.

    In a pipe a row is a line, and `console` is made as wide as that takes. On a terminal long names fold; on a narrow
    one the numbers go below them.
    """
    wide = wide_table(table)
    # The measure of the table at more columns than it can need is how wide it wants to be.
    if not console.is_terminal:
        console.width = Measurement.get(console, console.options.update(max_width=10_000), wide).maximum
    # An empty table measures what the other columns and their headings take.
    least = Measurement.get(console, console.options, wide_table(CalibrationTable(()))).minimum + LEAST_NAME_WIDTH
    console.print(wide if console.width >= least else narrow_table(table))


def wide_table(table: CalibrationTable) -> Table:
    """One row for each quantizer."""
    wide = Table(title=TITLE, caption=summary(table), box=box.SIMPLE_HEAD)
    wide.add_column("Parameter Name", overflow="fold")
    wide.add_column("Expert", justify="right", no_wrap=True)
    wide.add_column("Shape", no_wrap=True)
    wide.add_column("Max Value", justify="right", no_wrap=True)
    wide.add_column("Source", no_wrap=True)
    counted = has_tokens(table)
    if counted:
        wide.add_column("Tokens", justify="right", no_wrap=True)
        wide.add_column("Coverage", justify="right", no_wrap=True)
    for row in table.rows:
        values = (row.parameter, _expert(row), str(row.shape), _amax(row), _source(row))
        tokens = (_tokens(row), _coverage(row)) if counted else ()
        wide.add_row(*values, *tokens, style=_style(row))
    return wide


def narrow_table(table: CalibrationTable) -> Table:
    """Two rows for each quantizer: its name, and below it what the wide table has beside it."""
    narrow = Table(title=TITLE, caption=summary(table), box=box.SIMPLE_HEAD)
    tokens = " / Tokens / Coverage" if has_tokens(table) else ""
    narrow.add_column(f"Parameter Name / Expert / Shape / Max Value / Source{tokens}", overflow="fold")
    for row in table.rows:
        expert = "" if row.expert is None else f"expert {row.expert}"
        seen = "" if row.tokens is None else f"{row.tokens} tokens"
        values = (expert, str(row.shape), _amax(row), _source(row), seen, _coverage(row))
        narrow.add_row(row.parameter, style=_style(row))
        narrow.add_row("  " + "  ".join(filter(None, values)), style=_style(row))
    return narrow


def summary(table: CalibrationTable) -> str:
    """How many quantizers there are of each source, and how many experts saw no token."""
    counts = Counter(row.source for row in table.rows)
    parts = [f"{counts[source]} {source.value}" for source in AmaxSource if counts[source]]
    # By expert, not by row: an expert has several quantizers.
    cold = {(row.key.stack, row.key.layer, row.key.expert) for row in table.rows if row.is_cold}
    text = f"{len(table.rows)} quantizers" + (f": {', '.join(parts)}" if parts else "")
    text += f"; {len(cold)} cold experts" if cold else ""
    known = any(row.weighted is not None for row in table.rows)
    return text + ("; weighted: by the router's probability" if known else "")


def has_tokens(table: CalibrationTable) -> bool:
    """Whether the experts' tokens were counted: without data there are none to show."""
    return any(row.tokens is not None for row in table.rows)


def _expert(row: StatisticsRow) -> str:
    return "" if row.expert is None else str(row.expert)


def _amax(row: StatisticsRow) -> str:
    return "-" if row.amax is None else f"{row.amax:.4e}"


def _source(row: StatisticsRow) -> str:
    """Where the amax comes from, and of routed experts' inputs whether the router's probability is in them."""
    if row.weighted is None:
        return row.source.value
    return f"{row.source.value}, {'weighted' if row.weighted else 'unweighted'}"


def _tokens(row: StatisticsRow) -> str:
    return "" if row.tokens is None else str(row.tokens)


def _coverage(row: StatisticsRow) -> str:
    if row.coverage is None:
        return ""
    return COLD if row.is_cold else f"{row.coverage:.2f}"


def _style(row: StatisticsRow) -> str:
    return _STYLES.get(row.source, "yellow" if row.is_cold else "")
