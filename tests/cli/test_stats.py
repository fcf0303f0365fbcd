import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantplug.calibration.statistics import AmaxSource, CalibrationTable, StatisticsRow
from quantplug.cli import app
from quantplug.mappings.keys import ParamKey


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    key = ParamKey("decoder.layers.*.mlp.experts.linear_fc1.weight*", 3, 41)
    CalibrationTable((StatisticsRow(key, (192, 160), 0.5, AmaxSource.WEIGHT),)).save(tmp_path / "stats.json")
    return tmp_path / "stats.json"


def test_stats_prints_the_table(saved: Path) -> None:
    result = CliRunner().invoke(app, ["stats", str(saved)])

    assert result.exit_code == 0
    assert "Quantization Statistics" in result.stdout
    (line,) = (line for line in result.stdout.splitlines() if "linear_fc1" in line)
    amax = "5.0000e-01"
    assert line.split() == ["decoder.layers.3.mlp.experts.linear_fc1.weight*", "1", amax, amax, amax, "weight"]


@pytest.mark.parametrize("content", [None, "not json", '{"schema_version": 99, "rows": []}'])
def test_stats_of_another_file_says_why(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)

    result = CliRunner().invoke(app, ["stats", str(path)])

    assert result.exit_code == 2
    assert result.stdout == ""
    assert "This is not a statistics table of quantplug." in result.stderr
    assert "What to do:" in result.stderr


def test_stats_draws_a_plot_beside_the_table(saved: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["stats", str(saved), "--plot", str(tmp_path / "out.png")])

    assert result.exit_code == 0
    assert "Quantization Statistics" in result.stdout
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_without_matplotlib_a_plot_says_how_to_get_it(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "quantplug.calibration.show.plots", raising=False)
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # How Python spells a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)

    result = CliRunner().invoke(app, ["stats", str(saved), "--plot", str(tmp_path / "out.png")])

    assert result.exit_code == 2
    assert result.stdout == ""
    assert 'pip install "quantplug[plots]"' in result.stderr
    assert not (tmp_path / "out.png").exists()
    assert CliRunner().invoke(app, ["stats", str(saved)]).exit_code == 0


@pytest.mark.parametrize("name", ["out.jpeg", "missing/out.png"])
def test_a_plot_that_cannot_be_written_says_why(saved: Path, tmp_path: Path, name: str) -> None:
    result = CliRunner().invoke(app, ["stats", str(saved), "--plot", str(tmp_path / name)])

    assert result.exit_code == 2
    assert name.split("/")[0] in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["stats.json"]


def test_stats_of_experts_is_a_line_a_layer_and_all_of_them_on_demand(tmp_path: Path) -> None:
    module = "decoder.layers.*.mlp.experts.linear_fc1.weight*"
    rows = [
        StatisticsRow(ParamKey(module, layer, expert), (8, 8), 1.0, AmaxSource.WEIGHT)
        for layer in range(2)
        for expert in range(8)
    ]
    CalibrationTable(tuple(rows)).save(tmp_path / "stats.json")

    def lines(*options: str) -> list[str]:
        result = CliRunner().invoke(app, ["stats", str(tmp_path / "stats.json"), *options])
        assert result.exit_code == 0
        return [line.split()[0] for line in result.stdout.splitlines() if "linear_fc1" in line]

    assert lines() == [f"decoder.layers.{layer}.mlp.experts.linear_fc1.weight*" for layer in range(2)]
    assert len(lines("--all")) == 16
    assert lines("--filter", "*.layers.1.*") == ["decoder.layers.1.mlp.experts.linear_fc1.weight*"]
    assert len(lines("--all", "--filter", "*.weight7")) == 2


def test_a_filter_that_matches_nothing_exits_2_and_says_the_names(saved: Path) -> None:
    result = CliRunner().invoke(app, ["stats", str(saved), "--filter", "fc1"])

    assert result.exit_code == 2
    assert result.stdout == ""
    assert "decoder.layers.*.mlp.experts.linear_fc1.weight*" in result.stderr
