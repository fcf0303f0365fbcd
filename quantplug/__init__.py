"""Quantization for Transformer Engine modules: Megatron-Core model to proved, quantized Hugging Face checkpoint.

Importing this package needs torch and safetensors alone. The functions below are looked up when they are first used
(PEP 562), and only then does one that converts a live model import Megatron-Core.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quantplug.errors import QuantplugError

if TYPE_CHECKING:
    from quantplug.export.stream.api import export_hf_weights_quant
    from quantplug.export.to_disk import export_mcore_gpt_to_hf
    from quantplug.import_hf.to_model import import_mcore_gpt_from_hf
    from quantplug.mappings.families import register_family
    from quantplug.verify import verify_checkpoint

__version__ = "0.1.0"

__all__ = [
    "QuantplugError",
    "__version__",
    "export_hf_weights_quant",
    "export_mcore_gpt_to_hf",
    "import_mcore_gpt_from_hf",
    "register_family",
    "verify_checkpoint",
]

_HOMES = {
    "export_hf_weights_quant": "quantplug.export.stream.api",
    "export_mcore_gpt_to_hf": "quantplug.export.to_disk",
    "import_mcore_gpt_from_hf": "quantplug.import_hf.to_model",
    "register_family": "quantplug.mappings.families",
    "verify_checkpoint": "quantplug.verify",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
