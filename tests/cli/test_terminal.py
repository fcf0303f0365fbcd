"""Options that all commands have: what is said where, and sizes as people write them."""

import json
from pathlib import Path

import pytest
import typer

from quantplug.cli.options import size_in_bytes
from tests.cli.shell import run

FORMAT = ("--format", "w4a16_nvfp4")


def test_json_of_quantize_says_what_was_written(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    code, output = run("quantize", tiny_qwen3_dir, tmp_path / "out", *FORMAT, "--json", "-")

    said = json.loads(output)  # Nothing else is on the standard output.
    assert code == 0
    assert said["directory"] == str(tmp_path / "out")
    assert said["algorithm"] == "W4A16_NVFP4"
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert said["files"] == len(files)
    # The data of all tensors, and of each file its header.
    assert 0 < said["bytes"] < sum(file.stat().st_size for file in files)


def test_quiet_prints_errors_alone(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    assert run("quantize", tiny_qwen3_dir, tmp_path / "out", *FORMAT, "--quiet") == (0, "")
    assert run("verify", tmp_path / "out", "--quiet") == (0, "")
    assert run("models", "-q") == run("formats", "-q") == (0, "")
    code, output = run("quantize", tiny_qwen3_dir, tmp_path / "out", *FORMAT, "--quiet")
    assert code == 2
    assert "not empty" in output


def test_a_log_holds_results_and_errors_and_is_appended_to(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    arguments = ("quantize", tiny_qwen3_dir, tmp_path / "out", *FORMAT, "--log-file", tmp_path / "log")
    code, shown = run(*arguments, "--quiet")
    assert (code, shown) == (0, "")
    log = (tmp_path / "log").read_text()
    assert "(W4A16_NVFP4)" in log
    assert "Packing and writing: " in log
    assert run(*arguments)[0] == 2
    assert (tmp_path / "log").read_text().startswith(log)
    assert "not empty" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("option", ["--log-file", "--json"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    option: str, tiny_qwen3_dir: Path, tmp_path: Path
) -> None:
    code, output = run("quantize", tiny_qwen3_dir, tmp_path / "out", *FORMAT, option, tmp_path / "absent" / "file")

    assert code == 2
    assert "is not a directory" in output
    assert list(tmp_path.iterdir()) == []


def test_files_are_no_larger_than_they_are_asked_to_be(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    assert run("quantize", tiny_qwen3_dir, tmp_path / "out", *FORMAT, "--max-shard-size", "100KB")[0] == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert run("verify", tmp_path / "out", "--source", tiny_qwen3_dir)[0] == 0


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("2 GiB", 2**31), ("500mb", 5 * 10**8), ("1kib", 1024), ("12345", 12345)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1.5GB", "5 TB", "5GB or so"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no size"):
        size_in_bytes(text)
    assert run("quantize", "a", "b", *FORMAT, "--max-shard-size", text)[0] == 2


def test_a_directory_has_no_revisions(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    code, output = run("quantize", tiny_qwen3_dir, tmp_path / "out", *FORMAT, "--revision", "v1")

    assert code == 2
    assert "A directory has no revisions." in output


def test_a_revision_is_what_the_hub_is_asked_for(
    tiny_qwen3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock of the hub, which is out of reach of a test: of both fetches the first has the name that was given."""
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.parent.mkdir()
    snapshot.symlink_to(tiny_qwen3_dir)
    asked = []

    def download(name: str, *, revision: str | None, **options: object) -> str:
        asked.append((name, revision))
        return str(snapshot)

    monkeypatch.setattr("quantplug.checkpoint.hub.snapshot_download", download)

    assert run("quantize", "owner/name", tmp_path / "out", *FORMAT, "--revision", "v1")[0] == 0
    assert asked == [("owner/name", "v1"), ("owner/name", "0123abc")]
