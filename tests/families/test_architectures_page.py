"""The table of architectures in the documents claims what tests in this directory prove, and nothing else."""

import re
from pathlib import Path

import pytest

from tests.families import test_families, test_topologies
from tests.families.cases import CASES

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
HEADER = "| | config | import | export |"


def table() -> tuple[list[str], list[dict[str, str]]]:
    lines = DOCUMENT.read_text().split(HEADER)[1].split("\n\n")[0].splitlines()
    columns = ["family", *cells(f"{HEADER.removeprefix('| |')}{lines[0]}")]
    return columns, [dict(zip(columns, cells(line), strict=True)) for line in lines[2:]]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_every_case_stands_in_one_row() -> None:
    _, rows = table()
    named = [case for row in rows for case in re.findall(r"`([a-z0-9_]+)`", row["cases"])]
    assert sorted(named) == sorted(CASES)


@pytest.mark.parametrize("column", ["config", "import", "export", "round trip", "logits", "NVFP4", "FP8"])
def test_every_column_is_a_test_of_all_cases(column: str) -> None:
    _, rows = table()
    assert {row[column] for row in rows} == {"yes"}
    test = getattr(test_families, f"test_{column.lower().replace(' ', '_')}")
    assert "family" in test.__annotations__  # The fixture that is every case in turn.


def test_the_columns_are_those_that_are_tested() -> None:
    columns, rows = table()
    assert columns[-3:] == ["topologies", "cases", "notes"]
    assert {row["topologies"] for row in rows} == {"yes"}
    assert "family" in test_topologies.test_the_same_bytes_at_tp2_ep2_as_at_one_rank.__annotations__
    tests = {name.removeprefix("test_").replace("_", " ") for name in vars(test_families) if name.startswith("test_")}
    assert tests == {column.lower() for column in columns[1:-3]}
