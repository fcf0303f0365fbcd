"""The files beside the weights: config.json and hf_quant_config.json from the plan, the rest as the source has them."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from quantplug.atomic import finish_file, sync_directory
from quantplug.export.files.index import write_json
from quantplug.export.plan.types import QuantConfig

CONFIG_NAME = "config.json"
QUANT_CONFIG_NAME = "hf_quant_config.json"

# Weights in any of their forms, what announces them, and what we write ourselves.
_NOT_COPIED_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}
_NOT_COPIED_NAMES = {CONFIG_NAME, QUANT_CONFIG_NAME}
# The one directory that belongs to a tokenizer (transformers.utils.CHAT_TEMPLATE_DIR).
_TEMPLATES = "additional_chat_templates"
# Where a vision-language model has the settings of its language model.
_TEXT_CONFIG = "text_config"
_TIED = "tie_word_embeddings"
# What transformers and compressed-tensors read a quantization from.
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def write_configs(source: Path, destination: Path, dtype: torch.dtype | None, quant_config: QuantConfig | None) -> None:
    """Writes hf_quant_config.json, and config.json as the source has it but for the type and the quantization.

    Without a `dtype` the config keeps its own. What the source says of an earlier quantization is left out: it does not
    hold for what is written. What it says of a language model alone agrees with what it says of the whole.
    """
    config: dict[str, Any] = json.loads((source / CONFIG_NAME).read_text(encoding="utf-8"))
    text = config.get(_TEXT_CONFIG)
    if isinstance(text, dict):
        config[_TEXT_CONFIG] = _agreeing(text, config, dtype)
    if dtype is not None:
        config |= dict.fromkeys(_spellings(config) or {"dtype"}, _spelled(dtype))
    for key in _QUANTIZATION_KEYS:
        config.pop(key, None)
    if quant_config is not None:
        config["quantization_config"] = dict(quant_config.config_json)
        if quant_config.hf_quant_config is not None:
            write_json(destination / QUANT_CONFIG_NAME, quant_config.hf_quant_config)
    write_json(destination / CONFIG_NAME, config)


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


def copy_side_files(source: Path, destination: Path) -> None:
    """Copies tokenizer, generation settings, templates and model code: every top-level file that is not weights."""
    for path in sorted([*source.iterdir(), *(source / _TEMPLATES).glob("*")]):
        if path.is_file() and not _is_left_out(path):
            copy = destination / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
            finish_file(copy)
            sync_directory(copy.parent)


def _is_left_out(path: Path) -> bool:
    return path.suffix in _NOT_COPIED_SUFFIXES or path.name in _NOT_COPIED_NAMES or path.name.endswith(".index.json")
