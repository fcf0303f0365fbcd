"""The architectures that quantplug converts, one file of data each, and those that a user adds."""

from quantplug.errors import ArgumentError, Offender, UnsupportedModelError
from quantplug.mappings.families.deepseek_v2 import DEEPSEEK_V2
from quantplug.mappings.families.deepseek_v3 import DEEPSEEK_V3
from quantplug.mappings.families.glm4_moe import GLM4_MOE
from quantplug.mappings.families.glm4v_moe import GLM4V_MOE
from quantplug.mappings.families.gpt_oss import GPT_OSS
from quantplug.mappings.families.llama import LLAMA
from quantplug.mappings.families.llama4 import LLAMA4, LLAMA4_TEXT
from quantplug.mappings.families.mixtral import MIXTRAL
from quantplug.mappings.families.nemotron_h import NEMOTRON_H
from quantplug.mappings.families.qwen2 import QWEN2
from quantplug.mappings.families.qwen2_moe import QWEN2_MOE
from quantplug.mappings.families.qwen3 import QWEN3
from quantplug.mappings.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from quantplug.mappings.families.qwen3_5_vl import QWEN3_5_VL, QWEN3_5_VL_MOE
from quantplug.mappings.families.qwen3_moe import QWEN3_MOE
from quantplug.mappings.families.qwen3_next import QWEN3_NEXT
from quantplug.mappings.families.qwen3_vl import QWEN3_VL, QWEN3_VL_MOE
from quantplug.mappings.family_check import problems
from quantplug.mappings.installed import installed_families
from quantplug.mappings.table import Family

FAMILIES: tuple[Family, ...] = (
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    QWEN3_NEXT,
    QWEN3_5,
    QWEN3_5_MOE,
    LLAMA,
    MIXTRAL,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GLM4_MOE,
    GPT_OSS,
    QWEN3_VL,
    QWEN3_VL_MOE,
    GLM4V_MOE,
    QWEN3_5_VL,
    QWEN3_5_VL_MOE,
    LLAMA4_TEXT,
    LLAMA4,
    NEMOTRON_H,
)

# What register_family was given, by architecture: a registry has to remember.
_REGISTERED: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Lets every function of quantplug convert one more architecture, in this process; docs/families.md has an example.

    Under torchrun every rank registers it. Registered again, under the same name, it takes the place of what it was.

    Raises:
        ArgumentError: Another family serves one of its architectures, or its table has names twice or patterns that
            cannot be filled; names them all.
    """
    offenders = list(problems(family))
    for name in family.architectures:
        # One's own family may be registered again, as a notebook cell does that is run twice; ours stay what they are.
        other = served().get(name, family)
        if other != family and (name not in _REGISTERED or other.name != family.name):
            offenders.append(Offender(name, f"is served by the family {other.name} already"))
    if offenders:
        raise ArgumentError(
            f"The family {family.name!r} cannot be registered.", offenders, "Mend its table; docs/families.md says how."
        )
    _REGISTERED.update(dict.fromkeys(family.architectures, family))


def registered() -> dict[str, Family]:
    """The architectures that `register_family` was given in this process, each with its family."""
    return dict(_REGISTERED)


def served() -> dict[str, Family]:
    """Every architecture with its family, those of installed packages and those that a user has added too.

    Raises:
        ArgumentError: An installed package offers a family that cannot be used.
    """
    ours = {name: family for family in FAMILIES for name in family.architectures}
    # A registered family cannot take one of ours, nor can an installed one: both are refused.
    return ours | installed_families(frozenset(ours)) | _REGISTERED


def find_family(architecture: str) -> Family:
    """The family that serves an architecture (`architectures[0]` of config.json).

    Raises:
        UnsupportedModelError: No family does; the message lists those that are.
        ArgumentError: An installed package offers a family that cannot be used.
    """
    known = served()
    if architecture in known:
        return known[architecture]
    # Names that look alike stand for models that are not: only another spelling of the same is worth a hint.
    same = [name for name in known if name.casefold() == architecture.casefold()]
    hint = f", which is spelled {same[0]}" if same else ""
    raise UnsupportedModelError(
        f"The architecture {architecture!r} is not supported.",
        [Offender("architectures", f"is {architecture!r}{hint}")],
        f"Use one of: {', '.join(sorted(known))}. Or add it by register_family (--family FILE.py).",
    )
