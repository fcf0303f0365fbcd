"""How each scheme is spelled on disk: tensor names, scale shapes and the config that announces them.

Sources: ModelOpt's unified Hugging Face checkpoint (`hf_quant_config.json`), DeepSeek-V3's `config.json` for FP8 in
blocks, and compressed-tensors' `QuantizationConfig` for FP8 weights with 16-bit activations, which ModelOpt's own
schema cannot say (its `FP8` always means quantized activations), and for FP8 with a scale a row, which it can say, but
of which no server loads experts in its form (vLLM 0.33's `ModelOptFp8MoEMethod` knows scales of whole tensors alone).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from quantplug import __version__
from quantplug.export.plan.types import QuantConfig
from quantplug.formats import TensorSpec
from quantplug.formats.names import KVCacheFormat, QuantFormat, Scheme


def stored_name(weight: str, tensor: str) -> str:
    """Name on disk of a tensor of a weight.

    A module's `weight` has its scales beside it (`q_proj.weight_scale`). Experts in one tensor, which is a parameter by
    another name, have it in theirs (`experts.gate_up_proj_weight_scale`), as ModelOpt writes them for GPT-OSS.
    """
    module, dot, last = weight.rpartition(".")
    if last == "weight":
        return f"{module}{dot}{tensor}"
    return weight if tensor == "weight" else f"{weight}_{tensor}"


# Servers look for this producer name; the version is ours.
PRODUCER = {"name": "modelopt", "version": f"quantplug-{__version__}"}


@dataclass(frozen=True)
class ModelOptDialect:
    """ModelOpt's schema: both config files, `weight_scale` and `weight_scale_2`, 0-d FP32 scalars.

    Attributes:
        fused_is_read: Whether servers read all experts in one tensor, of any architecture, in this dialect.
        reads_globs: Whether its list of plain modules may hold shell patterns.
        names_kv_cache: Whether its config has a place for the format of a KV cache.
        algorithm: `quant_algo`, in the upper case that servers spell it in.
        weights: Arguments of weight quantization in `config_groups`.
        activations: Those of input quantization; None for formats that quantize weights alone.
        group_size: Input features that share a block scale; None without blocks.
    """

    fused_is_read: ClassVar[bool] = True
    reads_globs: ClassVar[bool] = True
    names_kv_cache: ClassVar[bool] = True
    algorithm: str
    weights: Mapping[str, Any]
    activations: Mapping[str, Any] | None
    group_size: int | None = None

    def spec(self, weight: str, tensor: TensorSpec) -> TensorSpec:
        return replace(tensor, name=stored_name(weight, tensor.name))

    def config(self, exclude_modules: Sequence[str], kv_cache: KVCacheFormat | None) -> QuantConfig:
        group = {"weights": dict(self.weights), "targets": ["Linear"]}
        if self.activations is not None:
            group["input_activations"] = dict(self.activations)
        config_json = {
            "quant_method": "modelopt",
            "quant_algo": self.algorithm,
            "config_groups": {"group_0": group},
            # The same list as exclude_modules of the other file: a module that only one of them spares would be read in
            # two ways.
            "ignore": list(exclude_modules),
            "producer": PRODUCER,
        }
        if kv_cache is not None:
            # As ModelOpt's own converter writes it (export/convert_hf_config.py). Without `k_scale` and `v_scale`
            # beside the weights vLLM and SGLang take a scale of 1.0, which is what a cast means.
            config_json["kv_cache_scheme"] = dict(_FP8_ARGUMENTS)
        # TensorRT-LLM reads this file and vLLM and SGLang config.json, so that both must say the same. vLLM's reader of
        # it wants kv_cache_quant_algo there, null too (modelopt.py).
        quantization: dict[str, Any] = {
            "quant_algo": self.algorithm,
            "kv_cache_quant_algo": kv_cache and _KV_ALGORITHMS[kv_cache],
        }
        if self.group_size is not None:
            quantization["group_size"] = self.group_size
        quantization["exclude_modules"] = list(exclude_modules)
        return QuantConfig(self.algorithm, config_json, {"producer": PRODUCER, "quantization": quantization})


@dataclass(frozen=True)
class DeepSeekDialect:
    """DeepSeek-V3's FP8 in 128x128 blocks: `weight_scale_inv`, which despite its name multiplies.

    Experts in one tensor have `gate_up_proj_scale_inv`, as transformers and servers read it.
    """

    fused_is_read: ClassVar[bool] = False
    reads_globs: ClassVar[bool] = False
    names_kv_cache: ClassVar[bool] = False  # vLLM's and SGLang's `fp8` configs have no such key.
    algorithm: str = "FP8 128x128"

    def spec(self, weight: str, tensor: TensorSpec) -> TensorSpec:
        # The suffix goes behind the whole name: `q_proj.weight_scale_inv`, and `experts.gate_up_proj_scale_inv`.
        name = weight if tensor.name == "weight" else f"{weight}_scale_inv"
        return replace(tensor, name=name)

    def config(self, exclude_modules: Sequence[str], kv_cache: KVCacheFormat | None) -> QuantConfig:
        assert kv_cache is None, "the plan refuses what this dialect cannot name"
        config_json = {
            "quant_method": "fp8",
            # vLLM asks for this key (quantization/fp8.py).
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": list(exclude_modules),
        }
        return QuantConfig(self.algorithm, config_json)


@dataclass(frozen=True)
class CompressedTensorsDialect:
    """compressed-tensors' FP8: scales of shape [1], or [out, 1] for those of rows.

    Attributes:
        algorithm: For tables and messages; the schema has no such name.
        format: How weights are stored (`CompressionFormat`).
        weights: Arguments of weight quantization, without what all formats of this dialect have.
        activations: Those of input quantization; None for formats that quantize weights alone.
    """

    # llm-compressor writes experts one by one, whatever the architecture, and servers load them so.
    fused_is_read: ClassVar[bool] = False
    reads_globs: ClassVar[bool] = False
    names_kv_cache: ClassVar[bool] = False
    algorithm: str
    format: str
    weights: Mapping[str, Any]
    activations: Mapping[str, Any] | None

    def spec(self, weight: str, tensor: TensorSpec) -> TensorSpec:
        # compressed-tensors has scales of a whole tensor in one dimension, ModelOpt in none.
        return replace(tensor, name=stored_name(weight, tensor.name), shape=tensor.shape or (1,))

    def config(self, exclude_modules: Sequence[str], kv_cache: KVCacheFormat | None) -> QuantConfig:
        assert kv_cache is None, "the plan refuses what this dialect cannot name"
        scheme = {
            "targets": ["Linear"],
            "weights": {**_COMPRESSED_FP8, **self.weights},
            "input_activations": None if self.activations is None else {**_COMPRESSED_FP8, **self.activations},
            "output_activations": None,
        }
        config_json = {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": _with_first_experts(exclude_modules),
            "kv_cache_scheme": None,
        }
        return QuantConfig(self.algorithm, config_json)


def _with_first_experts(exclude_modules: Sequence[str]) -> list[str]:
    """The modules, and for each module of all experts the names by which vLLM asks whether they are plain.

    It asks for three linears of the first expert, by these names in every architecture, and by exact comparison
    (`CompressedTensorsMoEMethod.get_moe_method` in compressed_tensors_moe.py); the checkpoint may call them otherwise,
    or hold all experts in one tensor.
    """
    experts = [name for name in exclude_modules if name.rpartition(".")[2] == "experts"]
    asked = {f"{name}.0.{linear}" for name in experts for linear in ("gate_proj", "up_proj", "down_proj")}
    return [*exclude_modules, *sorted(asked.difference(exclude_modules))]


Dialect = ModelOptDialect | DeepSeekDialect | CompressedTensorsDialect

_NVFP4_ARGUMENTS = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
_FP8_ARGUMENTS = {"dynamic": False, "num_bits": 8, "type": "float"}
_COMPRESSED_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
_OF_TENSOR = {"strategy": "tensor", "dynamic": False}
_OF_ROWS = {"strategy": "channel", "dynamic": False}
_OF_TOKENS = {"strategy": "token", "dynamic": True}
_KV_ALGORITHMS: Mapping[KVCacheFormat, str] = {KVCacheFormat.FP8_CAST: "FP8", KVCacheFormat.FP8: "FP8"}

_DIALECTS: Mapping[QuantFormat, Dialect] = {
    QuantFormat.W4A16_NVFP4: ModelOptDialect("W4A16_NVFP4", _NVFP4_ARGUMENTS, None, 16),
    QuantFormat.NVFP4: ModelOptDialect("NVFP4", _NVFP4_ARGUMENTS, _NVFP4_ARGUMENTS, 16),
    QuantFormat.FP8: ModelOptDialect("FP8", _FP8_ARGUMENTS, _FP8_ARGUMENTS),
    QuantFormat.W8A16_FP8: CompressedTensorsDialect("W8A16 FP8", "naive-quantized", _OF_TENSOR, None),
    QuantFormat.FP8_BLOCKWISE: DeepSeekDialect(),
    # What llm-compressor writes by its scheme FP8_DYNAMIC.
    QuantFormat.FP8_DYNAMIC: CompressedTensorsDialect("FP8 dynamic", "float-quantized", _OF_ROWS, _OF_TOKENS),
}


def dialect_for(scheme: Scheme) -> Dialect:
    """The spelling of a scheme that vLLM, SGLang and TensorRT-LLM read."""
    return _DIALECTS[scheme.format]


INPUT_SCALE = TensorSpec("input_scale", (), torch.float32)
"""The scale of a linear's input, amax / (largest value of the format), which is the last tensor of a quantized part."""
