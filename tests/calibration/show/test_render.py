import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from quantplug.calibration.show.render import print_statistics, summary
from quantplug.calibration.statistics import AmaxSource, CalibrationTable, StatisticsRow
from quantplug.mappings.table import ParamKey

TABLE = CalibrationTable(
    (
        StatisticsRow(ParamKey("output_layer.weight"), (523, 160), None, AmaxSource.DISABLED),
        StatisticsRow(
            ParamKey("decoder.layers.*.mlp.experts.linear_fc1.weight*", 13, 127),
            (192, 160),
            0.123456,
            AmaxSource.WEIGHT,
        ),
        StatisticsRow(
            ParamKey("decoder.layers.*.mlp.experts.linear_fc1.input_quantizer", 13), (), 1234.5, AmaxSource.CALIBRATED
        ),
        StatisticsRow(
            ParamKey("decoder.layers.*.mlp.experts.linear_fc2.weight*", 13, 0), (160, 96), None, AmaxSource.MISSING
        ),
    )
)


def printed(width: int, terminal: bool, table: CalibrationTable = TABLE) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system="standard" if terminal else "auto")
    print_statistics(table, console)
    return file.getvalue()


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("width", [12, 30, 40, 60, 80, 100, 200])
def test_every_name_and_value_is_there_at_any_width(width: int) -> None:
    text = without_escapes(printed(width, terminal=True))

    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    # A folded name goes on in its own column, which ends where the next one begins; the narrow table has but one.
    header = next((line for line in text.splitlines() if "Parameter Name" in line and "/" not in line), None)
    column = width if header is None else header.index("Expert")
    left = "".join("".join(line[:column].split()) for line in text.splitlines())
    for row in TABLE.rows:
        assert row.parameter in left
    flat = "".join(text.split())
    for value in ("127", "(192,160)", "1.2346e-01", "weight", "1.2345e+03", "calibrated", "missing", "disabled"):
        assert value in flat


def test_wide_table_has_one_line_for_each_quantizer() -> None:
    lines = [line.split("  ") for line in without_escapes(printed(200, terminal=True)).splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]

    assert ["Quantization Statistics"] in cells
    assert ["Parameter Name", "Expert", "Shape", "Max Value", "Source"] in cells
    assert ["decoder.layers.13.mlp.experts.linear_fc1.weight127", "127", "(192, 160)", "1.2346e-01", "weight"] in cells
    assert ["decoder.layers.13.mlp.experts.linear_fc1.input_quantizer", "()", "1.2345e+03", "calibrated"] in cells
    assert ["output_layer.weight", "(523, 160)", "-", "disabled"] in cells


@pytest.mark.parametrize("width", [10, 80])
def test_a_pipe_gets_plain_lines_whatever_the_width(width: int) -> None:
    text = printed(width, terminal=False)

    assert "\x1b" not in text
    (line,) = (line for line in text.splitlines() if "weight127" in line)
    assert line.split() == [
        "decoder.layers.13.mlp.experts.linear_fc1.weight127", "127", "(192,", "160)", "1.2346e-01", "weight",
    ]  # fmt: skip


def test_missing_amax_stands_out_on_a_terminal() -> None:
    text = printed(200, terminal=True)

    (line,) = (line for line in text.splitlines() if "missing" in line and "linear_fc2" in line)
    assert "\x1b[1;31m" in line


def test_summary_counts_by_source() -> None:
    assert summary(TABLE) == "4 quantizers: 1 missing, 1 weight, 1 calibrated, 1 disabled"
    assert summary(CalibrationTable(())) == "0 quantizers"


def test_an_empty_table_prints() -> None:
    assert "0 quantizers" in printed(80, terminal=True, table=CalibrationTable(()))


def test_tokens_are_shown_and_cold_experts_marked() -> None:
    name = ParamKey("decoder.layers.*.mlp.experts.linear_fc1.weight*", 0, 1)
    cold = StatisticsRow(name, (192, 160), 0.5, AmaxSource.WEIGHT, tokens=0, coverage=0.0)
    warm = StatisticsRow(replace(name, expert=2), (192, 160), 0.5, AmaxSource.WEIGHT, tokens=123, coverage=2.0)
    table = CalibrationTable((cold, warm))

    for text in (printed(200, terminal=False, table=table), without_escapes(printed(40, terminal=True, table=table))):
        assert re.search(r"\b0( tokens)?  +cold", text)
        assert re.search(r"\b123( tokens)?  +2\.00", text)
        assert "1 cold experts" in text


def test_there_are_no_token_columns_without_tokens() -> None:
    assert "Tokens" not in printed(200, terminal=False)


def test_routed_inputs_say_whether_the_probability_is_in_their_amax() -> None:
    key = "decoder.layers.*.mlp.experts.linear_fc{}.input_quantizer"
    rows = [
        StatisticsRow(ParamKey(key.format(linear), 1), (), 2.0, AmaxSource.CALIBRATED, weighted=linear == 1)
        for linear in (1, 2)
    ]
    table = CalibrationTable(tuple(rows))
    assert CalibrationTable.from_json(table.to_json()) == table
    for width in (200, 30):
        text = " ".join(without_escapes(printed(width, terminal=True, table=table)).split())
        assert "calibrated, weighted" in text
        assert "calibrated, unweighted" in text
        assert "by the router's probability" in text
