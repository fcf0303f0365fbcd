"""ModelOpt's unified Hugging Face checkpoint: `hf_quant_config.json` and `quantization_config` of config.json."""

import copy
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, ClassVar

from quantplug import __version__
from quantplug.choices import DialectName
from quantplug.export.plan.dialects.dialect import Dialect, Spelled, modules_by_scheme, stored_name
from quantplug.export.plan.types import QuantConfig
from quantplug.formats import FP8, NVFP4, BlockFormat, TensorSpec
from quantplug.formats.names import KV_CACHES, KVCacheFormat, QuantFormat, Scheme

MIXED = "MIXED_PRECISION"
"""`quant_algo` where each layer has its own."""
# Servers look for this producer name; the version is ours.
PRODUCER = {"name": "modelopt", "version": f"quantplug-{__version__}"}


@dataclass(frozen=True)
class _Spelling:
    """How the schema says a format.

    Attributes:
        algorithm: `quant_algo`, in the upper case that servers spell it in.
        weights: Arguments of weight quantization in `config_groups`.
        activations: Those of input quantization; None for formats that quantize weights alone.
        group_size: Input features that share a block scale; None without blocks.
    """

    algorithm: str
    weights: Mapping[str, Any]
    activations: Mapping[str, Any] | None
    group_size: int | None = None

    def group(self, targets: Sequence[str]) -> dict[str, Any]:
        """An entry of `config_groups`."""
        group = {"weights": dict(self.weights), "targets": list(targets)}
        return group if self.activations is None else group | {"input_activations": dict(self.activations)}

    @property
    def layer(self) -> dict[str, Any]:
        """An entry of `quantized_layers`."""
        layer: dict[str, Any] = {"quant_algo": self.algorithm}
        return layer if self.group_size is None else layer | {"group_size": self.group_size}


_NVFP4_ARGUMENTS = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
_FP8_ARGUMENTS = {"dynamic": False, "num_bits": 8, "type": "float"}
_MXFP8_ARGUMENTS = {"dynamic": False, "num_bits": 8, "type": "float", "group_size": 32}
_SPELLINGS: Mapping[QuantFormat, _Spelling] = {
    QuantFormat.W4A16_NVFP4: _Spelling("W4A16_NVFP4", _NVFP4_ARGUMENTS, None, 16),
    QuantFormat.NVFP4: _Spelling("NVFP4", _NVFP4_ARGUMENTS, _NVFP4_ARGUMENTS, 16),
    QuantFormat.FP8: _Spelling("FP8", _FP8_ARGUMENTS, _FP8_ARGUMENTS),
    QuantFormat.MXFP8: _Spelling("MXFP8", _MXFP8_ARGUMENTS, _MXFP8_ARGUMENTS, 32),
}
_NVFP4_FAMILY = frozenset((QuantFormat.NVFP4, QuantFormat.W4A16_NVFP4))
_KV_ALGORITHMS: Mapping[BlockFormat, str] = {FP8: "FP8", NVFP4: "NVFP4"}
# As ModelOpt's own converter writes it (export/convert_hf_config.py): FP8 as arguments, NVFP4 by its name.
_KV_SCHEMES: Mapping[BlockFormat, Mapping[str, Any] | str] = {FP8: _FP8_ARGUMENTS, NVFP4: "NVFP4"}


@dataclass(frozen=True)
class ModelOptDialect(Dialect):
    """ModelOpt's schema: both config files, `weight_scale` and `weight_scale_2`, 0-d FP32 scalars."""

    name: ClassVar[DialectName] = DialectName.MODELOPT
    # ModelOpt writes them so for Llama 4, and vLLM's loader of it turns them by the types that these formats have. Of
    # MXFP8 nobody has published one; experts one by one are what every loader takes.
    fused_is_read: ClassVar[Set[QuantFormat]] = _SPELLINGS.keys() - {QuantFormat.MXFP8}
    reads_globs: ClassVar[bool] = True

    @property
    def formats(self) -> Set[QuantFormat]:
        return _SPELLINGS.keys()

    def mix_problem(self, formats: Set[QuantFormat]) -> str | None:
        # `_parse_modelopt_quant_config` of SGLang 0.5.23 (srt/configs/model_config.py:1854-1865).
        if _NVFP4_FAMILY.isdisjoint(formats):
            return "says several formats only where NVFP4 is one of them: SGLang takes others for w4afp8"
        return None

    def cache_problem(self, kv_cache: KVCacheFormat, formats: Set[QuantFormat]) -> str | None:
        # `ModelOptMixedPrecisionConfig` of vLLM 0.32 takes no other `kv_cache_scheme` than FP8's for one with scales.
        if len(formats) > 1 and kv_cache is KVCacheFormat.NVFP4:
            return f"vLLM leaves its scales aside in {MIXED}; {kv_cache.cast} has none"
        return None

    def stored(self, scheme: Scheme, weight: str, tensor: TensorSpec) -> Spelled:
        return Spelled(replace(tensor, name=stored_name(weight, tensor.name)))

    def config(
        self, modules: Mapping[str, Scheme], excluded: Sequence[str], kv_cache: KVCacheFormat | None
    ) -> QuantConfig:
        by_scheme = modules_by_scheme(modules)
        mixed = len(by_scheme) > 1
        spellings = [_SPELLINGS[scheme.format] for scheme in by_scheme]
        algorithm = MIXED if mixed else spellings[0].algorithm
        targets = by_scheme.values() if mixed else (["Linear"],)
        config_json: dict[str, Any] = {
            "quant_method": "modelopt",
            "quant_algo": algorithm,
            "config_groups": {
                f"group_{number}": spelling.group(names)
                for number, (spelling, names) in enumerate(zip(spellings, targets, strict=True))
            },
            # The same list as exclude_modules of the other file: a module that only one of them spares would be read in
            # two ways.
            "ignore": list(excluded),
            "producer": PRODUCER,
        }
        # TensorRT-LLM reads this file and vLLM and SGLang config.json, so that both must say the same. vLLM's reader of
        # it wants kv_cache_quant_algo there, null too (modelopt.py).
        quantization: dict[str, Any] = {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": None if kv_cache is None else _KV_ALGORITHMS[KV_CACHES[kv_cache].values],
        }
        if kv_cache is not None:
            # Without `k_scale` and `v_scale` beside the weights vLLM and SGLang take a scale of 1.0, which is what a
            # cast means.
            config_json["kv_cache_scheme"] = copy.copy(_KV_SCHEMES[KV_CACHES[kv_cache].values])
        if mixed:
            layers = _layers(modules)
            config_json["quantized_layers"] = quantization["quantized_layers"] = layers
            if kv_cache is None:
                # Without either key SGLang leaves this file for the other one (`_parse_modelopt_quant_config`).
                config_json["kv_cache_quant_algo"] = None
        elif spellings[0].group_size is not None:
            quantization["group_size"] = spellings[0].group_size
        quantization["exclude_modules"] = list(excluded)
        return QuantConfig(algorithm, config_json, {"producer": PRODUCER, "quantization": quantization})


def _layers(modules: Mapping[str, Scheme]) -> dict[str, dict[str, Any]]:
    """`quantized_layers`: every quantized module by its exact name, each member of what servers fuse.

    vLLM 0.33 and SGLang 0.5.23 find the format of a fused linear by its members, and that of a layer's experts by the
    first key below them (`_resolve_quant_algo` in modelopt.py); patterns match nothing, and algorithms are compared in
    upper case.
    """
    return {name: _SPELLINGS[scheme.format].layer for name, scheme in sorted(modules.items(), key=itemgetter(0))}
