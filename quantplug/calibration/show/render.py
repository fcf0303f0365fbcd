"""The "Quantization Statistics" table as text: a line for each layer and kind of module, or one for each quantizer."""

from collections import Counter

from rich.console import Console

from quantplug.calibration.show.kinds import ModulesOfLayer, Outlier, by_layer_and_kind, outliers
from quantplug.calibration.show.sheet import Column, Row, Sheet
from quantplug.calibration.statistics import AmaxSource, CalibrationTable, StatisticsRow
from quantplug.printable import printable

TITLE = "Quantization Statistics"
COLD = "cold"

MOST_OUTLIERS = 20
"""How many are named below the table."""

_STYLES = {
    AmaxSource.MISSING: "bold red",
    AmaxSource.FALLBACK: "yellow",
    AmaxSource.FAN_OUT: "yellow",
    AmaxSource.DISABLED: "dim",
    AmaxSource.DYNAMIC: "dim",
}


def print_statistics(table: CalibrationTable, console: Console, *, every_row: bool = False) -> None:
    """Prints the table so that every name can be read in full, in a pipe and on a terminal of any width.

    Args:
        console: In a pipe it is made as wide as the table is.
        every_row: Whether each quantizer has a line of its own; else the experts of a layer share one, and those whose
            amax is far from the others' are named below.
    """
    if every_row:
        _every_row(table).print_to(console)
        return
    _by_kind(table).print_to(console)
    unlike = outliers(table)
    for outlier in unlike[:MOST_OUTLIERS]:
        console.print(_said(outlier), markup=False, highlight=False, soft_wrap=True)
    if len(unlike) > MOST_OUTLIERS:
        console.print(f"and {len(unlike) - MOST_OUTLIERS} more", soft_wrap=True)


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


def _by_kind(table: CalibrationTable) -> Sheet:
    """A line for each layer and kind of module."""
    columns = [
        Column("N", "{} of them"),
        Column("Min", "min {}"),
        Column("Median", "median {}"),
        Column("Max", "max {}"),
        Column("Max/Min", "max/min {}"),
        Column("Source", right=False),
    ]
    counted = has_tokens(table)
    if counted:
        columns += [Column("Tokens", "{} tokens"), Column("Cold", "{} cold")]
    rows = [_kind_row(kind, counted) for kind in by_layer_and_kind(table)]
    return Sheet(TITLE, "Quantizers", columns, rows, summary(table))


def _kind_row(kind: ModulesOfLayer, counted: bool) -> Row:
    ends = (kind.amaxes[0], kind.median, kind.amaxes[-1]) if kind.amaxes else (None, None, None)
    spread = "" if kind.spread is None else f"{kind.spread:.2f}"
    sources = kind.sources
    # Which of several a source is of is said by every row.
    source = ", ".join(f"{count} {it.value}" if len(sources) > 1 else it.value for it, count in sources.items())
    source += _weighted(kind.rows[0])
    values = [str(len(kind.rows)), *map(_number, ends), spread, source]
    if counted:
        tokens = kind.tokens
        seen = "" if not tokens else f"{tokens[0]}-{tokens[-1]}" if tokens[0] != tokens[-1] else str(tokens[0])
        values += [seen, str(kind.cold) if kind.cold else ""]
    styles = [_STYLES[source] for source in sources if source in _STYLES]
    # The worst of them; `AmaxSource` has the worst first. What is not quantized is dim where that is all.
    style = styles[0] if styles and (styles[0] != "dim" or len(sources) == 1) else ""
    return Row(kind.name, values, style or ("yellow" if kind.cold else ""))


def _said(outlier: Outlier) -> str:
    expert = "" if outlier.row.expert is None else f" (expert {outlier.row.expert})"
    return f"Outlier: {printable(outlier.row.parameter)}{expert} {outlier.reason}"


def _every_row(table: CalibrationTable) -> Sheet:
    """A line for each quantizer."""
    columns = [
        Column("Expert", "expert {}"),
        Column("Shape", right=False),
        Column("Max Value"),
        Column("Source", right=False),
    ]
    counted = has_tokens(table)
    if counted:
        columns += [Column("Tokens", "{} tokens"), Column("Coverage")]
    rows = []
    for row in table.rows:
        values = [_expert(row), str(row.shape), _number(row.amax), f"{row.source.value}{_weighted(row)}"]
        values += [_tokens(row), _coverage(row)] if counted else []
        rows.append(Row(row.parameter, values, _style(row)))
    return Sheet(TITLE, "Parameter Name", columns, rows, summary(table))


def _expert(row: StatisticsRow) -> str:
    return "" if row.expert is None else str(row.expert)


def _number(amax: float | None) -> str:
    return "-" if amax is None else f"{amax:.4e}"


def _weighted(row: StatisticsRow) -> str:
    """Of routed experts' inputs whether the router's probability is in the amax; one calibration treats all alike."""
    return "" if row.weighted is None else f", {'weighted' if row.weighted else 'unweighted'}"


def _tokens(row: StatisticsRow) -> str:
    return "" if row.tokens is None else str(row.tokens)


def _coverage(row: StatisticsRow) -> str:
    if row.coverage is None:
        return ""
    return COLD if row.is_cold else f"{row.coverage:.2f}"


def _style(row: StatisticsRow) -> str:
    return _STYLES.get(row.source, "yellow" if row.is_cold else "")
