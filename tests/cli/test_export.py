"""`quantplug export` as its user meets it."""

from pathlib import Path

import pytest

from tests.checkpoint.torch_dist.written import put_object, save_model
from tests.cli.shell import run


@pytest.fixture(scope="module")
def checkpoint(tiny_qwen3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_model(tiny_qwen3_dir, tmp_path_factory.mktemp("saved") / "iter_0000007")
    put_object(directory, "rng_state/shard_0_1", [{"seed": 3}])
    (directory.parent / "latest_checkpointed_iteration.txt").write_text("7")
    return directory.parent


def test_export_says_what_it_wrote_and_what_it_left(checkpoint: Path, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    options = ("--hf", tiny_qwen3_dir, "--format", "w4a16_nvfp4", "--iteration", "7")
    code, output = run("export", checkpoint, tmp_path / "out", *options)

    assert code == 0
    assert "(W4A16_NVFP4)" in output
    assert "Left aside: random number generators, 1 entries" in output
    assert run("verify", tmp_path / "out", "--source", tiny_qwen3_dir)[0] == 0


def test_without_a_format_a_plain_model_stays_plain(checkpoint: Path, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    code, output = run("export", checkpoint, tmp_path / "out", "--hf", tiny_qwen3_dir)

    assert code == 0
    assert "(not quantized)" in output


def test_each_command_says_which_is_for_the_directory_of_the_other(
    checkpoint: Path, tiny_qwen3_dir: Path, tmp_path: Path
) -> None:
    code, output = run("export", tiny_qwen3_dir, tmp_path / "out", "--hf", tiny_qwen3_dir)
    assert (code, "quantplug quantize" in output) == (2, True)
    code, output = run("quantize", checkpoint, tmp_path / "out", "--format", "mxfp8")
    assert (code, "quantplug export CKPT OUT --hf DIR" in output) == (2, True)


def test_a_format_that_needs_data_is_named_as_it_was_given(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    code, output = run("quantize", tiny_qwen3_dir, tmp_path / "out", "--format", "nvfp4")
    assert code == 2
    assert "format: is 'nvfp4', which quantizes activations" in output
    assert "--input-scale 1" in output


@pytest.mark.parametrize("options", [("--format", "nvfp4"), ("--format", "int3"), ("--iteration", "8")])
def test_export_that_cannot_be_done_exits_2(
    options: tuple[str, ...], checkpoint: Path, tiny_qwen3_dir: Path, tmp_path: Path
) -> None:
    assert run("export", checkpoint, tmp_path / "out", "--hf", tiny_qwen3_dir, *options)[0] == 2
    assert list(tmp_path.iterdir()) == []
