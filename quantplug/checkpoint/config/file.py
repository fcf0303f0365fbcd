"""config.json of a Hugging Face checkpoint as it stands in the file."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from quantplug.checkpoint.adapter import refuse_adapter_alone
from quantplug.checkpoint.untrusted.files import read_json
from quantplug.errors import Offender, SourceError, UnsupportedModelError
from quantplug.mappings.table import Family, MegatronConfig

CONFIG_FILE = "config.json"
# Where transformers looks for `auto_map` (its *Auto* classes).
_FILES_THAT_NAME_CODE = (
    CONFIG_FILE,
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
_TEXT, _TIED = "text_config", "tie_word_embeddings"
# What every reader of a config takes for an object, where it is set.
_OBJECTS = ("quantization_config", "compression_config", "text_config", "vision_config", "auto_map")

UNUSABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
"""What a family's table, or a class of transformers, raises of a setting that is missing or of a wrong type."""


def read_config_file(directory: Path) -> dict[str, Any]:
    """Its settings, without the defaults that transformers would fill in.

    Raises:
        SourceError: There is none, or an adapter in its place; or it is not a JSON object, or what must be an object in
            it is none.
    """
    if not os.path.lexists(directory / CONFIG_FILE):
        refuse_adapter_alone(directory)
        raise SourceError(
            "The directory is no Hugging Face checkpoint.",
            [Offender(str(directory / CONFIG_FILE), "does not exist")],
            "Pass a directory that save_pretrained wrote. A checkpoint of Megatron's is exported by export_checkpoint "
            "(quantplug export CKPT OUT --hf DIR).",
        )
    config = read_json(directory, CONFIG_FILE)
    for key in _OBJECTS:
        if not isinstance(config.get(key), dict | None):
            raise config_error(directory, f"has a {key} that is not a JSON object")
    for where in (config, config.get(_TEXT) or config):
        if not isinstance(where.get(_TIED), bool | None):
            raise config_error(directory, f"has a {_TIED} that is neither true nor false: {where[_TIED]!r}"[:200])
    return config


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether the output layer is the embedding.

    transformers 5 and vLLM read it at the top of a vision-language model's config; where it is not there, what its
    language model says holds (`text_config`, by which vLLM builds that).
    """
    text = config.get(_TEXT)
    said = config.get(_TIED)
    if said is None and isinstance(text, Mapping):
        said = text.get(_TIED)
    return bool(said)


def saved_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Type that the weights were saved in, by the config; BF16 where it names none that a model can be built in."""
    text = config.get(_TEXT)
    # Transformers 5 writes `dtype`, earlier ones `torch_dtype`; a vision-language model may say it inside alone.
    places = (config, text if isinstance(text, Mapping) else {})
    said = (place.get(key) for place in places for key in ("dtype", "torch_dtype"))
    spelled = str(next(filter(None, said), None)).removeprefix("torch.")
    return {"float16": torch.float16, "float32": torch.float32}.get(spelled, torch.bfloat16)


def with_settings(config: Mapping[str, Any], settings: Mapping[str, Any], nested: str | None) -> dict[str, Any]:
    """A config with other settings of a model.

    Args:
        nested: Key of the language model's settings in that of a whole of several models; None where there is none.
            What the whole says too is changed there likewise.
    """
    if nested is None:
        return {**config, **settings}
    said_twice = {name: value for name, value in settings.items() if name in config}
    return {**config, **said_twice, nested: {**config[nested], **settings}}


def counted_mtp(config: Mapping[str, Any], family: Family) -> Any:
    """What a config counts as layers of multi-token prediction, as it stands there; None where it says nothing."""
    settings = config if family.nested is None else config[family.nested]
    return settings.get(family.mtp_setting)


def counting_no_mtp(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The config of a model without layers of multi-token prediction; as it is where it counts none."""
    if not counted_mtp(config, family):
        return dict(config)
    return with_settings(config, {family.mtp_setting: 0}, family.nested)


def architecture_of(config: dict[str, Any], directory: Path) -> str:
    """`architectures[0]`.

    Raises:
        SourceError: It names none.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise config_error(directory, "names no architecture")
    return architectures[0]


def refuse_own_code(directory: Path, *, trusted: bool) -> None:
    """Refuses a checkpoint that names code of its own for readers to run, unless the caller has read and allowed it.

    Raises:
        SourceError: Names every file that does so, and what it names; or one of them cannot be read.
    """
    offenders = []
    for name in _FILES_THAT_NAME_CODE:
        named = _auto_map(directory, name)
        if named and not trusted:
            said = ", ".join(dict.fromkeys(_words(named)))
            offenders.append(Offender(str(directory / name), f"auto_map names {said[:1000]}"))
    if offenders:
        raise SourceError(
            "The source checkpoint brings its own code.",
            offenders,
            "Read that code, then allow it: trust_remote_code=True, or --trust-remote-code.",
        )


def _words(named: object) -> Iterator[str]:
    """What an `auto_map` names, of any form: a tokenizer's is a list of a slow and a fast one, or null for either."""
    if isinstance(named, dict):
        named = list(named.values())
    if isinstance(named, list):
        for each in named:
            yield from _words(each)
    elif named is not None:
        yield str(named)


def _auto_map(directory: Path, name: str) -> object:
    """What a JSON file says of code; nothing where there is no such file."""
    return read_json(directory, name).get("auto_map") if os.path.lexists(directory / name) else None


def in_megatrons_words(config: Mapping[str, Any], family: Family, directory: Path) -> MegatronConfig:
    """A config as its family's table puts it.

    Raises:
        UnsupportedModelError: A setting is not one that is converted, or Megatron has no such model.
        SourceError: A setting is missing, or of a type that it cannot have.
    """
    if family.megatron_config is None:
        raise UnsupportedModelError(
            "The family has no Megatron model.",
            [Offender(family.name, "has no megatron_config")],
            "Quantize a Hugging Face checkpoint of it: quantplug quantize.",
        )
    try:
        return family.megatron_config(config)
    except KeyError as error:
        raise config_error(directory, f"does not have {error}, which the {family.name} family needs") from error
    except UNUSABLE as error:
        raise config_error(directory, f"cannot be converted: {error!r}") from error


def config_error(directory: Path, reason: str) -> SourceError:
    return SourceError(
        "The config of the source checkpoint cannot be used.",
        [Offender(str(directory / CONFIG_FILE), reason)],
        "Pass a directory that save_pretrained wrote.",
    )
