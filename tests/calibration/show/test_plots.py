import math
import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from quantplug.calibration.show.plots import DOTS_PER_INCH, MARKS, Mark, save_plot, statistics_figure
from quantplug.calibration.statistics import AmaxSource, CalibrationTable, StatisticsRow
from quantplug.errors import DestinationError, SourceError
from quantplug.mappings.keys import ParamKey

FC1 = "decoder.layers.*.mlp.experts.linear_fc1.weight*"
FC2 = "decoder.layers.*.mlp.experts.linear_fc2.weight*"
FC1_INPUT = "decoder.layers.*.mlp.experts.linear_fc1.input_quantizer"
QKV = "decoder.layers.*.self_attention.linear_qkv.weight"
PROJ = "decoder.layers.*.self_attention.linear_proj.weight"

# Nothing here is 1 apart, or a power of two.
FIRST_LAYER = 3


def row(
    module: str,
    layer: int | None,
    expert: int | None = None,
    amax: float | None = 1.0,
    source: AmaxSource = AmaxSource.WEIGHT,
) -> StatisticsRow:
    return StatisticsRow(ParamKey(module, layer, expert), (192, 160), amax, source)


def amax_of(layer: int, expert: int) -> float:
    return 0.01 * (layer + 1) * 1.7**expert


def model(layers: int, experts: int) -> CalibrationTable:
    rows = [row("output_layer.weight", None, amax=None, source=AmaxSource.DISABLED)]
    for layer in range(FIRST_LAYER, FIRST_LAYER + layers):
        rows += [row(QKV, layer, amax=0.3 + layer), row(PROJ, layer, amax=0.1 + layer)]
        rows += [row(FC1, layer, expert, amax_of(layer, expert % 9)) for expert in range(experts)]
        rows += [row(FC2, layer, expert, 2 * amax_of(layer, expert % 9)) for expert in range(experts)]
        rows.append(row(FC1_INPUT, layer, amax=40.0 + layer, source=AmaxSource.CALIBRATED))
    return CalibrationTable(tuple(rows))


def panel(figure: Figure, title: str) -> Axes:
    (axes,) = (axes for axes in figure.axes if axes.get_title() == title)
    return axes


def marked(axes: Axes) -> dict[tuple[int, int], Mark]:
    """Layer and expert, as the ticks name them, to what is drawn there in place of a value."""
    cells = axes.images[1].get_array()
    layers, experts = (
        [int(tick.get_text()) for tick in ticks] for ticks in (axes.get_yticklabels(), axes.get_xticklabels())
    )
    return {(layers[y], experts[x]): MARKS[int(cells[y, x])] for y, x in zip(*np.nonzero(~cells.mask), strict=True)}


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


@pytest.mark.parametrize(("linear", "factor"), [("fc1", 1), ("fc2", 2)])
def test_a_heat_map_has_the_amaxes_of_the_table(linear: str, factor: int) -> None:
    axes = panel(statistics_figure(model(layers=2, experts=8)), f"amax of mlp.experts.linear_{linear}")

    expected = [[factor * amax_of(layer, expert) for expert in range(8)] for layer in (3, 4)]
    np.testing.assert_array_equal(axes.images[0].get_array(), expected)
    assert axes.images[0].get_clim() == (min(map(min, expected)), max(map(max, expected)))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("expert", "layer")
    assert axes.images[0].colorbar.ax.get_ylabel() == "amax, log scale"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["3", "4"]
    assert marked(axes) == {}


def test_lines_have_the_amaxes_of_the_table() -> None:
    figure = statistics_figure(model(layers=3, experts=8))

    weights, inputs = panel(figure, "amax of other weights"), panel(figure, "amax of activations")
    lines = {line.get_label(): line.get_xydata().tolist() for line in (*weights.lines, *inputs.lines)}
    assert lines == {
        "self_attention.linear_qkv": [[layer, 0.3 + layer] for layer in (3, 4, 5)],
        "self_attention.linear_proj": [[layer, 0.1 + layer] for layer in (3, 4, 5)],
        "mlp.experts.linear_fc1.input_quantizer": [[layer, 40.0 + layer] for layer in (3, 4, 5)],
    }
    assert weights.get_yscale() == inputs.get_yscale() == "log"


def test_a_dense_model_is_drawn_as_lines() -> None:
    figure = statistics_figure(CalibrationTable((row(QKV, 0), row(QKV, 1), row(PROJ, 0))))

    assert [axes.get_title() for axes in figure.axes] == ["amax of weights"]
    assert len(figure.axes[0].lines) == 2


def test_what_has_no_place_on_a_log_scale_is_marked_and_explained() -> None:
    cells = [
        row(FC1, 0, 0, 0.5),
        row(FC1, 0, 1, 0.0),
        row(FC1, 0, 2, None, AmaxSource.MISSING),
        row(FC1, 1, 0, None, AmaxSource.DISABLED),
        row(FC1, 1, 1, math.nan),
        row(FC1, 2, 0, math.inf),
    ]
    figure = statistics_figure(CalibrationTable((*cells, row(QKV, 0, amax=0.0), row(QKV, 1))))

    axes = panel(figure, "amax of mlp.experts.linear_fc1")
    assert marked(axes) == {
        (0, 1): Mark.ZERO,
        (0, 2): Mark.MISSING,
        (1, 0): Mark.OFF,
        (1, 1): Mark.NOT_FINITE,
        (2, 0): Mark.NOT_FINITE,
    }
    assert axes.images[0].get_array().compressed().tolist() == [0.5]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [mark.value[0] for mark in MARKS]
    # The lines' own mark is on the lower edge, whatever the scale.
    assert [0.0, 0.0] in [line.get_xydata()[0].tolist() for line in panel(figure, "amax of other weights").lines]


def test_marks_are_explained_only_where_they_are() -> None:
    assert statistics_figure(model(layers=2, experts=8)).legends == []


def test_equal_amaxes_do_not_fill_the_scale() -> None:
    axes = panel(
        statistics_figure(CalibrationTable((row(FC1, 0, 0), row(FC1, 0, 1)))), "amax of mlp.experts.linear_fc1"
    )

    low, high = axes.images[0].get_clim()
    assert low < 1.0 < high


def test_tokens_are_drawn_once_beside_amax() -> None:
    counts = {(layer, expert): 37 * expert for layer in (3, 4) for expert in range(8)}
    counted = [
        replace(row, tokens=(tokens := counts[row.key.layer, row.expert]), coverage=tokens / 100)
        if row.expert is not None
        else row
        for row in model(layers=2, experts=8).rows
    ]

    figure = statistics_figure(CalibrationTable(tuple(counted)))

    axes = panel(figure, "tokens of experts")
    assert axes.images[0].get_array()[:, 1:].tolist() == [[37.0 * expert for expert in range(1, 8)]] * 2
    assert axes.images[0].colorbar.ax.get_ylabel() == "calibration tokens, log scale"
    assert marked(axes) == {(3, 0): Mark.ZERO, (4, 0): Mark.ZERO}


def test_without_data_there_are_no_tokens_to_draw() -> None:
    assert all("tokens" not in axes.get_title() for axes in statistics_figure(model(layers=2, experts=8)).axes)


@pytest.mark.parametrize(("layers", "experts", "least", "most"), [(2, 8, 800, 3000), (48, 128, 1500, 4000)])
def test_the_file_is_a_png_of_sane_size(tmp_path: Path, layers: int, experts: int, least: int, most: int) -> None:
    save_plot(model(layers, experts), tmp_path / "out.PNG")

    width, height = png_size(tmp_path / "out.PNG")
    assert least < width < most
    assert width / 4 < height < width


@pytest.mark.parametrize(("layers", "experts"), [(2, 8), (48, 128), (94, 512), (7, 2000), (1, 1)])
def test_no_labels_overlap(layers: int, experts: int) -> None:
    figure = statistics_figure(model(layers, experts))
    figure.set_dpi(DOTS_PER_INCH)
    FigureCanvasAgg(figure).draw()

    for axes in figure.axes:
        for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
            boxes = [tick.get_window_extent() for tick in ticks if tick.get_text() and tick.get_visible()]
            assert not any(one.overlaps(other) for one, other in pairwise(boxes))
    titles = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
    assert not any(one.overlaps(other) for index, one in enumerate(titles) for other in titles[:index])


@pytest.mark.parametrize("suffix", [".pdf", ".svg"])
def test_other_formats_by_their_suffix(tmp_path: Path, suffix: str) -> None:
    save_plot(model(layers=2, experts=8), tmp_path / f"out{suffix}")

    assert {".pdf": b"%PDF", ".svg": b"<svg"}[suffix] in (tmp_path / f"out{suffix}").read_bytes()[:1000]


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match=r"\.jpeg"):
        save_plot(model(layers=1, experts=2), tmp_path / "out.jpeg")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "rows", [(), (row(FC1, 0, 0, None, AmaxSource.DISABLED),), (row("output_layer.weight", None),)]
)
def test_nothing_to_plot_is_said(rows: tuple[StatisticsRow, ...]) -> None:
    with pytest.raises(SourceError, match="nothing to plot"):
        statistics_figure(CalibrationTable(rows))
