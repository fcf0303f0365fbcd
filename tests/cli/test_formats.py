"""`quantplug formats`: the table is that of the package, and its sizes are those of files."""

import json
from pathlib import Path

from quantplug.choices import KVCacheFormat, QuantFormat
from tests.cli.shell import run


def test_every_format_is_there_with_what_it_needs(tmp_path: Path) -> None:
    code, output = run("formats", "--json", tmp_path / "formats.json")

    assert code == 0
    said = json.loads((tmp_path / "formats.json").read_text())
    assert {row["name"] for row in said["formats"]} == set(QuantFormat)
    assert said["kv_cache"].keys() == set(KVCacheFormat)
    for row in said["formats"]:
        (*lines,) = (line for line in output.splitlines() if line.split()[:1] == [row["name"]])
        assert any(row["weights"] in line and ", ".join(row["dialects"]) in line for line in lines)
        assert row["needs_data"] is (row["name"] in ("nvfp4", "fp8"))


def test_bits_are_those_of_codes_and_scales() -> None:
    """By hand: 4 bits and one E4M3 for 16; 8 bits and one power of two for 32; 4 bits and one BF16 for 128."""
    code, output = run("formats", "--json", "-")

    rows = json.loads(output)["formats"]
    bits = {row["name"]: row["bits_per_weight"] for row in reversed(rows)}
    assert code == 0
    assert (bits["w4a16_nvfp4"], bits["mxfp8"], bits["mxfp4"], bits["int4"]) == (4.5, 8.25, 4.25, 4.125)


def test_one_is_shown_alone() -> None:
    rows = json.loads(run("formats", "fp8_blockwise", "--json", "-")[1])["formats"]

    assert [row["name"] for row in rows] == ["fp8_blockwise"]
