"""`--dry-run`: what it says is what the same command then writes, and it writes nothing."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.checkpoint.torch_dist.written import save_model
from tests.cli.shell import run

FORMAT = ("--format", "w4a16_nvfp4")


def planned(*arguments: str | Path, beside: Path) -> dict[str, Any]:
    before = sorted(beside.iterdir())
    code, output = run(*arguments, "--dry-run", "--json", "-")
    assert code == 0, output
    assert sorted(beside.iterdir()) == before
    return dict(json.loads(output))


def written(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


def test_sizes_are_those_of_the_files_that_are_written_then(tiny_qwen3_moe_dir: Path, tmp_path: Path) -> None:
    arguments = ("quantize", tiny_qwen3_moe_dir, tmp_path / "out", *FORMAT, "--max-shard-size", "100KB")
    said = planned(*arguments, beside=tmp_path)

    assert run(*arguments, "--json", tmp_path / "result.json")[0] == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert said["disk_bytes"] == written(tmp_path / "out")
    assert sum(line["export_bytes"] for line in said["lines"]) == result["bytes"]
    assert sum(line["source_bytes"] for line in said["lines"]) == result["weight_bytes"] == said["weight_bytes"]
    for name in ("directory", "algorithm", "tensors", "files", "serving_tp", "kept"):
        assert said[name] == result[name]
    assert said["free_bytes"] > said["disk_bytes"]
    assert (said["seconds"] > 0, said["trial_bytes"] > 0, said["memory_bytes"] > 0) == (True, True, True)


def test_a_training_checkpoint_s_too(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    checkpoint = save_model(tiny_qwen3_dir, tmp_path / "saved")
    for name, options in {"packed": FORMAT, "plain": ()}.items():
        arguments = ("export", checkpoint, tmp_path / name, "--hf", tiny_qwen3_dir, *options)
        said = planned(*arguments, beside=tmp_path)
        assert run(*arguments)[0] == 0
        assert said["disk_bytes"] == written(tmp_path / name)
        assert any(line["format"] for line in said["lines"]) is (name == "packed")


def test_what_is_not_quantized_has_its_reason(tiny_qwen3_moe_dir: Path, tmp_path: Path) -> None:
    options = (*FORMAT, "--preset", "mlp_only", "--exclude", "model.layers.0.mlp.experts.*")
    said = planned("quantize", tiny_qwen3_moe_dir, tmp_path / "out", *options, beside=tmp_path)

    why: dict[str, set[str]] = {}
    for line in said["lines"]:
        why.setdefault(line["kind"], set()).add(line["format"] or line["reason"])
    # Of layer 0 and of the others.
    assert why["mlp.experts.down_proj.weight"] == {"excluded", "w4a16_nvfp4"}
    assert why["self_attn.o_proj.weight"] == {"linear weight that mlp_only leaves out"}
    assert why["mlp.gate.weight"] == {"router, kept in high precision: servers load it so"}
    assert why["norm.weight"] == {"no matrix product"}


def test_people_read_every_kind_of_tensor_and_that_nothing_was_written(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    code, output = run("quantize", tiny_qwen3_dir, tmp_path / "out", *FORMAT, "--dry-run")

    assert code == 0
    for kind in ("mlp.down_proj.weight", "self_attn.q_proj.weight", "embed_tokens.weight"):
        assert kind in output
    assert output.splitlines()[-1] == "Nothing was written."
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_exits_2(tiny_qwen3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mock, as a test cannot fill a disk."""

    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr("quantplug.export.files.preview.shutil.disk_usage", lambda _: Usage(100))

    code, output = run("quantize", tiny_qwen3_dir, tmp_path / "out", *FORMAT, "--dry-run")

    assert code == 2
    assert "The disk has no room" in output
    assert "100 bytes are free" in output


def test_what_could_not_be_done_is_refused_as_without_it(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()

    assert run("quantize", tiny_qwen3_dir, tmp_path / "out", *FORMAT, "--dry-run")[0] == 2
    html = ("--html", tmp_path / "page.html")
    assert (
        "a dry run writes nothing" in run("quantize", tiny_qwen3_dir, tmp_path / "new", *FORMAT, "--dry-run", *html)[1]
    )
    assert run("quantize", tiny_qwen3_dir, tmp_path / "new", *FORMAT, "--dry-run", "--exclude", "absent")[0] == 2


def test_sizes_for_servers_are_said_before_anything_is_packed(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    arguments = ("quantize", tiny_qwen3_dir, tmp_path / "out", *FORMAT)
    (before,) = sizes_said(run(*arguments, "--dry-run")[1])

    assert sizes_said(run(*arguments)[1]) == [before]
    assert sizes_said(run("verify", tmp_path / "out")[1]) == [before]


def sizes_said(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("Tensor-parallel sizes for servers: 1")]
