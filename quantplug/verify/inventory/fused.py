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

from quantplug.mappings.experts import FusedExpertMapping
from quantplug.mappings.keys import fill
from quantplug.mappings.rows import Role
from quantplug.mappings.table import Family
from quantplug.verify.checks import Check
from quantplug.verify.inventory.checkpoint import Checkpoint, TensorInfo
from quantplug.verify.report import Finding, error

# FP8 in blocks has `gate_up_proj_scale_inv`, without the `weight` of a module's `weight_scale_inv`.
_INNER = {"": "weight", "_scale_inv": "weight_scale_inv"}
_STORED = {inner: stored for stored, inner in _INNER.items()}


@dataclass(frozen=True)
class FusedExperts:
    """The tensors of an architecture that hold all experts of a layer.

    Attributes:
        transposed: Pattern of a weight's name (`*` is the layer) to whether its matrices are stored as [in, out].
        one_by_one: The same pattern to the patterns of the tensors that stand for it where each expert has its own
            (`*` is the layer, then the expert), one below another in the one tensor.
    """

    transposed: Mapping[str, bool]
    one_by_one: Mapping[str, tuple[str, ...]]

    def is_transposed(self, module: str) -> bool | None:
        """Whether the matrices of this module are stored as [in, out]; None where it does not hold all experts."""
        return next((turned for pattern, turned in self._patterns if pattern.fullmatch(module)), None)

    def apart(self, module: str, expert: int) -> tuple[str, ...]:
        """Names of one expert's tensors where a checkpoint has them for each expert, for a module of all experts."""
        for name, patterns in self.one_by_one.items():
            layer = _pattern(name).fullmatch(module)
            if layer is not None:
                return tuple(fill(pattern, int(layer[1]), expert) for pattern in patterns)
        return ()

    def inner_name(self, stored: str) -> str:
        """A module's spelling of a tensor's name on disk."""
        for pattern, _ in self._patterns:
            if (match := pattern.match(stored)) is not None:
                rest = stored[match.end() :]
                # Scales and biases go on with an underscore. A dot would make it a module, which these names must not
                # become.
                if rest == "" or (rest.startswith("_") and "." not in rest):
                    return f"{match[0]}.{_INNER.get(rest, rest[1:])}"
        return stored

    def stored_name(self, inner: str) -> str:
        """The name on disk of what `inner_name` gave; of a module it is the name of the tensor."""
        module, _, suffix = inner.rpartition(".")
        if self.is_transposed(module) is None:
            return inner
        return f"{module}{_STORED.get(suffix, f'_{suffix}')}"

    @cached_property
    def _patterns(self) -> tuple[tuple[re.Pattern[str], bool], ...]:
        return tuple((_pattern(name), turned) for name, turned in self.transposed.items())


def _pattern(name: str) -> re.Pattern[str]:
    # At most nine digits: a name is anybody's, and a number of any length would cost time and memory to read.
    return re.compile(re.escape(name).replace(r"\*", r"(\d{1,9})"))


def fused_experts(family: Family | None) -> FusedExperts:
    """Those of an architecture's table; none where we have no table."""
    rows = family.mappings if family is not None else ()
    fused = [row for row in rows if isinstance(row, FusedExpertMapping) and row.role is Role.LINEAR]
    return FusedExperts(
        transposed={name: row.transposed for row in fused for name in row.hf},
        one_by_one={name: row.packed.hf for row in fused for name in row.hf if row.packed is not None},
    )


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
