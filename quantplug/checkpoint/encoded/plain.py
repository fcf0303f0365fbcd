"""A checkpoint of plain weights, or of one of the encodings that are read as if they were.

MXFP4 experts (GPT-OSS) and FP8 in blocks (DeepSeek-V3, Qwen3) are decoded; any other quantization is refused.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from quantplug.checkpoint.config_file import CONFIG_FILE
from quantplug.checkpoint.encoded.fp8_source import METHOD as FP8
from quantplug.checkpoint.encoded.fp8_source import BlockSize, FP8Checkpoint
from quantplug.checkpoint.encoded.mxfp4_source import METHOD as MXFP4
from quantplug.checkpoint.encoded.mxfp4_source import MXFP4Checkpoint
from quantplug.checkpoint.reader import HFCheckpoint
from quantplug.checkpoint.stored_tensors import stored_tensors
from quantplug.errors import Offender, SourceError

_PLAIN = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
# ModelOpt's, compressed-tensors', GPTQ's and AWQ's, and DeepSeek's.
_BESIDE_QUANTIZED = ("_scale", "_scale_2", "_scale_inv", "scales", "_zero_point", "qzeros", "qweight", "g_idx")

Quantization = Mapping[str, Any] | None
"""`quantization_config` of config.json."""


def refuse_quantized(directory: Path, quantization: Quantization) -> None:
    """Refuses a checkpoint that no plain weights can be read from.

    Raises:
        SourceError: Its config speaks of a quantization that is not decoded.
    """
    method = _method(quantization)
    # FP8 without a block size has one scale for a tensor or a row, and often scales of activations: another encoding.
    if method in (None, MXFP4) or (method == FP8 and _block_size(quantization) is not None):
        return
    tensors = stored_tensors(directory)
    where = str(directory / CONFIG_FILE)
    if tensors and all(tensor.dtype in _PLAIN for tensor in tensors.values()) and not _has_scales(tensors):
        raise SourceError(
            "The config speaks of a quantization that the weights have not.",
            [Offender(where, f"has a quantization_config ({method}), and all tensors are plain, without scales")],
            "If the weights were dequantized, remove quantization_config from config.json.",
        )
    raise SourceError(
        "The source checkpoint is quantized already.",
        [Offender(where, f"has a quantization_config ({method})")],
        "Pass the checkpoint that it was quantized from.",
    )


def _has_scales(names: Iterable[str]) -> bool:
    """Whether some tensor is beside a quantized weight, by its name in any of the formats that there are."""
    return any(name.rpartition(".")[2].endswith(_BESIDE_QUANTIZED) for name in names)


def open_plain(directory: Path, quantization: Quantization) -> HFCheckpoint:
    """Opens a checkpoint that `refuse_quantized` does not refuse.

    Args:
        directory: Where its safetensors are.
        quantization: `quantization_config` of its config.json; None without one.

    Returns:
        The checkpoint with its tensors under their plain names, encoded ones as BF16. Close it, or use `with`.

    Raises:
        SourceError: Its safetensors are missing, incomplete or damaged.
    """
    method, block_size = _method(quantization), _block_size(quantization)
    if method == MXFP4:
        return MXFP4Checkpoint(directory)
    return HFCheckpoint(directory) if block_size is None else FP8Checkpoint(directory, block_size)


def _method(quantization: Quantization) -> str | None:
    if not quantization:  # `{}` says of no weight that it is quantized.
        return None
    # transformers' name of it, or ModelOpt's, whose own config file has no quant_method.
    return str(quantization.get("quant_method") or quantization.get("quant_algo"))


def _block_size(quantization: Quantization) -> BlockSize | None:
    """Rows and columns of a block, where the weights are FP8 in blocks; None for anything else."""
    said = (quantization or {}).get("weight_block_size")
    if _method(quantization) != FP8 or not isinstance(said, list) or len(said) != 2:
        return None
    # A config is anybody's file: a block of zero rows would divide by zero later on.
    rows, columns = said
    return (rows, columns) if all(isinstance(size, int) and size > 0 for size in said) else None
