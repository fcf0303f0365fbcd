"""Experts of a layer in one tensor: `mlp.experts.gate_up_proj [E, in, out]`, a parameter and no module.

Its scales and bias are parameters too (`gate_up_proj_weight_scale`, `gate_up_proj_bias`, as ModelOpt writes GPT-OSS).
Inside the checker they are named as those of a module (`gate_up_proj.weight`, `gate_up_proj.weight_scale`), so that
every rule judges them as it judges any other; findings speak of them as they are on disk. Which tensors these are, and
how they are turned, comes from the architecture's table alone.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from quantplug.errors import UnsupportedModelError
from quantplug.export.verify.checkpoint import Checkpoint, TensorInfo
from quantplug.export.verify.checks import Check
from quantplug.export.verify.report import Finding, error
from quantplug.export.verify.untrusted import Json, as_texts
from quantplug.mappings.base import Family, Role
from quantplug.mappings.experts import FusedExpertMapping
from quantplug.mappings.families import find_family


def family_of(config: Json) -> Family | None:
    """The table of the architecture that config.json names; None where we have none."""
    known = as_texts(config.get("architectures"))
    try:
        return find_family(known[0]) if known else None
    except UnsupportedModelError:
        return None


@dataclass(frozen=True)
class FusedExperts:
    """The tensors of an architecture that hold all experts of a layer.

    Attributes:
        transposed: Pattern of a weight's name (`*` is the layer) to whether its matrices are stored as [in, out].
    """

    transposed: Mapping[str, bool]

    def is_transposed(self, module: str) -> bool | None:
        """Whether the matrices of this module are stored as [in, out]; None where it does not hold all experts."""
        return next((turned for pattern, turned in self._patterns if pattern.fullmatch(module)), None)

    def inner_name(self, stored: str) -> str:
        """A module's spelling of a tensor's name on disk."""
        for pattern, _ in self._patterns:
            if (match := pattern.match(stored)) is not None:
                rest = stored[match.end() :]
                if rest == "" or (rest.startswith("_") and "." not in rest):
                    return f"{match[0]}.{rest[1:] or 'weight'}"
        return stored

    def stored_name(self, inner: str) -> str:
        """The name on disk of what `inner_name` gave; of a module it is the name of the tensor."""
        module, _, suffix = inner.rpartition(".")
        if self.is_transposed(module) is None:
            return inner
        return module if suffix == "weight" else f"{module}_{suffix}"

    @cached_property
    def _patterns(self) -> tuple[tuple[re.Pattern[str], bool], ...]:
        return tuple(
            (re.compile(re.escape(name).replace(r"\*", r"\d{1,9}")), turned) for name, turned in self.transposed.items()
        )


def fused_experts(config: Json) -> FusedExperts:
    family = family_of(config)
    rows = family.mappings if family is not None else ()
    fused = [row for row in rows if isinstance(row, FusedExpertMapping) and row.role is Role.LINEAR]
    return FusedExperts({name: row.transposed for row in fused for name in row.hf})


def with_inner_names(checkpoint: Checkpoint, fused: FusedExperts) -> tuple[Checkpoint, list[Finding]]:
    """The same checkpoint with a module's spelling of all names; findings on those that have it on disk already."""
    tensors: dict[str, TensorInfo] = {}
    findings: list[Finding] = []
    for info in checkpoint.tensors.values():
        if fused.stored_name(info.name) != info.name:
            message = f"is stored as {info.name}: readers look for a parameter of the experts, not for a module"
            findings.append(error(Check.NAMES, info.name, message))
        inner = fused.inner_name(info.name)
        tensors[inner] = replace(info, name=inner, stored=info.name)
    return replace(checkpoint, tensors=tensors), findings
