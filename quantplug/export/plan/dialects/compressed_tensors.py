"""compressed-tensors' `QuantizationConfig`, as llm-compressor writes it.

INT4 has no other form that servers read, and NVFP4 is read in this one too (vLLM 0.33's `CompressedTensorsW4A16Fp4`,
`CompressedTensorsW4A4Nvfp4MoEMethod` and `CompressedTensorsWNA16MarlinMoEMethod`). It says FP8 weights with 16-bit
activations, which ModelOpt's own schema cannot (its `FP8` always means quantized activations), and FP8 with a scale a
row, which that can, but of which no server loads experts in its form (vLLM 0.33's `ModelOptFp8MoEMethod` knows scales
of whole tensors alone).
"""

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from quantplug.choices import DialectName
from quantplug.export.plan.dialects.dialect import Dialect, Spelled, modules_by_scheme, stored_name
from quantplug.export.plan.types import Constant, QuantConfig
from quantplug.formats import FP8, TensorSpec
from quantplug.formats.names import KV_CACHES, KVCacheFormat, QuantFormat, Scheme


@dataclass(frozen=True)
class _Spelling:
    """How the schema says a format.

    Attributes:
        algorithm: For tables and messages; the schema has no such name.
        format: How weights are stored (`CompressionFormat`).
        weights: Arguments of weight quantization, without the size of groups.
        activations: Those of input quantization; None for formats that quantize weights alone.
        names: What it calls tensors, of those that it calls otherwise than ModelOpt.
    """

    algorithm: str
    format: str
    weights: Mapping[str, Any]
    activations: Mapping[str, Any] | None
    names: Mapping[str, str] = field(default_factory=dict)

    def group(self, scheme: Scheme, targets: Sequence[str]) -> dict[str, Any]:
        """An entry of `config_groups`."""
        group_size = {"group_size": scheme.group_size}
        return {
            "targets": list(targets),
            # vLLM asks the group for it before all of the config (`get_scheme_dict` in compressed_tensors.py).
            "format": self.format,
            "weights": {**group_size, **self.weights},
            "input_activations": None if self.activations is None else {**group_size, **self.activations},
            "output_activations": None,
        }


_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
_OF_TENSOR = {**_FP8, "strategy": "tensor", "dynamic": False}
_OF_ROWS = {**_FP8, "strategy": "channel", "dynamic": False}
_OF_TOKENS = {**_FP8, "strategy": "token", "dynamic": True}
_NVFP4 = {
    "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "dynamic": False,
    "scale_dtype": "torch.float8_e4m3fn",
}  # fmt: skip
# Scales of blocks are made by the server, from what it sees and the one scale that was calibrated.
_OF_NVFP4_INPUTS = {**_NVFP4, "dynamic": "local", "observer": "static_minmax"}
_NVFP4_NAMES = {
    "weight": "weight_packed", "weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale",
}  # fmt: skip
_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "dynamic": False}
_KV_CACHE = {**_OF_TENSOR, "group_size": None}
# These divide where ModelOpt's scales multiply: 2688 / amax in place of amax / 2688.
_DIVISORS = frozenset({"weight_global_scale", "input_global_scale"})
_CODES_IN_AN_INTEGER = 8
_OF_BLOCKS = {**_FP8, "strategy": "block", "block_structure": [128, 128], "dynamic": False}
_OF_TOKEN_GROUPS = {**_FP8, "strategy": "group", "group_size": 128, "dynamic": True}
_SPELLINGS: Mapping[QuantFormat, _Spelling] = {
    # What llm-compressor writes by its scheme FP8.
    QuantFormat.FP8: _Spelling("FP8", "float-quantized", _OF_TENSOR, _OF_TENSOR),
    QuantFormat.W8A16_FP8: _Spelling("W8A16 FP8", "naive-quantized", _OF_TENSOR, None),
    # What llm-compressor writes by its scheme FP8_DYNAMIC.
    QuantFormat.FP8_DYNAMIC: _Spelling("FP8 dynamic", "float-quantized", _OF_ROWS, _OF_TOKENS),
    # By its schemes NVFP4A16, NVFP4 and W4A16.
    QuantFormat.W4A16_NVFP4: _Spelling("NVFP4A16", "nvfp4-pack-quantized", _NVFP4, None, _NVFP4_NAMES),
    QuantFormat.NVFP4: _Spelling("NVFP4", "nvfp4-pack-quantized", _NVFP4, _OF_NVFP4_INPUTS, _NVFP4_NAMES),
    QuantFormat.INT4: _Spelling("W4A16", "pack-quantized", _INT4, None, {"weight": "weight_packed"}),
    # And by FP8_BLOCK.
    QuantFormat.FP8_BLOCKWISE: _Spelling("FP8 128x128", "float-quantized", _OF_BLOCKS, _OF_TOKEN_GROUPS),
}


_OUTPUT_LAYER = re.compile(r"(.*\.)?lm_head")
_FIRST_EXPERT = re.compile(r"(.*\bexperts)(\.0\.\w+)?")


@dataclass(frozen=True)
class CompressedTensorsDialect(Dialect):
    """compressed-tensors' schema: config.json alone, and scales of a whole tensor of shape [1].

    Codes of INT4 are stored eight to an integer of 32 bits, the first in the lowest four, beside the shape of the
    weight (`pack_to_int32` in compressed_tensors/compressors/pack_quantized/helpers.py): with two to a byte, the even
    column in the low nibble, these are the same bytes. A KV cache has its scales beside attention's projections.
    """

    name: ClassVar[DialectName] = DialectName.COMPRESSED_TENSORS
    # llm-compressor writes experts one by one, whatever the architecture, and servers load them so.
    fused_is_read: ClassVar[Set[QuantFormat]] = frozenset()
    reads_globs: ClassVar[bool] = False
    # vLLM and SGLang take 1 where there are none; transformers 5.14 quantizes by memory that nobody has filled.
    scales_of_cast: ClassVar[bool] = True

    @property
    def formats(self) -> Set[QuantFormat]:
        return _SPELLINGS.keys()

    def mix_problem(self, formats: Set[QuantFormat]) -> str | None:
        return None

    def cache_problem(self, kv_cache: KVCacheFormat, formats: Set[QuantFormat]) -> str | None:
        # `CompressedTensorsKVCacheMethod.validate_kv_cache_scheme` of vLLM takes 8-bit floats alone.
        return None if KV_CACHES[kv_cache].values is FP8 else "compressed-tensors has a KV cache in FP8 alone"

    def stored(self, scheme: Scheme, weight: str, tensor: TensorSpec) -> Spelled:
        name = _SPELLINGS[scheme.format].names.get(tensor.name, tensor.name)
        spec = replace(tensor, name=stored_name(weight, name), shape=tensor.shape or (1,))
        if scheme.format is QuantFormat.INT4 and tensor.dtype is torch.uint8:
            *rows, pairs = tensor.shape
            spec = replace(spec, shape=(*rows, pairs * 2 // _CODES_IN_AN_INTEGER), dtype=torch.int32)
        return Spelled(spec, reciprocal=name in _DIVISORS)

    def constants(self, scheme: Scheme, weight: str, shape: tuple[int, ...]) -> tuple[Constant, ...]:
        if scheme.format is not QuantFormat.INT4:
            return ()
        return (Constant(TensorSpec(stored_name(weight, "weight_shape"), (2,), torch.int64), shape),)

    def cache_scale(self, projection: str, scale: str) -> TensorSpec:
        return TensorSpec(f"{projection.rpartition('.')[0]}.{scale}", (1,), torch.float32)

    def config(
        self, modules: Mapping[str, Scheme], excluded: Sequence[str], kv_cache: KVCacheFormat | None
    ) -> QuantConfig:
        by_scheme = modules_by_scheme(modules)
        spellings = {scheme: _SPELLINGS[scheme.format] for scheme in by_scheme}
        # A class, which means all linears; of several groups each has the names of its own. An output layer is none to
        # servers, and is meant by its name alone.
        heads = [name for name in modules if _OUTPUT_LAYER.fullmatch(name)]
        targets = map(_with_first_experts, by_scheme.values()) if len(by_scheme) > 1 else (["Linear", *heads],)
        groups = [
            spelling.group(scheme, names) for (scheme, spelling), names in zip(spellings.items(), targets, strict=True)
        ]
        formats = {spelling.format for spelling in spellings.values()}
        config_json = {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
            "ignore": _with_first_experts(excluded),
            "kv_cache_scheme": None if kv_cache is None else dict(_KV_CACHE),
        }
        algorithms = dict.fromkeys(spelling.algorithm for spelling in spellings.values())
        return QuantConfig(" + ".join(algorithms), config_json)


def _with_first_experts(modules: Sequence[str]) -> list[str]:
    """The modules, and for all experts of a layer the names by which vLLM asks how they are.

    It asks for three linears of the first expert, by these names in every architecture, and by exact comparison
    (`CompressedTensorsMoEMethod.get_moe_method` in compressed_tensors_moe.py); the checkpoint may call them otherwise,
    or hold all experts in one tensor.
    """
    listed = set(modules)
    # Of `model.layers.0.mlp.experts` itself, and of `model.layers.0.mlp.experts.0.w1`.
    experts = {match[1] for name in modules if (match := _FIRST_EXPERT.fullmatch(name))}
    asked = {f"{name}.0.{linear}" for name in experts for linear in ("gate_proj", "up_proj", "down_proj")}
    return [*modules, *sorted(asked - listed)]
