"""The files beside the weights against the source's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from quantplug.verify import Severity, verify_checkpoint
from quantplug.verify.checks import Check
from quantplug.verify.rules.side_files import side_files

FILES: dict[str, Any] = {
    "tokenizer.json": {"version": "1.0", "model": {"vocab": {"a": 0}}, "padding": None},
    "tokenizer_config.json": {"eos_token": "<e>", "add_bos_token": False, "chat_template": "{{ a }}"},
    "generation_config.json": {"eos_token_id": [1, 2], "temperature": 0.6, "transformers_version": "4"},
    "merges.txt": "a b\n",
    "preprocessor_config.json": {"size": 224},
}


def write(directory: Path, files: dict[str, Any]) -> Path:
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def found(tmp_path: Path, changed: dict[str, Any]) -> dict[str, Severity]:
    """Findings where these files are changed; None removes one."""
    files = {name: content for name, content in (FILES | changed).items() if content is not None}
    findings = side_files(write(tmp_path / "export", files), write(tmp_path / "source", FILES))
    return {finding.subject: finding.severity for finding in findings}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"tokenizer.json": {"model": {"vocab": {"b": 0}}}}, {"tokenizer.json": Severity.ERROR}),
        ({"tokenizer.json": None}, {"tokenizer.json": Severity.ERROR, "merges.txt": None}),
        ({"tokenizer.json": "{"}, {"tokenizer.json": Severity.ERROR}),
        (
            {"tokenizer_config.json": FILES["tokenizer_config.json"] | {"eos_token": "<f>"}},
            {"tokenizer_config.json": Severity.ERROR},
        ),
        (
            {"tokenizer_config.json": FILES["tokenizer_config.json"] | {"chat_template": "{{ b }}"}},
            {"chat template": Severity.ERROR},
        ),
        ({"chat_template.jinja": "{{ b }}"}, {"chat template": Severity.ERROR}),
        ({"generation_config.json": {"eos_token_id": 1}}, {"generation_config.json": Severity.ERROR}),
        ({"generation_config.json": None}, {"generation_config.json": Severity.WARNING}),
        ({"preprocessor_config.json": {"size": 225}}, {"preprocessor_config.json": Severity.ERROR}),
        ({"preprocessor_config.json": None}, {"preprocessor_config.json": Severity.ERROR}),
        ({"merges.txt": "b a\n"}, {"merges.txt": Severity.ERROR}),
    ],
)
def test_what_differs_is_found(tmp_path: Path, changed: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found(tmp_path, changed) == {name: severity for name, severity in expected.items() if severity}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_json_that_transformers_cannot_read_is_not_the_sources(encoding: str, tmp_path: Path) -> None:
    export, source = write(tmp_path / "export", FILES), write(tmp_path / "source", FILES)
    for name, content in FILES.items():
        if name.endswith(".json"):
            (export / name).write_bytes(json.dumps(content).encode(encoding))

    told = {finding.subject for finding in side_files(export, source) if finding.severity is Severity.ERROR}

    with pytest.raises((OSError, UnicodeDecodeError)):
        GenerationConfig.from_pretrained(export)
    assert {name for name in FILES if name.endswith(".json")} <= told


def test_json_that_nothing_reads_is_told_without_a_source(pristine: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(pristine["w4a16"], tmp_path / "it")
    marked, cut = tmp_path / "it" / "generation_config.json", tmp_path / "it" / "tokenizer_config.json"
    marked.write_bytes(marked.read_bytes().decode().encode("utf-8-sig"))
    cut.write_text('{"eos_token": ')

    told = {
        it.subject: it.message for it in verify_checkpoint(tmp_path / "it").findings if it.check is Check.SIDE_FILES
    }

    assert told.keys() == {marked.name, cut.name}
    assert "BOM" in told[marked.name]


TOKENS: dict[str, Any] = {
    "tokenizer.json": {"model": {"vocab": {"a": 0, "<e>": 1}}, "added_tokens": [{"id": 1, "content": "<e>"}]},
    "tokenizer_config.json": {"add_bos_token": False},
    "special_tokens_map.json": {"eos_token": {"content": "<e>"}},
    "added_tokens.json": {"<e>": 1},
}
LISTED = {"add_bos_token": False, "eos_token": "<e>", "added_tokens_decoder": {"1": {"content": "<e>"}}}


@pytest.mark.parametrize(
    ("changed", "subjects"),
    [
        ({"special_tokens_map.json": {"eos_token": "a"}}, {"tokenizer_config.json"}),
        ({"special_tokens_map.json": None}, {"tokenizer_config.json"}),
        ({"tokenizer_config.json": LISTED | {"added_tokens_decoder": {"1": {"content": "<f>"}}}}, {"added tokens"}),
        ({"tokenizer_config.json": LISTED | {"added_tokens_decoder": {"2": {"content": "<f>"}}}}, {"added tokens"}),
        # As newer releases write them: all in the config, or all in tokenizer.json.
        ({"tokenizer_config.json": LISTED, "special_tokens_map.json": None, "added_tokens.json": None}, set()),
        ({"tokenizer_config.json": LISTED, "special_tokens_map.json": {"eos_token": "not read"}}, set()),
        (
            {
                "tokenizer_config.json": {"add_bos_token": False, "eos_token": "<e>"},
                "special_tokens_map.json": None,
                "added_tokens.json": None,
            },
            set(),
        ),
    ],
)
def test_special_and_added_tokens_are_those_that_transformers_finds(
    tmp_path: Path, changed: dict[str, Any], subjects: set[str]
) -> None:
    files = {name: said for name, said in (TOKENS | changed).items() if said is not None}
    findings = list(side_files(write(tmp_path / "export", files), write(tmp_path / "source", TOKENS)))
    assert {finding.subject for finding in findings} == subjects


CODE: dict[str, Any] = {
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}},
    "tokenization_kimi.py": "class TikTokenTokenizer: ...",
    "kimi.tiktoken": "YQ== 0",
    "tekken.json": {"vocab": ["a"]},
    "sentencepiece.bpe.model": "x",
}


@pytest.mark.parametrize("name", [name for name in CODE if name != "tokenizer_config.json"])
@pytest.mark.parametrize("content", [None, "another"])
def test_vocabularies_of_any_name_and_the_code_that_reads_them(tmp_path: Path, name: str, content: object) -> None:
    """Kimi-K2's tokenizer is code and a vocabulary of its own, and there is no tokenizer.json."""
    files = {it: said for it, said in (CODE | {name: content}).items() if said is not None}
    findings = list(side_files(write(tmp_path / "export", files), write(tmp_path / "source", CODE)))
    assert [(finding.subject, finding.severity) for finding in findings] == [(name, Severity.ERROR)]


def test_code_of_another_repository_and_what_tokenizer_json_holds_need_not_be_there(tmp_path: Path) -> None:
    elsewhere = {"auto_map": {"AutoTokenizer": "owner/name--tokenization_kimi.TikTokenTokenizer"}}
    source = CODE | FILES | {"tokenizer_config.json": elsewhere}
    export = FILES | {"tokenizer_config.json": elsewhere}
    assert list(side_files(write(tmp_path / "export", export), write(tmp_path / "source", source))) == []


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"tokenizer.json": {"model": {"vocab": {"a": 0}}, "version": "1.1", "truncation": None}},
        {
            "tokenizer_config.json": {"eos_token": {"content": "<e>", "lstrip": False}, "add_bos_token": False},
            "chat_template.jinja": "{{ a }}\n",
        },
        {"generation_config.json": {"eos_token_id": [1, 2], "temperature": 0.6, "top_k": None}},
        {"merges.txt": None},
    ],
)
def test_the_same_in_another_form_is_not(tmp_path: Path, changed: dict[str, Any]) -> None:
    assert found(tmp_path, changed) == {}
