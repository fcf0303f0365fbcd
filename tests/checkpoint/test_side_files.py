"""What goes along with the weights: by kind, never a way out of the source, and all of it said."""

import json
import os
from pathlib import Path

import pytest

from quantplug.checkpoint.side_files import choose_side_files
from quantplug.errors import SourceError

CARRIED = [
    "LICENSE",
    "README.md",
    "USE_POLICY.md",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
]
LEFT_OUT = [
    ".env",
    ".gitattributes",
    "consolidated.safetensors",
    "data.pkl",
    "helper.so",
    "install.sh",
    "model.gguf",
    "modeling_own.py",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "training_args.bin",
]
WRITTEN_ANEW = ["config.json", "hf_quant_config.json", "model.safetensors.index.json", "one.safetensors"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    for name in (*CARRIED, *LEFT_OUT, *WRITTEN_ANEW):
        (directory / name).write_text("{}")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (directory / "onnx").mkdir()
    (directory / "onnx" / "tokenizer.json").write_text("{}")
    return directory


def test_kinds(source: Path) -> None:
    chosen = choose_side_files(source, code=False)
    assert sorted(chosen.carried) == sorted([*CARRIED, "additional_chat_templates/tool_use.jinja"])
    assert sorted(chosen.left_out) == sorted([*LEFT_OUT, "onnx"])


def test_code_only_where_it_is_trusted(source: Path) -> None:
    assert "code" in choose_side_files(source, code=False).left_out["modeling_own.py"]
    assert "modeling_own.py" in choose_side_files(source, code=True).carried
    assert "helper.so" not in choose_side_files(source, code=True).carried


@pytest.mark.parametrize("name", ["notes.txt", "additional_chat_templates/evil.jinja"])
def test_links_that_leave_the_source_are_not_copied(name: str, source: Path) -> None:
    (source.parent / "secret").write_text("token")
    (source / name).symlink_to(source.parent / "secret")
    chosen = choose_side_files(source, code=True)
    assert name not in chosen.carried
    assert chosen.left_out[name] == "is a link to a file outside of the directory"


def test_a_template_folder_that_is_a_link_is_not_entered(source: Path) -> None:
    (source / "additional_chat_templates" / "tool_use.jinja").unlink()
    (source / "additional_chat_templates").rmdir()
    (source / "additional_chat_templates").symlink_to(source.parent)
    assert choose_side_files(source, code=True).left_out["additional_chat_templates"] == "is a directory"


def test_what_should_be_carried_and_cannot_be_is_named_before_anything_is_packed(source: Path) -> None:
    for name in ("tokenizer.json", "merges.txt"):
        (source / name).unlink()
    os.mkfifo(source / "tokenizer.json")
    (source / "merges.txt").symlink_to("gone")
    with pytest.raises(SourceError, match="cannot be carried over") as caught:
        choose_side_files(source, code=False)
    assert [(offender.parameter, offender.reason) for offender in caught.value.offenders] == [
        (str(source / "merges.txt"), "does not exist"),
        (str(source / "tokenizer.json"), "is a named pipe, not a file"),
    ]


def test_a_name_that_a_terminal_would_obey_is_not_spread(source: Path) -> None:
    (source / "notes\x1b[31m.txt").touch()
    assert choose_side_files(source, code=False).left_out["notes\x1b[31m.txt"] == "has control codes in its name"
