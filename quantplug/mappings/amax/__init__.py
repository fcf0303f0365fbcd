"""Amaxes of quantizers under Megatron's and Hugging Face's names, in both directions: docs/amax.md.

`table` makes the rows, from those of the weights. `rows` says what one row does to values. `transfer` applies rows to
what a rank holds and to whole models.
"""

from quantplug.mappings.amax.rows import (
    AmaxFanoutMapping,
    AmaxMapping,
    FusedAmax,
    MoeAmaxFanoutMapping,
    Operand,
    merge_amaxes,
)
from quantplug.mappings.amax.table import AmaxMap, Unmapped, WeightRow, convert_to_amax_map, convert_to_kv_amax_map
from quantplug.mappings.amax.transfer import (
    AmaxPlacement,
    amaxes_to_hf,
    amaxes_to_megatron,
    read_amaxes,
    write_amaxes,
)

__all__ = [
    "AmaxFanoutMapping",
    "AmaxMap",
    "AmaxMapping",
    "AmaxPlacement",
    "FusedAmax",
    "MoeAmaxFanoutMapping",
    "Operand",
    "Unmapped",
    "WeightRow",
    "amaxes_to_hf",
    "amaxes_to_megatron",
    "convert_to_amax_map",
    "convert_to_kv_amax_map",
    "merge_amaxes",
    "read_amaxes",
    "write_amaxes",
]
