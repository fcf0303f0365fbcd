"""compressed-tensors' `QuantizationConfig`, as llm-compressor writes it.

INT4 has no other form that servers read, and NVFP4 is read in this one too (vLLM 0.33's `CompressedTensorsW4A16Fp4`,
`CompressedTensorsW4A4Nvfp4MoEMethod` and `CompressedTensorsWNA16MarlinMoEMethod`). It says FP8 weights with 16-bit
activations, which ModelOpt's own schema cannot (its `FP8` always means quantized activations), and FP8 with a scale a
row, which that can, but of which no server loads experts in its form (vLLM 0.33's `ModelOptFp8MoEMethod` knows scales
of whole tensors alone).
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from quantplug.export.plan.dialects.dialect import Dialect, Spelled, stored_name
from quantplug.export.plan.types import Constant, QuantConfig
from quantplug.formats import TensorSpec
from quantplug.formats.names import KVCacheFormat, QuantFormat, Scheme


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
            "weights": {**self.weights, **group_size},
            "input_activations": None if self.activations is None else {**self.activations, **group_size},
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
}


@dataclass(frozen=True)
class CompressedTensorsDialect(Dialect):
    """compressed-tensors' schema: config.json alone, and scales of a whole tensor of shape [1].

    Codes of INT4 are stored eight to an integer of 32 bits, the first in the lowest four, beside the shape of the
    weight (`pack_to_int32` in compressed_tensors/compressors/pack_quantized/helpers.py): with two to a byte, the even
    column in the low nibble, these are the same bytes. A KV cache has its scales beside attention's projections.
    """

    # llm-compressor writes experts one by one, whatever the architecture, and servers load them so.
    fused_is_read: ClassVar[bool] = False
    reads_globs: ClassVar[bool] = False
    names_kv_cache: ClassVar[bool] = True

    @property
    def formats(self) -> Set[QuantFormat]:
        return _SPELLINGS.keys()

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
        (scheme,) = set(modules.values())
        spelling = _SPELLINGS[scheme.format]
        config_json = {
            "quant_method": "compressed-tensors",
            "format": spelling.format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": spelling.group(scheme, ["Linear"])},
            "ignore": _with_first_experts(excluded),
            "kv_cache_scheme": None if kv_cache is None else dict(_KV_CACHE),
        }
        return QuantConfig(spelling.algorithm, config_json)


def _with_first_experts(excluded: Sequence[str]) -> list[str]:
    """The modules, and for each module of all experts the names by which vLLM asks whether they are plain.

    It asks for three linears of the first expert, by these names in every architecture, and by exact comparison
    (`CompressedTensorsMoEMethod.get_moe_method` in compressed_tensors_moe.py); the checkpoint may call them otherwise,
    or hold all experts in one tensor.
    """
    experts = [name for name in excluded if name.rpartition(".")[2] == "experts"]
    asked = {f"{name}.0.{linear}" for name in experts for linear in ("gate_proj", "up_proj", "down_proj")}
    return [*excluded, *sorted(asked.difference(excluded))]
