"""DeepSeek-V3's `config.json` for FP8 in blocks, which has no name for any other format."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import ClassVar

from quantplug.choices import DialectName
from quantplug.export.plan.dialects.dialect import Dialect, Spelled
from quantplug.export.plan.types import QuantConfig
from quantplug.formats import TensorSpec
from quantplug.formats.names import KVCacheFormat, QuantFormat, Scheme


@dataclass(frozen=True)
class DeepSeekDialect(Dialect):
    """DeepSeek-V3's FP8 in 128x128 blocks: `weight_scale_inv`, which despite its name multiplies.

    Experts in one tensor have `gate_up_proj_scale_inv`, as transformers and servers read it.
    """

    name: ClassVar[DialectName] = DialectName.DEEPSEEK
    fused_is_read: ClassVar[Set[QuantFormat]] = frozenset()
    reads_globs: ClassVar[bool] = False

    @property
    def formats(self) -> Set[QuantFormat]:
        return frozenset((QuantFormat.FP8_BLOCKWISE,))

    def mix_problem(self, formats: Set[QuantFormat]) -> str | None:
        raise AssertionError("one format is no mix")

    def cache_problem(self, kv_cache: KVCacheFormat, formats: Set[QuantFormat]) -> str | None:
        # vLLM's and SGLang's `fp8` configs have no such key.
        return "it has no name there"

    def stored(self, scheme: Scheme, weight: str, tensor: TensorSpec) -> Spelled:
        # The suffix goes behind the whole name: `q_proj.weight_scale_inv`, and `experts.gate_up_proj_scale_inv`.
        return Spelled(replace(tensor, name=weight if tensor.name == "weight" else f"{weight}_scale_inv"))

    def config(
        self, modules: Mapping[str, Scheme], excluded: Sequence[str], kv_cache: KVCacheFormat | None
    ) -> QuantConfig:
        config_json = {
            "quant_method": "fp8",
            # vLLM asks for this key (quantization/fp8.py).
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": list(excluded),
        }
        return QuantConfig("FP8 128x128", config_json)
