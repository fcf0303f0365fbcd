"""A checkpoint of plain weights, or of one of the encodings that are read as if they were.

MXFP4 experts (GPT-OSS) and FP8 (DeepSeek-V3, Qwen3, and what ModelOpt, llm-compressor and compressed-tensors write) are
decoded; any other quantization is refused.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from quantplug.checkpoint.config.file import CONFIG_FILE, saved_dtype
from quantplug.checkpoint.encoded.described import FP8Storage, MXFP4Storage, read_quantization
from quantplug.checkpoint.encoded.fp8_source import FP8Checkpoint
from quantplug.checkpoint.encoded.mxfp4_source import MXFP4Checkpoint
from quantplug.checkpoint.reader import HFCheckpoint
from quantplug.checkpoint.stored_tensors import stored_tensors
from quantplug.errors import Offender, SourceError

_PLAIN = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
# ModelOpt's, compressed-tensors', GPTQ's and AWQ's, and DeepSeek's.
_BESIDE_QUANTIZED = ("_scale", "_scale_2", "_scale_inv", "scales", "_zero_point", "qzeros", "qweight", "g_idx")

Config = Mapping[str, Any]
"""config.json as it stands in the file."""


def refuse_quantized(directory: Path, config: Config) -> None:
    """Refuses a checkpoint that no plain weights can be read from.

    Raises:
        SourceError: Its configs speak of a quantization that is not decoded, or that the weights have not.
    """
    said = read_quantization(directory, config)
    if said is None:
        return
    tensors, where = stored_tensors(directory), str(directory / CONFIG_FILE)
    if tensors and all(tensor.dtype in _PLAIN for tensor in tensors.values()) and not _has_scales(tensors):
        raise SourceError(
            "The config speaks of a quantization that the weights have not.",
            [Offender(where, f"has a quantization_config ({said.name}), and all tensors are plain, without scales")],
            "If the weights were dequantized, remove quantization_config from config.json (and hf_quant_config.json).",
        )
    if said.storage is None:
        raise SourceError(
            "The source checkpoint is quantized already.",
            [Offender(where, f"is {said.name}, which is not read")],
            "Pass the checkpoint that it was quantized from. Of quantized ones FP8 is read, with a scale a tensor, a "
            "row or a block, as compressed-tensors, ModelOpt and DeepSeek store it; and GPT-OSS's MXFP4.",
        )


def _has_scales(names: Iterable[str]) -> bool:
    """Whether some tensor is beside a quantized weight, by its name in any of the formats that there are."""
    return any(name.rpartition(".")[2].endswith(_BESIDE_QUANTIZED) for name in names)


def open_plain(directory: Path, config: Config) -> HFCheckpoint:
    """Opens a checkpoint that `refuse_quantized` does not refuse.

    Args:
        directory: Where its safetensors are.

    Returns:
        The checkpoint with its tensors under their plain names, encoded ones in the type that the config names (MXFP4
        as BF16, which holds all of its values). Close it, or use `with`.

    Raises:
        SourceError: Its safetensors are missing, incomplete or damaged.
    """
    said = read_quantization(directory, config)
    match said and said.storage:
        case MXFP4Storage():
            return MXFP4Checkpoint(directory)
        case FP8Storage() as storage:
            return FP8Checkpoint(directory, storage, saved_dtype(config))
    return HFCheckpoint(directory)
