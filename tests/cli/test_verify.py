"""`quantplug verify` as its user meets it: exit codes, tables in narrow places, JSON, and hostile names."""

import io
import json
import os
import pty
import subprocess
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from quantplug.cli.report import print_report
from quantplug.verify import verify_checkpoint
from tests.cli.shell import ROOT, command, run

SOURCE_LINEAR = torch.linspace(-1, 1, 32 * 32).view(32, 32)


def checkpoint(directory: Path, tensors: dict[str, torch.Tensor], quantization: object = None) -> Path:
    directory.mkdir()
    config = {"num_hidden_layers": 1} | ({"quantization_config": quantization} if quantization else {})
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "source", {"model.layers.0.mlp.down_proj.weight": SOURCE_LINEAR})


@pytest.fixture
def good(tmp_path: Path) -> Path:
    scale = torch.tensor(1 / 448)
    tensors = {
        "model.layers.0.mlp.down_proj.weight": (SOURCE_LINEAR / scale).to(torch.float8_e4m3fn),
        "model.layers.0.mlp.down_proj.weight_scale": scale,
    }
    return checkpoint(tmp_path / "good", tensors, {"quant_method": "fp8", "activation_scheme": "dynamic"})


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """Thirty stray tensors full of NaN, one with a name that a terminal would obey."""
    tensors = {f"model.layers.0.stray{index}.bias": torch.tensor([float("nan")]) for index in range(30)}
    tensors["[bold]\x1b[31mred\x1b[0m.bias"] = torch.tensor([float("nan")])
    return checkpoint(tmp_path / "bad", tensors)


def test_a_good_checkpoint_exits_0(good: Path, source: Path) -> None:
    assert run("verify", good)[0] == 0
    code, output = run("verify", good, "--source", source)
    assert code == 0
    assert "OK: 0 errors" in output
    assert "mlp.down_proj" in output


def test_a_bad_checkpoint_exits_1_and_says_all(bad: Path) -> None:
    code, output = run("verify", bad, "--limit", "0")
    assert code == 1
    assert output.count("NaN") == 31
    assert "no-quantization" in output


def test_a_limit_says_how_many_it_hides(bad: Path) -> None:
    output = run("verify", bad, "--limit", "5")[1]
    assert output.count("NaN") == 5
    assert "26 more" in output


def test_an_absent_directory_is_named(tmp_path: Path, good: Path) -> None:
    assert "absent is not a directory" in run("verify", tmp_path / "absent")[1].replace("\n", "")
    code, output = run("verify", good, "--source", tmp_path / "absent")
    assert code == 2
    assert "absent is not a directory" in output.replace("\n", "")


def test_json_holds_the_full_report(bad: Path, good: Path, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert run("verify", bad, "--json", path)[0] == 1
    report = json.loads(path.read_text())
    assert (report["ok"], len(report["findings"])) == (False, report["errors"] + report["warnings"])
    assert {"severity", "check", "subject", "message"} == report["findings"][0].keys()
    assert run("verify", good, "--source", source, "--json", path)[0] == 0
    report = json.loads(path.read_text())
    assert report["errors_by_kind"][0]["kind"] == "mlp.down_proj"
    assert report["errors_by_tensor"][0]["relative_error"] < report["errors_by_tensor"][0]["bound"]
    assert report["source_bytes"] == 4096
    assert report["export_bytes"] == 1028
    assert [file.name for file in tmp_path.glob(".*")] == []


def test_a_report_that_cannot_be_written_exits_2(good: Path, tmp_path: Path) -> None:
    assert run("verify", good, "--json", tmp_path / "absent" / "report.json")[0] == 2


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_tables_survive_any_width(bad: Path, good: Path, source: Path, width: int) -> None:
    for directory in (bad, good):
        shown = io.StringIO()
        report = verify_checkpoint(directory, source)
        print_report(report, Console(file=shown, width=width), limit=0)
        # Two lines are whole, for the terminal to wrap and grep to find.
        *tables, serving, verdict = shown.getvalue().splitlines()
        assert all(len(line) <= width for line in tables)
        assert serving.startswith("Tensor-parallel sizes")
        assert verdict.startswith("OK" if report.ok else "NOT OK")
        rows = [line for line in tables if line.count("│") == 5]
        assert len(rows) >= len(report.findings)


def test_foreign_names_do_not_drive_the_terminal(bad: Path) -> None:
    output = run("verify", bad, "--limit", "0")[1]
    assert "\x1b" not in output
    assert "[bold]" in output


def test_a_pipe_gets_no_progress_and_no_colours(good: Path) -> None:
    result = subprocess.run(command("verify", good), cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout


def test_a_terminal_sees_progress_on_stderr(good: Path) -> None:
    reader, writer = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    result = subprocess.run(
        command("verify", good), cwd=ROOT, stdout=subprocess.PIPE, stderr=writer, check=False, env=environment
    )
    os.close(writer)
    shown = os.read(reader, 65536)
    os.close(reader)
    assert result.returncode == 0
    assert b"reading" in shown
    assert b"reading" not in result.stdout


def test_no_control_code_of_a_path_or_a_config_reaches_the_terminal(tmp_path: Path) -> None:
    """In the verdict line and in errors too, of which an operating system's come as they are."""
    directory = checkpoint(tmp_path / "evil\x1b[31m", {}, {"quant_method": "fp8\x1b]0;title\x07"})
    for arguments in ((directory,), (tmp_path / "gone\x1b[2J",), (directory, "--json", tmp_path / "no\x1b[1m" / "f")):
        output = run("verify", *arguments)[1]
        assert "\\x1b[" in output
        assert "\x1b" not in output
        assert "\x07" not in output


def test_a_report_that_cannot_be_written_is_refused_before_the_run(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantplug.verify.verify_checkpoint", lambda *_, **__: pytest.fail("read the checkpoint"))
    code, output = run("verify", good, "--json", tmp_path / "absent" / "report.json")
    assert (code, "absent" in output) == (2, True)


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(
    good: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    arguments = ("verify", good, "--source", source)
    with monkeypatch.context() as patch:
        patch.setattr("quantplug.cli.terminal.ByteBar.__call__", interrupt)
        code, output = run(*arguments)
        assert (code, output.splitlines()[:2]) == (
            130,
            ["Stopped.", "Nothing was proved. With --resume FILE it goes on where it was."],
        )
        assert output.splitlines()[2].startswith("  quantplug ")
        assert output.endswith(" --resume FILE\n")
        code, output = run(*arguments, "--resume", tmp_path / "progress")
    assert (code, (tmp_path / "progress").is_file()) == (130, True)
    assert f"kept in {tmp_path / 'progress'}: run the same command again to go on" in output
    assert run(*arguments, "--resume", tmp_path / "progress")[0] == 0
    assert not (tmp_path / "progress").exists()
    assert run(*arguments, "--resume", good / "progress")[0] == 2
