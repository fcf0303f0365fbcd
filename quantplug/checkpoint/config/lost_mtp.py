"""Layers of multi-token prediction that a config counts and its checkpoint has not.

transformers does not load these layers of DeepSeek-V3, GLM-4.5 and Qwen3.5, and saves such models without them, with a
config that goes on counting them.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from quantplug.checkpoint.config.file import counted_mtp
from quantplug.checkpoint.untrusted.json_reader import as_count
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import Family

# Families whose tables have no such rows carry these layers from the source as they are, under this name.
_CARRIED = "mtp."


@dataclass(frozen=True)
class LostMtp:
    """That a config counts layers of which the checkpoint holds nothing.

    Attributes:
        setting: The setting that counts them.
        count: What it says.
    """

    setting: str
    count: int

    def __str__(self) -> str:
        return (
            f"config.json counts {self.count} in {self.setting}, and the source holds no such layer of multi-token "
            "prediction (transformers saves none): taken as 0"
        )


def lost_mtp(
    config: Mapping[str, Any], family: Family, dims: ModelDimensions, names: Collection[str]
) -> LostMtp | None:
    """Whether these layers are counted and lost.

    Args:
        config: All settings, which `dims` were read from.
        names: Of the checkpoint's tensors; without any, nothing is known of what it holds.
    """
    count = as_count(counted_mtp(config, family))
    carries = _CARRIED in family.passthrough
    if not names or not count or not (dims.mtp_layers or carries):
        return None
    table = family.by_megatron()
    expected = chain.from_iterable(hf for hf, key in family.expected(dims) if table[key.module].block.is_mtp)
    # One tensor of them is enough: then the others are missing, which is an error.
    if not set(expected).isdisjoint(names) or any(name.startswith(_CARRIED) for name in names):
        return None
    return LostMtp(family.mtp_setting, count)
