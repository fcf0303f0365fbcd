"""Holds the files beside the weights against the source's: tokenizer, templates, processors, generation defaults."""

import filecmp
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from quantplug.checkpoint.untrusted.files import file_problem, read_json
from quantplug.checkpoint.untrusted.json_reader import as_object, as_text, as_texts
from quantplug.errors import SourceError
from quantplug.printable import shown
from quantplug.verify.checks import Check
from quantplug.verify.inventory.modules import Inventory
from quantplug.verify.report import Finding, error, warning
from quantplug.verify.rules.settings import same

# Files that decide what tokens a text, or what values an image, becomes.
_BY_CONTENT = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "tiktoken.model",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
_TOKENIZER_FILES = frozenset(_BY_CONTENT[:6])
# Vocabularies of tokenizers that are code (Kimi's, Qwen's first), of sentencepiece by other names, and Mistral's.
_VOCABULARIES = (".model", ".tiktoken", ".vocab", ".bpe")
_TEKKEN = "tekken.json"
_MOST_BYTES = 256 * 2**20  # of a JSON file that is read; the largest tokenizer known to us has 35 MB
_GENERATION = "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
_ADDED = "added_tokens_decoder"
# What a newer transformers writes otherwise, and no server reads from here.
_NOT_READ = {
    "tokenizer.json": frozenset({"version", "padding", "truncation"}),
    _GENERATION: frozenset({"transformers_version", "_from_model_config"}),
}
# Of tokenizer_config.json: what changes the tokens of a text. The rest differs with the version that wrote it.
_DECIDING = frozenset({
    "add_bos_token", "add_eos_token", "add_prefix_space", "bos_token", "eos_token", "pad_token", "unk_token", "legacy",
    "split_special_tokens",
})  # fmt: skip


_JSON = (*(name for name in _BY_CONTENT if name.endswith(".json")), _TOKENIZER_CONFIG, _SPECIAL_TOKENS, _GENERATION)


def readable(inventory: Inventory) -> Iterator[Finding]:
    """Of the files beside the weights those of JSON are such as their readers take: text in UTF-8, and an object."""
    directory = inventory.checkpoint.directory
    for name in _JSON:
        if _is_read(directory / name):
            try:
                read_json(directory, name)
            except SourceError as problem:
                yield from (
                    error(Check.SIDE_FILES, name, f"{offender.reason}: readers stop, or go on without it")
                    for offender in problem.offenders
                )


def side_files(export: Path, source: Path) -> Iterator[Finding]:
    """Files of the source that the export lacks, or has with another content."""
    others = sorted(path.name for path in source.iterdir() if path.suffix in _VOCABULARIES or path.name == _TEKKEN)
    for name in dict.fromkeys((*_BY_CONTENT, *others)):
        if not _is_read(source / name):
            continue
        if not _is_read(export / name):
            # `tokenizer.json` holds all that the older files say, so a tool may leave these out.
            older = (name in _TOKENIZER_FILES and name != "tokenizer.json") or name in others
            held = older and _is_read(export / "tokenizer.json")
            if not held:
                yield error(
                    Check.SIDE_FILES, name, "in the source, but not in the export: servers cannot read a text so"
                )
        elif not _alike(export / name, source / name, lambda value: value):
            yield error(Check.SIDE_FILES, name, "is not the source's: servers make other tokens of a text")
    yield from _tokenizer_config(export, source)
    yield from _code(export, source)
    yield from _chat_template(export, source)
    yield from _generation(export, source)


def _tokenizer_config(export: Path, source: Path) -> Iterator[Finding]:
    if _object(source / _TOKENIZER_CONFIG) and not _object(export / _TOKENIZER_CONFIG):
        yield error(Check.SIDE_FILES, _TOKENIZER_CONFIG, "in the source, but not in the export")
        return
    here, there = _settings(export), _settings(source)
    for key in sorted(_DECIDING) if here and there else ():
        if not same(_text_of(here.get(key)), _text_of(there.get(key))):
            message = f"{key} is {shown(here.get(key))}, in the source {shown(there.get(key))}"
            yield error(Check.SIDE_FILES, _TOKENIZER_CONFIG, message)
    added, known = _added_tokens(export), _added_tokens(source)
    others = sorted(token for token in added.keys() | known.keys() if added.get(token) != known.get(token))
    if others:
        token = others[0]
        more = f", and {len(others) - 1} more tokens" if len(others) > 1 else ""
        message = f"token {token} is {shown(added.get(token))}, in the source {shown(known.get(token))}{more}"
        yield error(Check.SIDE_FILES, "added tokens", f"{message}: servers make other tokens of a text")


def _settings(directory: Path) -> Mapping[str, Any]:
    """What a tokenizer is told, as transformers 5.14 puts it together (`PreTrainedTokenizerBase._from_pretrained`)."""
    said = _object(directory / _TOKENIZER_CONFIG)
    # The older file is read where a config does not list its tokens, and is then what counts.
    return said if _ADDED in said else {**said, **_object(directory / _SPECIAL_TOKENS)}


def _added_tokens(directory: Path) -> Mapping[str, Any]:
    """Texts of the tokens that are added to a vocabulary, by their numbers: from whichever of three places has them."""
    in_json = _object(directory / "tokenizer.json").get("added_tokens")
    found = {
        str(token.get("id")): token.get("content")
        for token in (in_json if isinstance(in_json, list) else ())
        if isinstance(token, Mapping)
    }
    listed = _object(directory / _TOKENIZER_CONFIG).get(_ADDED)
    # Those that a config lists are added to those of tokenizer.json; without a list the oldest of the files is read.
    if isinstance(listed, Mapping):
        return found | {number: _text_of(token) for number, token in listed.items()}
    return {str(number): text for text, number in _object(directory / "added_tokens.json").items()} | found


def _code(export: Path, source: Path) -> Iterator[Finding]:
    """The code that makes the tokenizer, where a checkpoint brings it: there is no other way to read a text then."""
    for reference in sorted(_references(_object(source / _TOKENIZER_CONFIG).get("auto_map"))):
        # `owner/name--file.Class` is fetched from the hub (transformers' `get_class_from_dynamic_module`).
        name = f"{reference.partition('.')[0]}.py"
        if "--" in reference or not _is_read(source / name):
            continue
        if not _is_read(export / name):
            message = f"in the source, whose tokenizer is {reference} in it, but not in the export"
            yield error(Check.SIDE_FILES, name, message)
        elif not filecmp.cmp(export / name, source / name, shallow=False):
            yield error(Check.SIDE_FILES, name, f"is not the source's, whose tokenizer is {reference} in it")


def _references(named: Any) -> Iterator[str]:
    """The classes that an `auto_map` names: one, or a slow and a fast one, of each kind."""
    for value in as_object(named).values():
        yield from as_texts([it for it in value if it] if isinstance(value, list) else [value])


def _text_of(token: Any) -> Any:
    """Of a special token, which is text, or an object with its `content`."""
    return token.get("content") if isinstance(token, Mapping) else token


def _chat_template(export: Path, source: Path) -> Iterator[Finding]:
    here, there = _template(export), _template(source)
    if there and here != there:
        found = "is not the source's" if here else "in the source, but not in the export"
        yield error(Check.SIDE_FILES, "chat template", f"{found}: servers give the model other prompts")


def _template(directory: Path) -> str:
    """From whichever of the three places has it; a list of named ones as its JSON."""
    # transformers looks here first, since it began to write templates to a file of their own.
    jinja = directory / "chat_template.jinja"
    if _is_read(jinja) and jinja.stat().st_size <= _MOST_BYTES:
        return jinja.read_bytes().decode("utf-8", "replace").strip()
    for name in ("chat_template.json", _TOKENIZER_CONFIG):
        template = _object(directory / name).get("chat_template")
        if template:
            return as_text(template).strip() or json.dumps(template, sort_keys=True)
    return ""


def _generation(export: Path, source: Path) -> Iterator[Finding]:
    if not _is_read(source / _GENERATION):
        return
    if not _is_read(export / _GENERATION):
        message = "in the source, but not in the export: servers sample otherwise, and may not know where to stop"
        yield warning(Check.SIDE_FILES, _GENERATION, message)
    elif not _alike(export / _GENERATION, source / _GENERATION, _said):
        yield error(Check.SIDE_FILES, _GENERATION, "is not the source's: servers sample, or stop, otherwise")


def _said(value: Any) -> Any:
    """Without what says nothing."""
    return {key: item for key, item in as_object(value).items() if item is not None}


def _alike(ours: Path, theirs: Path, simplify: Callable[[Any], Any]) -> bool:
    """The same bytes, or the same JSON."""
    try:
        if filecmp.cmp(ours, theirs, shallow=False):
            return True
    except OSError:
        return False
    # Bytes differ as soon as another version has written the file; what it says is what counts.
    ignored = _NOT_READ.get(ours.name, frozenset())
    here, there = (
        {key: value for key, value in _object(path).items() if key not in ignored} for path in (ours, theirs)
    )
    return bool(there) and simplify(here) == simplify(there)


def _object(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file; empty where there is none that can be read."""
    try:
        if not _is_read(path) or path.stat().st_size > _MOST_BYTES:
            return {}
        # As text: of bytes Python's parser reads UTF-16, and a mark of byte order, at which transformers stops.
        return as_object(json.loads(path.read_bytes().decode()))
    except (OSError, ValueError, RecursionError):
        return {}


def _is_read(path: Path) -> bool:
    """Whether it is a regular file that does not lie outside of its directory."""
    return file_problem(path.parent, path.name) is None


RULES = (readable,)
