import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplug.calibration.statistics import HAS_AMAX, AmaxSource, CalibrationTable, StatisticsRow
from quantplug.errors import CalibrationError, SourceError
from quantplug.mappings.keys import ParamKey

FC1 = "decoder.layers.*.mlp.experts.linear_fc1.weight*"
QKV = "decoder.layers.*.self_attention.linear_qkv.weight"


def row(
    module: str = FC1,
    layer: int | None = 0,
    expert: int | None = None,
    amax: float | None = 1.0,
    source: AmaxSource = AmaxSource.WEIGHT,
    shape: tuple[int, ...] = (192, 160),
) -> StatisticsRow:
    return StatisticsRow(ParamKey(module, layer, expert), shape, amax, source)


def table(*rows: StatisticsRow) -> CalibrationTable:
    return CalibrationTable(rows)


keys = st.builds(ParamKey, st.sampled_from(["a.weight", "b.input_quantizer"]), st.none(), st.none()) | st.builds(
    ParamKey, st.just(FC1), st.integers(0, 99), st.integers(0, 255)
)
shapes = st.lists(st.integers(1, 9999), max_size=3).map(tuple)
amaxes = st.floats(min_value=0, allow_infinity=True, allow_nan=False)
rows = st.builds(StatisticsRow, keys, shapes, amaxes, st.sampled_from(sorted(HAS_AMAX))) | st.builds(
    StatisticsRow, keys, shapes, st.none(), st.sampled_from(sorted(set(AmaxSource) - HAS_AMAX))
)


@settings(max_examples=50)
@given(st.lists(rows, max_size=8).map(lambda found: CalibrationTable(tuple(found))))
def test_json_gives_back_the_same_table(original: CalibrationTable) -> None:
    assert CalibrationTable.from_json(original.to_json()) == original


def test_json_is_what_a_script_would_read() -> None:
    text = table(replace(row(layer=3, expert=7, amax=0.25), tokens=6, coverage=1.5)).to_json()

    assert json.loads(text) == {
        "schema_version": 2,
        "rows": [
            {
                "parameter": "decoder.layers.3.mlp.experts.linear_fc1.weight7",
                "module": FC1,
                "layer": 3,
                "expert": 7,
                "shape": [192, 160],
                "amax": 0.25,
                "source": "weight",
                "tokens": 6,
                "coverage": 1.5,
                "weighted": None,
            }
        ],
    }


def test_json_keeps_nan_and_stays_json() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = table(row(amax=math.nan)).to_json()

    json.loads(text, parse_constant=refuse)
    (read,) = CalibrationTable.from_json(text).rows
    assert str(read.amax) == "nan"


@pytest.mark.parametrize(
    ("amax", "source"),
    [(None, AmaxSource.WEIGHT), (None, AmaxSource.CALIBRATED), (1.0, AmaxSource.MISSING), (0.0, AmaxSource.DISABLED)],
)
def test_an_amax_without_a_source_cannot_be_made(amax: float | None, source: AmaxSource) -> None:
    with pytest.raises(ValueError, match=r"linear_fc1\.weight2: amax .* does not go with source"):
        row(expert=2, amax=amax, source=source)


def test_unreadable_rows_are_all_named() -> None:
    document = json.loads(table(row(), row(layer=1), row(layer=2), row(layer=3)).to_json())
    document["rows"][0]["source"] = "guessed"
    del document["rows"][1]["amax"]
    document["rows"][3]["parameter"] = "another"

    with pytest.raises(SourceError) as caught:
        CalibrationTable.from_json(json.dumps(document), origin="a.json")

    assert [offender.parameter for offender in caught.value.offenders] == [
        f"a.json: rows[{index}]" for index in (0, 1, 3)
    ]
    assert "'guessed' is not a valid AmaxSource" in str(caught.value)
    assert "'amax'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is no JSON"),
        ("[]", "has no list of rows"),
        ('{"rows": 1, "schema_version": 1}', "has no list of rows"),
        ('{"rows": []}', "has schema_version None, not 2"),
        ('{"rows": [], "schema_version": 1}', "has schema_version 1, not 2"),
        ('{"rows": [3], "schema_version": 2}', r"rows\[0\]"),
    ],
)
def test_another_file_is_refused(text: str, reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        CalibrationTable.from_json(text)


def test_save_and_load(tmp_path: Path) -> None:
    original = table(row(expert=1), row(source=AmaxSource.MISSING, amax=None))

    original.save(tmp_path / "stats.json")

    assert CalibrationTable.load(str(tmp_path / "stats.json")) == original


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        table(row()).save(tmp_path / "stats.json")

    assert not list(tmp_path.iterdir())


def test_loading_an_unreadable_file_names_it(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "short").write_text('{"schema_version": 1, "rows": [')

    for name in ("missing", "binary", "short"):
        with pytest.raises(SourceError, match=name):
            CalibrationTable.load(tmp_path / name)


def model(layers: int, experts: int) -> list[StatisticsRow]:
    found = [row("embedding.word_embeddings.weight", layer=None, source=AmaxSource.DISABLED, amax=None)]
    for layer in range(layers):
        found.append(row(QKV, layer, amax=layer + 0.5))
        found += [row(FC1, layer, expert, amax=layer + expert / 16) for expert in range(experts)]
        found.append(row("decoder.layers.*.mlp.experts.linear_fc1.input_quantizer", layer, shape=(), amax=7.0))
    return found


@pytest.mark.parametrize("spread", ["experts", "layers", "experts backwards", "replicas"])
def test_merging_gives_one_table_however_the_model_is_spread(spread: str) -> None:
    whole = model(layers=12, experts=12)

    match spread:
        case "experts":
            ranks = [[r for r in whole if r.expert is None or r.expert // 3 == rank] for rank in range(4)]
        case "experts backwards":
            ranks = [[r for r in whole if r.expert is None or r.expert // 3 == rank] for rank in reversed(range(4))]
        case "layers":
            ranks = [whole[:1]] + [[r for r in whole if r.key.layer in (stage, stage + 6)] for stage in range(6)]
        case _:
            ranks = [whole, whole]

    assert CalibrationTable.merged(table(*found) for found in ranks).rows == tuple(whole)


def test_replicas_give_their_largest_amax_and_the_source_that_has_it() -> None:
    left = table(row(amax=0.5, source=AmaxSource.CALIBRATED), row(layer=1, amax=math.nan), row(layer=2))
    right = table(
        row(amax=2.0, source=AmaxSource.WEIGHT), row(layer=1), row(layer=2, amax=None, source=AmaxSource.MISSING)
    )

    merged = CalibrationTable.merged([left, right]).rows

    assert merged[0] == row(amax=2.0, source=AmaxSource.WEIGHT)
    assert str(merged[1].amax) == "nan"
    assert merged[2] == row(layer=2, amax=None, source=AmaxSource.MISSING)
    assert str(CalibrationTable.merged([right, left])) == str(CalibrationTable.merged([left, right]))


def test_ranks_that_disagree_are_all_named() -> None:
    left = table(row(expert=3), row(QKV, 1), row(QKV, 2))
    right = table(row(expert=3, shape=(96, 160)), row(QKV, 1, source=AmaxSource.DISABLED, amax=None), row(QKV, 2))

    with pytest.raises(CalibrationError) as caught:
        CalibrationTable.merged([left, right])

    first, second = caught.value.offenders
    assert (first.parameter, first.expert) == ("decoder.layers.0.mlp.experts.linear_fc1.weight3", 3)
    assert first.reason == "has shapes [(96, 160), (192, 160)]"
    assert second.parameter == "decoder.layers.1.self_attention.linear_qkv.weight"


def test_merging_keeps_tokens_that_only_some_ranks_know() -> None:
    counted = replace(row(expert=3), tokens=0, coverage=0.0)

    (merged,) = CalibrationTable.merged([table(row(expert=3)), table(counted)]).rows

    assert merged == counted
    assert merged.is_cold
    assert not row(expert=3).is_cold


def test_a_fallback_wins_over_calibrated_and_not_over_missing() -> None:
    fallback, calibrated = row(source=AmaxSource.FALLBACK), row(source=AmaxSource.CALIBRATED)
    missing = row(source=AmaxSource.MISSING, amax=None)

    assert CalibrationTable.merged([table(calibrated), table(fallback)]).rows == (fallback,)
    assert CalibrationTable.merged([table(fallback), table(missing)]).rows == (missing,)


def test_counts_that_disagree_are_refused() -> None:
    counts = [table(replace(row(expert=3), tokens=tokens, coverage=1.0)) for tokens in (4, 8)]

    with pytest.raises(CalibrationError, match=r"saw \[4, 8\] tokens"):
        CalibrationTable.merged(counts)


def test_tokens_and_coverage_come_together() -> None:
    with pytest.raises(ValueError, match="do not go with coverage"):
        replace(row(), tokens=4)


def test_no_tables_make_an_empty_one() -> None:
    assert CalibrationTable.merged([]).rows == ()
