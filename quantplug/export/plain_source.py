"""A checkpoint of plain weights: one that is quantized already is refused, but MXFP4, which is read as if it were."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantplug.errors import Offender, SourceError
from quantplug.export import mxfp4_source
from quantplug.export.config_file import CONFIG_FILE
from quantplug.export.hf_source import HFCheckpoint

Quantization = Mapping[str, Any] | None
"""`quantization_config` of config.json."""


def refuse_quantized(directory: Path, quantization: Quantization) -> None:
    """Refuses a checkpoint that no plain weights can be read from.

    Raises:
        SourceError: Its config speaks of a quantization that is not decoded.
    """
    method = _method(quantization)
    if method not in (None, mxfp4_source.METHOD):
        raise SourceError(
            "The source checkpoint is quantized already.",
            [Offender(str(directory / CONFIG_FILE), f"has a quantization_config ({method})")],
            "Pass the checkpoint that it was quantized from.",
        )


def open_plain(directory: Path, quantization: Quantization) -> HFCheckpoint:
    """Opens one that is not refused.

    Raises:
        SourceError: Its safetensors are missing, incomplete or damaged.
    """
    is_mxfp4 = _method(quantization) == mxfp4_source.METHOD
    return mxfp4_source.MXFP4Checkpoint(directory) if is_mxfp4 else HFCheckpoint(directory)


def _method(quantization: Quantization) -> str | None:
    if quantization is None:
        return None
    return str(quantization.get("quant_method") or quantization.get("quant_algo"))
