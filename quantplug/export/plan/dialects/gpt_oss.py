"""GPT-OSS's own `config.json` and tensors for experts in MXFP4, as OpenAI publishes them."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import ClassVar

from quantplug.choices import DialectName
from quantplug.export.plan.dialects.dialect import Dialect, Spelled
from quantplug.export.plan.types import QuantConfig
from quantplug.formats import TensorSpec
from quantplug.formats.constants import MX_BLOCK
from quantplug.formats.names import KVCacheFormat, QuantFormat, Scheme


@dataclass(frozen=True)
class GptOssDialect(Dialect):
    """`gate_up_proj_blocks` U8 [E, out, in / 32, 16] beside `gate_up_proj_scales` U8 [E, out, in / 32].

    Nothing but experts is quantized: transformers' `Mxfp4HfQuantizer` and vLLM's `Mxfp4Config` know no other module.
    """

    name: ClassVar[DialectName] = DialectName.MXFP4
    fused_is_read: ClassVar[Set[QuantFormat]] = frozenset((QuantFormat.MXFP4,))
    turns_experts: ClassVar[bool] = False
    all_experts: ClassVar[bool] = True
    reads_globs: ClassVar[bool] = False

    @property
    def formats(self) -> Set[QuantFormat]:
        return frozenset((QuantFormat.MXFP4,))

    def mix_problem(self, formats: Set[QuantFormat]) -> str | None:
        return "has one format"

    def cache_problem(self, kv_cache: KVCacheFormat, formats: Set[QuantFormat]) -> str | None:
        return "it has no name there"

    def stored(self, scheme: Scheme, weight: str, tensor: TensorSpec) -> Spelled:
        if tensor.name != "weight":
            return Spelled(replace(tensor, name=f"{weight}_scales"))
        packed = MX_BLOCK // scheme.weight.encoding.code.in_a_byte
        shape = (*tensor.shape[:-1], tensor.shape[-1] // packed, packed)
        return Spelled(replace(tensor, name=f"{weight}_blocks", shape=shape))

    def config(
        self, modules: Mapping[str, Scheme], excluded: Sequence[str], kv_cache: KVCacheFormat | None
    ) -> QuantConfig:
        # OpenAI's files have patterns here. transformers and vLLM leave all but experts as it is in any case.
        return QuantConfig("MXFP4", {"quant_method": "mxfp4", "modules_to_not_convert": list(excluded)})
