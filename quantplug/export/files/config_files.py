"""The files beside the weights: config.json and hf_quant_config.json from the plan, the rest as the source has them."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from quantplug.atomic import finish_file, sync_directory
from quantplug.checkpoint.config.file import CONFIG_FILE
from quantplug.checkpoint.side_files import QUANT_CONFIG_FILE
from quantplug.checkpoint.untrusted.files import open_file
from quantplug.export.files.index import write_json
from quantplug.export.plan.types import QuantConfig

# Where a vision-language model has the settings of its language model.
_TEXT_CONFIG = "text_config"
_TIED = "tie_word_embeddings"
# What transformers and compressed-tensors read a quantization from.
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def write_configs(
    source: Mapping[str, Any], destination: Path, dtype: torch.dtype | None, quant_config: QuantConfig | None
) -> None:
    """Writes what `configs_of` gives."""
    for name, content in configs_of(source, dtype, quant_config).items():
        write_json(destination / name, content)


def configs_of(
    source: Mapping[str, Any], dtype: torch.dtype | None, quant_config: QuantConfig | None
) -> dict[str, Mapping[str, Any]]:
    """hf_quant_config.json, and config.json as the source has it but for the type and the quantization, by name.

    Without a `dtype` the config keeps its own. What the source says of an earlier quantization is left out: it does not
    hold for what is written. What it says of a language model alone agrees with what it says of the whole.

    Args:
        source: The source's config.json as it was read for the plan: the file may say something else by now.
    """
    # A copy, as the caller's config is that of the plan; nested dicts are replaced, not changed.
    config = dict(source)
    text = config.get(_TEXT_CONFIG)
    if isinstance(text, dict):
        if _TIED in text:
            config.setdefault(_TIED, text[_TIED])
        config[_TEXT_CONFIG] = _agreeing(text, config, dtype)
    if dtype is not None:
        # A config that names no type would leave readers to guess it.
        config |= dict.fromkeys(_spellings(config) or {"dtype"}, _spelled(dtype))
    for key in _QUANTIZATION_KEYS:
        config.pop(key, None)
    if quant_config is None:
        return {CONFIG_FILE: config}
    config["quantization_config"] = dict(quant_config.config_json)
    if quant_config.hf_quant_config is None:
        return {CONFIG_FILE: config}
    return {QUANT_CONFIG_FILE: quant_config.hf_quant_config, CONFIG_FILE: config}


def _agreeing(text: dict[str, Any], config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """The settings of a language model inside another, as the whole has them: servers read either.

    transformers 5 reads whether embeddings are tied at the top, and saves its default for the language model.
    """
    agreeing = {name: value for name, value in text.items() if name not in _QUANTIZATION_KEYS}
    if _TIED in text and _TIED in config:
        agreeing[_TIED] = config[_TIED]
    if dtype is not None:
        agreeing |= dict.fromkeys(_spellings(text), _spelled(dtype))
    return agreeing


def _spellings(config: dict[str, Any]) -> set[str]:
    """Transformers 5 writes `dtype`, earlier ones `torch_dtype`; servers read either, so both must agree."""
    return {name for name in ("dtype", "torch_dtype") if name in config}


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def copy_side_files(source: Path, destination: Path, names: Iterable[str]) -> None:
    """Copies files of the source as they are.

    Raises:
        SourceError: One has become unreadable since it was chosen.
    """
    for name in names:
        copy = destination / name
        copy.parent.mkdir(exist_ok=True)
        # Never a pipe or a device, nor what a link leads to outside the source: the file may be another one than when
        # it was chosen.
        with open_file(source, name) as original, copy.open("wb") as file:
            shutil.copyfileobj(original, file)
        # Names and data are both on disk before the directory is published: the rename must not outlive its content.
        finish_file(copy)
        sync_directory(copy.parent)
