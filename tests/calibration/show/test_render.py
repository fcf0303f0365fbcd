import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from quantplug.calibration.show.render import print_statistics, summary
from quantplug.calibration.statistics import AmaxSource, CalibrationTable, StatisticsRow
from quantplug.mappings.keys import ParamKey

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


def printed(width: int, terminal: bool, table: CalibrationTable = TABLE, *, every_row: bool = True) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system="standard" if terminal else "auto")
    print_statistics(table, console, every_row=every_row)
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
        for every_row in (True, False):
            shown = printed(width, terminal=True, table=table, every_row=every_row)
            text = " ".join(without_escapes(shown).split())
            assert "calibrated, weighted" in text
            assert "calibrated, unweighted" in text
            assert "by the router's probability" in text


FC1 = "decoder.layers.*.mlp.experts.linear_fc1.weight*"


def layer_of_experts(layer: int, *amaxes: float, tokens: tuple[int | None, ...] = ()) -> list[StatisticsRow]:
    seen = tokens or (None,) * len(amaxes)
    return [
        StatisticsRow(
            ParamKey(FC1, layer, expert), (8, 8), amax, AmaxSource.CALIBRATED, count, None if count is None else 1.0
        )
        for expert, (amax, count) in enumerate(zip(amaxes, seen, strict=True))
    ]


def test_experts_of_a_layer_share_a_line_by_default() -> None:
    table = CalibrationTable((*layer_of_experts(0, 1.0, 2.0, 4.0), *layer_of_experts(1, 3.0), TABLE.rows[0]))

    text = printed(200, terminal=False, table=table, every_row=False)
    lines = [line.split() for line in text.splitlines() if "weight" in line]

    assert lines == [
        ["decoder.layers.0.mlp.experts.linear_fc1.weight*", "3", "1.0000e+00", "2.0000e+00", "4.0000e+00", "4.00",
         "calibrated"],
        ["decoder.layers.1.mlp.experts.linear_fc1.weight*", "1", "3.0000e+00", "3.0000e+00", "3.0000e+00",
         "calibrated"],
        ["output_layer.weight", "1", "-", "-", "-", "disabled"],
    ]  # fmt: skip
    assert "Outlier" not in text


def test_a_line_counts_tokens_and_cold_experts() -> None:
    (warm, cold) = layer_of_experts(0, 1.0, 1.0, tokens=(7, 0))
    table = CalibrationTable((warm, replace(cold, coverage=0.0, source=AmaxSource.FALLBACK)))

    text = printed(200, terminal=False, table=table, every_row=False)

    (line,) = (line for line in text.splitlines() if "weight" in line)
    assert re.search(r"1 fallback, 1 calibrated +0-7 +1$", line.rstrip())


@pytest.mark.parametrize("width", [30, 60, 100])
def test_a_line_is_whole_at_any_width(width: int) -> None:
    table = CalibrationTable(tuple(layer_of_experts(13, 1.0, 2.0, 4.0)))

    text = without_escapes(printed(width, terminal=True, table=table, every_row=False))

    flat = "".join(text.split())
    assert "…" not in text
    # Beside other columns a name is folded after a dot.
    for value in ("decoder.layers.13.mlp.experts.", "linear_fc1.weight*", "1.0000e+00", "2.0000e+00", "4.0000e+00"):
        assert value in flat


@pytest.mark.parametrize(
    ("amax", "reason"),
    [
        (9.0, "is 9.0000e+00, 9 times the median of its peers"),
        (0.1, "is 1.0000e-01, 0.1 times the median of its peers"),
        (0.0, "is 0"),
        (float("nan"), "is nan"),
    ],
)
def test_an_expert_unlike_the_others_of_its_layer_is_named(amax: float, reason: str) -> None:
    # The other layer is as far away: experts are held against those of their own.
    table = CalibrationTable((*layer_of_experts(0, 1.0, 1.0, amax, 1.0, 1.0), *layer_of_experts(1, *[50.0] * 4)))

    text = printed(200, terminal=False, table=table, every_row=False)

    assert [line for line in text.splitlines() if line.startswith("Outlier")] == [
        f"Outlier: decoder.layers.0.mlp.experts.linear_fc1.weight2 (expert 2) {reason}"
    ]


def test_the_farthest_outliers_are_named_and_the_others_counted() -> None:
    table = CalibrationTable(tuple(layer_of_experts(0, *[1.0] * 60, *(10.0 * n for n in range(1, 26)))))

    lines = printed(200, terminal=False, table=table, every_row=False).splitlines()

    named = [line for line in lines if line.startswith("Outlier")]
    assert len(named) == 20
    assert "2.5000e+02, 250 times" in named[0]
    assert lines[-1] == "and 5 more"


def test_a_table_of_many_experts_is_short() -> None:
    table = CalibrationTable(tuple(row for layer in range(48) for row in layer_of_experts(layer, *[1.0] * 128)))

    assert len(printed(200, terminal=False, table=table, every_row=False).splitlines()) < 60
