"""The architectures that quantplug converts, one file of data each."""

from difflib import get_close_matches

from quantplug.errors import Offender, UnsupportedModelError
from quantplug.mappings.base import Family
from quantplug.mappings.families.deepseek_v2 import DEEPSEEK_V2
from quantplug.mappings.families.deepseek_v3 import DEEPSEEK_V3
from quantplug.mappings.families.glm4_moe import GLM4_MOE
from quantplug.mappings.families.qwen3 import QWEN3
from quantplug.mappings.families.qwen3_moe import QWEN3_MOE

FAMILIES: tuple[Family, ...] = (QWEN3, QWEN3_MOE, DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE)


def find_family(architecture: str) -> Family:
    """The family that serves an architecture (`architectures[0]` of config.json).

    Raises:
        UnsupportedModelError: No family does; the message lists those that are.
    """
    served = {name: family for family in FAMILIES for name in family.architectures}
    if architecture in served:
        return served[architecture]
    near = get_close_matches(architecture, served, n=1)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise UnsupportedModelError(
        f"The architecture {architecture!r} is not supported.",
        [Offender("architectures", f"is {architecture!r}{hint}")],
        f"Use one of: {', '.join(sorted(served))}.",
    )
