"""`quantplug models`: what is served, and what a directory is, with commands that do what they say."""

import json
import shlex
from pathlib import Path

import pytest

from quantplug.mappings.families import FAMILIES
from tests.checkpoint.torch_dist.written import save_model
from tests.cli.shell import run


def said_of(directory: Path, tmp_path: Path) -> dict[str, object]:
    code, _ = run("models", directory, "--json", tmp_path / "said.json")
    assert code == 0
    return dict(json.loads((tmp_path / "said.json").read_text()))


def test_every_family_is_listed_with_its_architectures() -> None:
    code, output = run("models")

    assert code == 0
    for family in FAMILIES:
        (line,) = (line for line in output.splitlines() if line.split()[:1] == [family.name])
        assert all(name in line for name in family.architectures)


def test_a_plain_directory_is_quantized_and_proved_by_the_commands_that_are_said(
    tiny_qwen3_moe_dir: Path, tmp_path: Path
) -> None:
    said = said_of(tiny_qwen3_moe_dir, tmp_path)

    assert said["kind"] == "Hugging Face checkpoint, not quantized"
    assert (said["family"], said["architecture"]) == ("qwen3_moe", "Qwen3MoeForCausalLM")
    commands = said["commands"]
    assert isinstance(commands, list)
    for line in commands:
        program, *arguments = shlex.split(line.replace("OUT", str(tmp_path / "out")))
        assert program == "quantplug"
        assert run(*arguments)[0] == 0, line
    # What was written is quantized, and to be judged.
    exported = said_of(tmp_path / "out", tmp_path)
    assert exported["kind"] == "Hugging Face checkpoint, quantized"
    assert str(exported["written by"]).startswith("modelopt quantplug-")
    assert exported["commands"] == [f"quantplug verify {shlex.quote(str(tmp_path / 'out'))}"]


def test_a_checkpoint_of_megatron_s_is_exported_by_the_commands_that_are_said(
    tiny_qwen3_dir: Path, tmp_path: Path
) -> None:
    checkpoint = save_model(tiny_qwen3_dir, tmp_path / "saved")

    said = said_of(checkpoint, tmp_path)

    assert said["kind"] == "Megatron checkpoint (torch_dist)"
    commands = said["commands"]
    assert isinstance(commands, list)
    _, *arguments = shlex.split(
        commands[0].replace("OUT", str(tmp_path / "out")).replace("HF_DIR", str(tiny_qwen3_dir))
    )
    assert run(*arguments)[0] == 0
    assert run("verify", tmp_path / "out", "--source", tiny_qwen3_dir)[0] == 0


def test_an_architecture_that_no_family_serves_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["NobodyForCausalLM"]}))

    code, output = run("models", tmp_path)

    assert code == 0
    assert "none serves it" in output
    assert "No family serves this architecture" in output
    assert "quantplug quantize" not in output


@pytest.mark.parametrize("name", ["nothing_in_it", "absent"])
def test_what_is_no_checkpoint_exits_2(name: str, tmp_path: Path) -> None:
    (tmp_path / "nothing_in_it").mkdir()

    code, output = run("models", tmp_path / name)

    assert code == 2
    assert name in output
    assert "What to do" in output


def test_a_checkpoint_of_another_format_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "mp_rank_00").mkdir()

    code, output = run("models", tmp_path)

    assert code == 2
    assert "of the format torch, and torch_dist alone is read" in output
