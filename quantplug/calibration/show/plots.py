"""The calibration table as a picture: amax of every expert as a heat map, of every other quantizer as a line.

Needs matplotlib: `pip install "quantplug[plots]"`.
"""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from quantplug.atomic import write_atomically
from quantplug.calibration.show.grids import ExpertGrid, expert_grids, label, layer_rows
from quantplug.calibration.statistics import AmaxSource, CalibrationTable, StatisticsRow
from quantplug.errors import DestinationError, Offender, SourceError

FORMATS = (".png", ".pdf", ".svg")
DOTS_PER_INCH = 150
CELL = 0.055  # Inches of a heat map's cell; fewer cells are larger, more of them smaller.
LEAST_PANEL = (5.0, 2.4)
MOST_PANEL = (12.0, 9.0)
MARGINS = (2.2, 1.1)  # Inches beside and below a panel for ticks, labels and the colour bar.
MOST_TICKS = 16
LEAST_RANGE = 1.2  # Ratio of a colour scale's ends: rounding of equal values must not look like a pattern.
AMAX = "amax, log scale"
LINE_COLORS = ("#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#17becf", "#bcbd22", "#000080")  # None that marks have.


class Mark(Enum):
    """Why a value has no place on a logarithmic scale: what the legend says, and its colour."""

    ZERO = ("0", "#ff7f0e")
    MISSING = ("enabled, without amax", "#d62728")
    OFF = ("not quantized, or dynamic", "#cfcfcf")
    NOT_FINITE = ("NaN or Inf", "#ff00ff")


MARKS = tuple(Mark)
Value = Callable[[StatisticsRow], float | Mark | None]


@dataclass(frozen=True, eq=False)
class HeatMap:
    """A value of every expert: layers down, experts across.

    Attributes:
        values: [layers, experts]; NaN where there is none on the scale.
        marks: [layers, experts] index into `MARKS`; NaN where there is a value, or no such expert in the table.
        unit: What the colour bar says.
    """

    title: str
    unit: str
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    values: npt.NDArray[np.float64]
    marks: npt.NDArray[np.float64]

    @classmethod
    def of(cls, grid: ExpertGrid, value: Value, title: str, unit: str) -> "HeatMap":
        values = np.full((len(grid.layers), len(grid.experts)), np.nan)
        marks = values.copy()
        for (layer, expert), row in grid.rows.items():
            cell = grid.layers.index(layer), grid.experts.index(expert)
            found = value(row)
            if isinstance(found, Mark):
                marks[cell] = MARKS.index(found)
            elif found is not None:
                values[cell] = found
        return cls(title, unit, grid.layers, grid.experts, values, marks)


@dataclass(frozen=True)
class LineChart:
    """Amax by layer: for each module its name and its rows."""

    title: str
    modules: tuple[tuple[str, list[StatisticsRow]], ...]


Panel = HeatMap | LineChart


def save_plot(table: CalibrationTable, path: Path) -> None:
    """Writes the figure as a file, PNG, PDF or SVG by its suffix, complete or not at all.

    Raises:
        DestinationError: The suffix is another.
        SourceError: The table has nothing to plot.
        OSError: The file cannot be written; what was there before is as it was.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise DestinationError(
            "A plot is not written in this format.",
            [Offender(str(path), f"has suffix {path.suffix!r}")],
            f"Give a path that ends in {', '.join(FORMATS)}.",
        )
    # Drawn in memory first, so that a failing draw leaves what was at the path.
    content = io.BytesIO()
    statistics_figure(table).savefig(content, format=suffix[1:], dpi=DOTS_PER_INCH)
    write_atomically(path, content.getvalue())


def statistics_figure(table: CalibrationTable) -> Figure:
    """Heat maps of what every expert has, and of its tokens; then, as lines, what a layer has once.

    Raises:
        SourceError: No quantizer in the table is enabled and belongs to a layer.
    """
    panels: list[Panel] = [*amax_maps(table), *token_maps(table), *line_charts(table)]
    if not panels:
        raise SourceError(
            "There is nothing to plot.",
            [Offender("rows", "none is an enabled quantizer of a layer")],
            "Quantize a model, and write its table with examples/quantize.py --stats-json FILE.",
        )
    return figure_of(panels)


def amax_maps(table: CalibrationTable) -> list[HeatMap]:
    """Amax by layer and expert, for each module that has an enabled quantizer."""
    grids = [grid for grid in expert_grids(table) if _is_quantized(grid.rows.values())]
    return [HeatMap.of(grid, amax_or_mark, f"amax of {label(grid.module)}", AMAX) for grid in grids]


def token_maps(table: CalibrationTable) -> list[HeatMap]:
    """Calibration tokens by layer and expert, if there are any; once, as all modules of an expert see the same."""
    grids = [grid for grid in expert_grids(table) if any(row.tokens is not None for row in grid.rows.values())]
    return [
        HeatMap.of(grid, tokens_or_mark, "tokens of experts", "calibration tokens, log scale") for grid in grids[:1]
    ]


def line_charts(table: CalibrationTable) -> list[LineChart]:
    """Amax by layer: of weights, and of inputs and outputs, whose scales differ."""
    modules = [(module, rows) for module, rows in layer_rows(table) if _is_quantized(rows)]
    weights = tuple(entry for entry in modules if not entry[0].endswith("_quantizer"))
    activations = tuple(entry for entry in modules if entry[0].endswith("_quantizer"))
    which = "other weights" if expert_grids(table) else "weights"
    charts = (LineChart(f"amax of {which}", weights), LineChart("amax of activations", activations))
    return [chart for chart in charts if chart.modules]


def amax_or_mark(row: StatisticsRow) -> float | Mark:
    """A row's amax where it is on a logarithmic scale."""
    if row.amax is None:
        return Mark.MISSING if row.source is AmaxSource.MISSING else Mark.OFF
    if not math.isfinite(row.amax):
        return Mark.NOT_FINITE
    return row.amax if row.amax > 0 else Mark.ZERO


def tokens_or_mark(row: StatisticsRow) -> float | Mark | None:
    """A row's tokens where they are on a logarithmic scale; None where they were not counted."""
    return Mark.ZERO if row.is_cold else row.tokens


def figure_of(panels: Sequence[Panel]) -> Figure:
    """The panels in two columns (one, if there is but one), all of the size that the largest needs."""
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    width, height = (max(sizes) for sizes in zip(*map(_size, panels), strict=True))
    # A Figure of its own, not pyplot's: that keeps every figure alive, and chooses a backend that may want a display.
    figure = Figure(figsize=(columns * width, lines * height + 0.6), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, place in zip(panels, axes, strict=False):
        _draw_map(panel, place) if isinstance(panel, HeatMap) else _draw_lines(panel, place)
    for unused in axes[len(panels) :]:
        unused.set_axis_off()
    figure.suptitle("Quantization Statistics")
    present = [mark for mark in MARKS if any(mark in _marks(panel) for panel in panels)]
    if present:
        patches = [Patch(facecolor=mark.value[1], edgecolor="black", label=mark.value[0]) for mark in present]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    return figure


def _is_quantized(rows: Iterable[StatisticsRow]) -> bool:
    return any(amax_or_mark(row) is not Mark.OFF for row in rows)


def _size(panel: Panel) -> tuple[float, float]:
    cells = (len(panel.experts), len(panel.layers)) if isinstance(panel, HeatMap) else (0, 0)
    width, height = (
        min(max(count * CELL, least), most) + margin
        for count, least, most, margin in zip(cells, LEAST_PANEL, MOST_PANEL, MARGINS, strict=True)
    )
    return width, height


def _marks(panel: Panel) -> set[Mark]:
    if isinstance(panel, HeatMap):
        return {MARKS[int(index)] for index in panel.marks[~np.isnan(panel.marks)]}
    found = {amax_or_mark(row) for _, rows in panel.modules for row in rows}
    return {mark for mark in found if isinstance(mark, Mark) and mark is not Mark.OFF}


def _draw_map(panel: HeatMap, axes: Axes) -> None:
    look: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest"}
    # Two images, one over the other: each leaves blank what the other one draws.
    values = np.ma.masked_invalid(panel.values)
    image = axes.imshow(values, norm=LogNorm(*_ends(values)), cmap="viridis", **look)
    if values.count():
        ends = image.get_clim()
        bar = axes.figure.colorbar(image, ax=axes, label=panel.unit, ticks=np.geomspace(*ends, 5), format="%.3g")
        # A logarithmic scale's own ticks are powers of ten, of which a narrow range may have none.
        bar.minorticks_off()
    colors = ListedColormap([mark.value[1] for mark in MARKS])
    axes.imshow(np.ma.masked_invalid(panel.marks), cmap=colors, vmin=0, vmax=len(MARKS) - 1, **look)
    axes.set(title=panel.title, xlabel="expert", ylabel="layer")
    axes.set_xticks(*_ticks(panel.experts))
    axes.set_yticks(*_ticks(panel.layers))


def _draw_lines(panel: LineChart, axes: Axes) -> None:
    layers = sorted({row.key.layer or 0 for _, rows in panel.modules for row in rows})
    axes.set_prop_cycle(color=LINE_COLORS)
    lines: list[Line2D] = []
    for module, rows in panel.modules:
        found = [amax_or_mark(row) for row in rows]
        ids = [row.key.layer or 0 for row in rows]
        values = [math.nan if isinstance(value, Mark) else value for value in found]
        lines += axes.plot(ids, values, marker="o", markersize=3, linewidth=1, label=label(module))
        for layer, mark in zip(ids, found, strict=True):
            if isinstance(mark, Mark) and mark is not Mark.OFF:
                _draw_mark(axes, layer, mark)
    axes.set(title=panel.title, xlabel="layer", ylabel=AMAX, yscale="log")
    axes.set_xticks(*_values_of_ticks(layers))
    _label_log_axis(axes, np.ma.masked_invalid(np.concatenate([line.get_ydata() for line in lines])))
    axes.grid(visible=True, alpha=0.3)
    axes.legend(
        handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, fontsize="small", frameon=False
    )


def _draw_mark(axes: Axes, layer: int, mark: Mark) -> None:
    """On the lower edge, whatever the scale is."""
    look: dict[str, Any] = {"marker": "s", "color": mark.value[1], "markeredgecolor": "black", "clip_on": False}
    axes.plot(layer, 0, linestyle="none", transform=axes.get_xaxis_transform(), **look)


def _label_log_axis(axes: Axes, values: npt.NDArray[np.float64]) -> None:
    low, high = _ends(values)
    axes.set_ylim(low / 1.1, high * 1.1)
    axes.yaxis.set_major_locator(FixedLocator(np.geomspace(low, high, 5).tolist()))
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _ends(values: Any) -> tuple[float, float]:
    """Both ends of a logarithmic scale for what a masked array has."""
    if not values.count():
        return 1.0, 10.0
    low, high = float(values.min()), float(values.max())
    # Spread evenly to both sides, in ratios, as the scale is logarithmic.
    widen = math.sqrt(max(LEAST_RANGE / (high / low), 1.0))
    return low / widen, high * widen


def _ticks(ids: Sequence[int]) -> tuple[list[int], list[str]]:
    """Positions and labels of few enough ticks; the first id always has one."""
    positions = list(range(0, len(ids), _step(len(ids))))
    return positions, [str(ids[position]) for position in positions]


def _values_of_ticks(ids: Sequence[int]) -> tuple[list[int], list[str]]:
    """As `_ticks`, on an axis of the ids themselves."""
    positions, labels = _ticks(ids)
    return [ids[position] for position in positions], labels


def _step(count: int) -> int:
    least = math.ceil(count / MOST_TICKS)
    # The smallest round number that leaves no more than `MOST_TICKS`.
    return next(step for power in range(10) for base in (1, 2, 4, 5, 8) if (step := base * 10**power) >= least)
