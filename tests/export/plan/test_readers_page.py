"""The table of formats in docs/readers.md says what the package's own tables do."""

import re
from pathlib import Path

import pytest

from quantplug.export.plan.dialects.table import DIALECTS
from quantplug.formats.names import SCHEMES, QuantFormat
from quantplug.mappings.families import FAMILIES
from tests.families.cases import CASES

PAGE = Path(__file__).parents[3] / "docs" / "readers.md"
HEAD = "| format | without data |"


def rows() -> dict[str, list[str]]:
    lines = PAGE.read_text().split(HEAD)[1].split("\n\n")[0].splitlines()[2:]
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {name.strip("`"): rest for name, *rest in cells}


def test_every_format_has_a_row() -> None:
    assert set(rows()) == set(QuantFormat)


def test_every_architecture_has_a_row_by_which_a_server_runs_it() -> None:
    """So that none is added of which nobody has seen whether a server reads it."""
    cases = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), flags=re.MULTILINE))
    ours = {architecture for family in FAMILIES for architecture in family.architectures}
    assert {CASES[case].model.__name__ for case in cases & CASES.keys()} == ours


@pytest.mark.parametrize("name", QuantFormat)
def test_a_row_says_what_the_tables_do(name: QuantFormat) -> None:
    without_data, dialects, experts, vllm, _ = rows()[name]
    scheme = SCHEMES[name]
    assert without_data == ("with `--input-scale`" if name.needs_data else "yes")
    assert dialects.split(", ") == [dialect for dialect, it in DIALECTS.items() if name in it.formats]
    served = "GPT-OSS's, and nothing else" if scheme.of_gpt_oss else "yes" if scheme.loads_experts else "no"
    assert experts == served
    run = set(re.findall(r"^\| case \|(.*)$", PAGE.read_text(), flags=re.MULTILINE))
    assert vllm == ("run" if any(f"`{name}`" in head for head in run) else "read")
