"""The table of formats in docs/readers.md says what the package's own tables do."""

import re
from pathlib import Path

import pytest

from quantplug.export.plan.dialects.table import DIALECTS
from quantplug.formats.names import SCHEMES, QuantFormat
from quantplug.mappings.families import FAMILIES
from quantplug.verify.readers import EVIDENCE, Evidence, Reader, Seen
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
    without_data, dialects, experts, vllm, others = rows()[name]
    scheme = SCHEMES[name]
    assert without_data == ("with `--input-scale`" if name.needs_data else "yes")
    assert dialects.split(", ") == [dialect for dialect, it in DIALECTS.items() if name in it.formats]
    served = "GPT-OSS's, and nothing else" if scheme.of_gpt_oss else "yes" if scheme.loads_experts else "no"
    assert experts == served
    run = set(re.findall(r"^\| case \|(.*)$", PAGE.read_text(), flags=re.MULTILINE))
    assert vllm == ("run" if any(f"`{name}`" in head for head in run) else "read")
    assert vllm == str(best(name, Reader.VLLM).seen)
    said = dict(reversed(part.split(": ")) for part in others.split("; "))
    names = {"SGLang": Reader.SGLANG, "TensorRT-LLM": Reader.TENSORRT_LLM, "transformers": Reader.TRANSFORMERS}
    found = {reader: how for how, those in said.items() for reader in those.split(", ")}
    assert {names[reader] for reader in found} == {row.reader for row in of(name)} - {Reader.VLLM}
    for reader, how in found.items():
        row = best(name, names[reader])
        assert how.partition(",")[0] == f"{row.seen}{' (dense)' if row.dense else ''}"


def of(name: QuantFormat) -> list[Evidence]:
    return [row for row in EVIDENCE if row.format is name]


def best(name: QuantFormat, reader: Reader) -> Evidence:
    return max((row for row in of(name) if row.reader is reader), key=lambda row: row.seen)


def seen_in(column: str, words: set[str]) -> set[str]:
    """The architectures of which a table of cases says one of these words in a column."""
    found = set()
    for table in re.findall(r"^\| (?:case|SGLang 0\.5\.23) \|.*\n(?:\|.*\n)+", PAGE.read_text(), flags=re.MULTILINE):
        head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        if column in head:
            cases = {line[0].strip("`") for line in lines if line[head.index(column)] in words}
            found |= {CASES[case].model.__name__ for case in cases & CASES.keys()}
    return found


def test_what_was_run_or_loaded_is_in_a_table_of_cases() -> None:
    ours = {architecture for family in FAMILIES for architecture in family.architectures}
    words = {(Reader.VLLM, Seen.RUN): {"equal"}, (Reader.SGLANG, Seen.LOADED): {"loaded", "not loaded"}}
    for row in EVIDENCE:
        # The first spelling of a format is what the tables are of.
        first = next(name for name, dialect in DIALECTS.items() if row.format in dialect.formats)
        if (row.reader, row.seen) not in words or first not in row.dialects:
            continue
        seen = seen_in(f"`{row.format}`", words[row.reader, row.seen])
        of_gpt_oss = {"GptOssForCausalLM"}
        everywhere = of_gpt_oss if SCHEMES[row.format].of_gpt_oss else ours - of_gpt_oss
        assert seen >= ({row.architecture} if row.architecture else everywhere), row
