"""`quantplug quantize` as its user meets it."""

import json
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.shell import ROOT, command, read_some, run


def test_quantize_says_what_it_wrote_and_how_fast(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    code, output = run("quantize", tiny_qwen3_dir, tmp_path / "out", "--format", "w4a16_nvfp4")
    assert code == 0
    assert "(W4A16_NVFP4)" in output
    assert "GB/s" in output
    assert run("verify", tmp_path / "out", "--source", tiny_qwen3_dir)[0] == 0


def test_quantize_leaves_out_what_is_excluded(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    options = ("--format", "w8a16_fp8", "--exclude", "model.layers.0.*", "--exclude", "*.o_proj")
    assert run("quantize", tiny_qwen3_dir, tmp_path / "out", *options)[0] == 0
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"} <= set(ignored)
    assert "model.layers.1.mlp.down_proj" not in ignored


def test_quantize_by_a_recipe(tiny_qwen3_moe_dir: Path, tmp_path: Path) -> None:
    recipe = "nvfp4_experts_only_input_scale1-kv_fp8_cast"
    assert run("quantize", tiny_qwen3_moe_dir, tmp_path / "a", "--recipe", recipe)[0] == 0
    options = ("--format", "nvfp4", "--preset", "experts_only", "--input-scale", "1", "--kv-cache", "fp8_cast")
    assert run("quantize", tiny_qwen3_moe_dir, tmp_path / "b", *options)[0] == 0
    for name in ("config.json", "hf_quant_config.json", "model-00001-of-00001.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert run("verify", tmp_path / "a", "--source", tiny_qwen3_moe_dir)[0] == 0


@pytest.mark.parametrize(
    "options", [("--recipe", "nvfp4_default-kv_fp8"), ("--recipe", "nvfp4_weight_only-kv_fp16", "--preset", "all")]
)
def test_a_recipe_that_needs_data_or_is_not_alone_exits_2(
    options: tuple[str, ...], tiny_qwen3_dir: Path, tmp_path: Path
) -> None:
    code, output = run("quantize", tiny_qwen3_dir, tmp_path / "out", *options)
    assert code == 2
    assert "What to do" in output
    assert list(tmp_path.iterdir()) == []


def test_quantize_asks_for_a_kv_cache(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    options = ("--format", "w4a16_nvfp4", "--kv-cache", "fp8_cast")
    assert run("quantize", tiny_qwen3_dir, tmp_path / "out", *options)[0] == 0
    said = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]["kv_cache_quant_algo"]
    assert said == "FP8"
    assert run("verify", tmp_path / "out", "--source", tiny_qwen3_dir)[0] == 0


def test_quantize_spells_a_format_as_it_is_asked_to(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    options = ("--format", "fp8", "--input-scale", "1", "--dialect", "compressed-tensors")
    assert run("quantize", tiny_qwen3_dir, tmp_path / "out", *options)[0] == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "compressed-tensors"
    assert run("verify", tmp_path / "out", "--source", tiny_qwen3_dir)[0] == 0


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--format", "nvfp4"),
        ("--format", "w8a16_fp8", "--exclude", "absent"),
        ("--format", "fp8_blockwise"),
        ("--format", "w4a16_nvfp4", "--dialect", "deepseek"),
    ],
)
def test_quantize_that_cannot_be_done_exits_2(options: tuple[str, ...], tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    assert run("quantize", tiny_qwen3_dir, tmp_path / "out", *options)[0] == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "moment", ["quantplug.cli.terminal.ByteBar.__call__", "quantplug.export.files.finish.write_configs"]
)
def test_ctrl_c_says_what_is_kept_and_how_to_go_on(
    moment: str, tiny_qwen3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first look at a weight, when nothing is finished yet, and when every file of weights is."""

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    arguments = ("quantize", tiny_qwen3_dir, tmp_path / "out", "--format", "w4a16_nvfp4")
    with monkeypatch.context() as patch:
        patch.setattr(moment, interrupt)
        # What the shell gave this process, which a test calls without one.
        patch.setattr(sys, "argv", ["quantplug", *map(str, arguments)])
        code, output = run(*arguments)
    lines = output.splitlines()
    assert (code, lines[0], len(lines)) == (130, "Stopped.", 3)
    assert lines[2] == f"  {shlex.join(['quantplug', *map(str, arguments)])}"
    left = list(tmp_path.iterdir())
    if moment.endswith("write_configs"):
        assert [str(path) for path in left] == [str(tmp_path / ".out.partial")]
        assert f"kept in {left[0]}: the same command goes on from there" in lines[1]
        assert list(left[0].rglob("*.safetensors"))
    else:
        assert (left, lines[1].partition(":")[0]) == ([], "Nothing was finished, and nothing is left")
    assert run(*arguments)[0] == 0
    assert run("verify", tmp_path / "out", "--source", tiny_qwen3_dir)[0] == 0


def test_a_terminal_sees_how_far_quantize_is(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    reader, writer = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    arguments = command("quantize", tiny_qwen3_dir, tmp_path / "out", "--format", "w8a16_fp8")
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=writer, env=environment) as process:
        os.close(writer)
        shown = b"".join(iter(lambda: read_some(reader), b""))
        assert process.stdout is not None
        printed = process.stdout.read()
    os.close(reader)
    assert process.returncode == 0
    assert b"Packing and writing" in shown
    assert b"Packing and writing" not in printed
