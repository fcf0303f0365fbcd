"""Quantization for Transformer Engine modules: Megatron-Core model to proved, quantized Hugging Face checkpoint.

Importing this package needs torch and safetensors alone. The names below are looked up when they are first used, and
only then does one that works on a live model import Megatron-Core.

With a model: `initialize_parallel`, `build_model`, `quant_cfg`, `recipe_cfg`, `calibrate`, `plan_export`,
`save_checkpoint` and `load_checkpoint`, `import_mcore_gpt_from_hf`, `export_mcore_gpt_to_hf` and, for its judge,
`write_input_moments`, and for RL
`export_hf_weights_quant` or `plan_stream`, with `RefitSource` and `flattened_buckets` for servers. Without one:
`export_checkpoint`, `quantize_checkpoint` and `verify_checkpoint`. `QuantFormat` and `KVCacheFormat` have the names of
all formats, `DialectName` those of their spellings on disk, `WeightAmax` what becomes of weights that have grown since
calibration, `errors` all that is raised. `quantplug.calibration`, `quantplug.mappings.amax` and `quantplug.plugins` are
packages of more.
"""

from typing import TYPE_CHECKING

from quantplug import errors
from quantplug.errors import QuantplugError
from quantplug.lazy import attributes_from

__version__ = "0.2.0"

__all__ = [
    "DialectName",
    "KVCacheFormat",
    "LayerSpec",
    "Preset",
    "QuantFormat",
    "QuantplugError",
    "RefitSource",
    "WeightAmax",
    "__version__",
    "build_model",
    "calibrate",
    "check_destination",
    "destroy_parallel",
    "errors",
    "export_checkpoint",
    "export_hf_weights_quant",
    "export_mcore_gpt_to_hf",
    "flattened_buckets",
    "import_mcore_gpt_from_hf",
    "initialize_parallel",
    "load_checkpoint",
    "plan_export",
    "plan_stream",
    "quant_cfg",
    "quantize_checkpoint",
    "recipe_cfg",
    "register_family",
    "save_checkpoint",
    "verify_checkpoint",
    "write_input_moments",
]

_HOMES = {
    "DialectName": "quantplug.choices",
    "KVCacheFormat": "quantplug.choices",
    "LayerSpec": "quantplug.megatron.models.build",
    "Preset": "quantplug.choices",
    "QuantFormat": "quantplug.choices",
    "RefitSource": "quantplug.export.stream.refit",
    "WeightAmax": "quantplug.choices",
    "build_model": "quantplug.import_hf.new_model",
    "calibrate": "quantplug.calibration.run",
    "check_destination": "quantplug.export.files.staging",
    "destroy_parallel": "quantplug.megatron.parallel",
    "export_checkpoint": "quantplug.export.export_checkpoint",
    "export_hf_weights_quant": "quantplug.export.stream.api",
    "export_mcore_gpt_to_hf": "quantplug.export.to_disk",
    "flattened_buckets": "quantplug.export.stream.refit",
    "import_mcore_gpt_from_hf": "quantplug.import_hf.to_model",
    "initialize_parallel": "quantplug.megatron.parallel",
    "load_checkpoint": "quantplug.megatron.checkpoint.save_load",
    "plan_export": "quantplug.export.live_plan",
    "plan_stream": "quantplug.export.stream.api",
    "quant_cfg": "quantplug.plugins.configs",
    "quantize_checkpoint": "quantplug.export.quantize_checkpoint",
    "recipe_cfg": "quantplug.plugins.configs",
    "register_family": "quantplug.mappings.families",
    "save_checkpoint": "quantplug.megatron.checkpoint.save_load",
    "verify_checkpoint": "quantplug.verify",
    "write_input_moments": "quantplug.export.input_moments",
}

# Type checkers read the imports; at run time each name is looked up when it is first used.
if TYPE_CHECKING:
    from quantplug.calibration.run import calibrate
    from quantplug.choices import DialectName, KVCacheFormat, Preset, QuantFormat, WeightAmax
    from quantplug.export.export_checkpoint import export_checkpoint
    from quantplug.export.files.staging import check_destination
    from quantplug.export.input_moments import write_input_moments
    from quantplug.export.live_plan import plan_export
    from quantplug.export.quantize_checkpoint import quantize_checkpoint
    from quantplug.export.stream.api import export_hf_weights_quant, plan_stream
    from quantplug.export.stream.refit import RefitSource, flattened_buckets
    from quantplug.export.to_disk import export_mcore_gpt_to_hf
    from quantplug.import_hf.new_model import build_model
    from quantplug.import_hf.to_model import import_mcore_gpt_from_hf
    from quantplug.mappings.families import register_family
    from quantplug.megatron.checkpoint.save_load import load_checkpoint, save_checkpoint
    from quantplug.megatron.models.build import LayerSpec
    from quantplug.megatron.parallel import destroy_parallel, initialize_parallel
    from quantplug.plugins.configs import quant_cfg, recipe_cfg
    from quantplug.verify import verify_checkpoint
else:
    # In the branch that type checkers do not read, or they would take every misspelt name for one that exists.
    __getattr__ = attributes_from(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
