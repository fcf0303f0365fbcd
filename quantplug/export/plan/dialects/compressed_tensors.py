"""compressed-tensors' `QuantizationConfig`, as llm-compressor writes it.

It says FP8 weights with 16-bit activations, which ModelOpt's own schema cannot (its `FP8` always means quantized
activations), and FP8 with a scale a row, which that can, but of which no server loads experts in its form (vLLM 0.33's
`ModelOptFp8MoEMethod` knows scales of whole tensors alone).
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from quantplug.export.plan.dialects.dialect import Dialect, Spelled, stored_name
from quantplug.export.plan.types import QuantConfig
from quantplug.formats import TensorSpec
from quantplug.formats.names import KVCacheFormat, QuantFormat, Scheme


@dataclass(frozen=True)
class _Spelling:
    """How the schema says a format.

    Attributes:
        algorithm: For tables and messages; the schema has no such name.
        format: How weights are stored (`CompressionFormat`).
        weights: Arguments of weight quantization.
        activations: Those of input quantization; None for formats that quantize weights alone.
    """

    algorithm: str
    format: str
    weights: Mapping[str, Any]
    activations: Mapping[str, Any] | None

    def group(self, targets: Sequence[str]) -> dict[str, Any]:
        """An entry of `config_groups`."""
        return {
            "targets": list(targets),
            "weights": dict(self.weights),
            "input_activations": None if self.activations is None else dict(self.activations),
            "output_activations": None,
        }


_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
_OF_TENSOR = {**_FP8, "strategy": "tensor", "dynamic": False}
_OF_ROWS = {**_FP8, "strategy": "channel", "dynamic": False}
_OF_TOKENS = {**_FP8, "strategy": "token", "dynamic": True}
_SPELLINGS: Mapping[QuantFormat, _Spelling] = {
    # What llm-compressor writes by its scheme FP8.
    QuantFormat.FP8: _Spelling("FP8", "float-quantized", _OF_TENSOR, _OF_TENSOR),
    QuantFormat.W8A16_FP8: _Spelling("W8A16 FP8", "naive-quantized", _OF_TENSOR, None),
    # What llm-compressor writes by its scheme FP8_DYNAMIC.
    QuantFormat.FP8_DYNAMIC: _Spelling("FP8 dynamic", "float-quantized", _OF_ROWS, _OF_TOKENS),
}


@dataclass(frozen=True)
class CompressedTensorsDialect(Dialect):
    """compressed-tensors' schema: config.json alone, and scales of a whole tensor of shape [1]."""

    # llm-compressor writes experts one by one, whatever the architecture, and servers load them so.
    fused_is_read: ClassVar[bool] = False
    reads_globs: ClassVar[bool] = False
    names_kv_cache: ClassVar[bool] = False

    @property
    def formats(self) -> Set[QuantFormat]:
        return _SPELLINGS.keys()

    def stored(self, scheme: Scheme, weight: str, tensor: TensorSpec) -> Spelled:
        # compressed-tensors has scales of a whole tensor in one dimension, ModelOpt in none.
        return Spelled(replace(tensor, name=stored_name(weight, tensor.name), shape=tensor.shape or (1,)))

    def config(
        self, modules: Mapping[str, Scheme], excluded: Sequence[str], kv_cache: KVCacheFormat | None
    ) -> QuantConfig:
        (spelling,) = (_SPELLINGS[name] for name in {scheme.format for scheme in modules.values()})
        config_json = {
            "quant_method": "compressed-tensors",
            "format": spelling.format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": spelling.group(["Linear"])},
            "ignore": _with_first_experts(excluded),
            "kv_cache_scheme": None,
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
