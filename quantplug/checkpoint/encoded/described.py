"""What the configs of a quantized checkpoint say of how its weights are stored, whichever tool wrote them.

Sources: `QuantizationConfig` and `QuantizationArgs` of compressed-tensors 0.20 (llm-compressor writes them), ModelOpt
0.47's export/convert_hf_config.py, DeepSeek-V3's config.json, and transformers 5.23 (`FineGrainedFP8Config`). What
weights a config names is not asked: of a tensor its type says whether it holds codes.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from quantplug.checkpoint.side_files import QUANT_CONFIG_FILE
from quantplug.checkpoint.untrusted.files import read_json
from quantplug.checkpoint.untrusted.json_reader import Json, as_count, as_object, as_text, as_texts

BlockSize = tuple[int, int]

_PLAIN_LISTS = ("ignore", "exclude_modules", "modules_to_not_convert", "ignored_layers")
# `weight_scale` beside `weight`; DeepSeek's name says the inverse, and it multiplies all the same.
_SCALE, _DEEPSEEK_SCALE = "_scale", "_scale_inv"


class Sharing(Enum):
    """Which values of a weight share a scale."""

    TENSOR = "tensor"
    ROWS = "channel"
    BLOCKS = "block"


@dataclass(frozen=True)
class FP8Storage:
    """E4M3 codes times scales.

    Attributes:
        scales: What follows the name of a weight in that of its scales.
        sharing: What scales may be of; which of it is told by their shapes.
        block: Rows and columns that share a scale, where blocks do.
        plain: Modules that the config names as not quantized, by exact name.
    """

    scales: str
    sharing: frozenset[Sharing]
    block: BlockSize | None = None
    plain: frozenset[str] = frozenset()


@dataclass(frozen=True)
class MXFP4Storage:
    """`_blocks` and `_scales` of experts, as GPT-OSS is published."""


@dataclass(frozen=True)
class SourceQuantization:
    """How a checkpoint is quantized.

    Attributes:
        name: Of tool and format, for messages.
        storage: How its weights are read; None where they are not.
    """

    name: str
    storage: FP8Storage | MXFP4Storage | None


def read_quantization(directory: Path, config: Mapping[str, Any]) -> SourceQuantization | None:
    """What is said of the quantization of a checkpoint; None where nothing is.

    Args:
        config: Its config.json. Where that says nothing hf_quant_config.json is asked, as servers do.

    Raises:
        SourceError: hf_quant_config.json cannot be read.
    """
    said = _unnested(as_object(config.get("quantization_config")))
    if not said and os.path.lexists(directory / QUANT_CONFIG_FILE):
        said = _unnested(read_json(directory, QUANT_CONFIG_FILE))
    if not said:  # `{}` says of no weight that it is quantized.
        return None
    method = as_text(said.get("quant_method"))
    if method == "mxfp4":
        return SourceQuantization("mxfp4", MXFP4Storage())
    if method == "fp8":
        return _fp8(said)
    if method == "compressed-tensors":
        return _compressed_tensors(said)
    # ModelOpt's own config file has no quant_method.
    if method == "modelopt" or (not method and said.get("quant_algo")):
        return _modelopt(said)
    return SourceQuantization(method or "one without a quant_method", None)


def _unnested(said: Json) -> Json:
    """The form of hf_quant_config.json, which old ModelOpt wrote into config.json too, without its outer object."""
    return as_object(said.get("quantization")) or said


def _plain(said: Json) -> frozenset[str]:
    """Patterns are left out: they match no exact name, and an expression of a stranger may run for ever."""
    return frozenset(name for key in _PLAIN_LISTS for name in as_texts(said.get(key)))


def _fp8(said: Json) -> SourceQuantization:
    block, name = said.get("weight_block_size"), f"fp8 {as_text(said.get('fmt')) or 'e4m3'}"
    if as_text(said.get("fmt")) not in ("", "e4m3", "float8_e4m3fn"):
        return SourceQuantization(name, None)
    if block is None:
        # As AutoFP8 wrote it, and vLLM reads `fp8` without blocks.
        return SourceQuantization(name, FP8Storage(_SCALE, frozenset({Sharing.TENSOR}), None, _plain(said)))
    size = _block_size(block)
    if size is None:
        return SourceQuantization(f"{name} with weight_block_size {block!r}"[:200], None)
    return SourceQuantization(name, FP8Storage(_DEEPSEEK_SCALE, frozenset({Sharing.BLOCKS}), size, _plain(said)))


def _block_size(said: object) -> BlockSize | None:
    """Two sizes above zero: a config is anybody's file, and a block of zero rows would divide by zero later on."""
    if not isinstance(said, list) or len(said) != 2:
        return None
    rows, columns = map(as_count, said)
    return (rows, columns) if rows and columns else None


_MODELOPT_FP8 = {"FP8": Sharing.TENSOR, "FP8_PER_CHANNEL_PER_TOKEN": Sharing.ROWS}


def _modelopt(said: Json) -> SourceQuantization:
    algorithm = as_text(said.get("quant_algo"))
    layers = as_object(said.get("quantized_layers")) if algorithm == "MIXED_PRECISION" else {}
    algorithms = {as_text(as_object(layer).get("quant_algo")) for layer in layers.values()} or {algorithm}
    name = f"ModelOpt {algorithm or 'without a quant_algo'}"
    if layers:
        name += f" of {', '.join(sorted(algorithms))}"
    if not algorithms <= _MODELOPT_FP8.keys():
        return SourceQuantization(name[:200], None)
    sharing = frozenset(_MODELOPT_FP8[each] for each in algorithms)
    return SourceQuantization(name, FP8Storage(_SCALE, sharing, None, _plain(said)))


def _compressed_tensors(said: Json) -> SourceQuantization:
    default = as_text(said.get("format"))
    groups = [as_object(group) for group in as_object(said.get("config_groups")).values()]
    words = dict.fromkeys(_group_words(group, default) for group in groups)
    # Rotated weights, and those without their zeros, are not the model's as they stand.
    sparsity = as_text(as_object(said.get("sparsity_config")).get("format"))
    changed = [f"sparse by {sparsity}"] if sparsity not in ("", "dense") else []
    changed += ["with transforms"] if as_object(as_object(said.get("transform_config")).get("config_groups")) else []
    name = " ".join(["compressed-tensors", "; ".join(words) or default or "without a format", *changed])[:300]
    sharing, blocks = set(), set()
    for group in groups:
        weights = as_object(group.get("weights"))
        strategy = next((one for one in Sharing if one.value == weights.get("strategy")), None)
        block = _block_size(weights.get("block_structure")) if strategy is Sharing.BLOCKS else None
        if strategy is None or not _is_fp8(group, default) or (strategy is Sharing.BLOCKS and block is None):
            return SourceQuantization(name, None)
        sharing.add(strategy)
        blocks.update({block} - {None})
    if not groups or changed or len(blocks) > 1:
        return SourceQuantization(name, None)
    size = next(iter(blocks), None)
    return SourceQuantization(name, FP8Storage(_SCALE, frozenset(sharing), size, _plain(said)))


def _is_fp8(group: Json, default: str) -> bool:
    weights, stored = as_object(group.get("weights")), as_text(group.get("format")) or default
    numbers = as_text(weights.get("type")), as_count(weights.get("num_bits")), weights.get("symmetric", True)
    return stored in ("float-quantized", "naive-quantized") and numbers == ("float", 8, True)


def _group_words(group: Json, default: str) -> str:
    weights = as_object(group.get("weights"))
    kind = f"{weights.get('num_bits')}-bit {weights.get('type')}, {weights.get('strategy')}"
    return f"{as_text(group.get('format')) or default or 'without a format'} ({kind})"
