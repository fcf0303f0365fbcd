"""The architecture that config.json names, where we have its table: sizes, and rows in the form that the files have."""

from dataclasses import dataclass, replace
from functools import cached_property

from quantplug.checkpoint.untrusted.json_reader import Json, as_texts
from quantplug.checkpoint.untrusted.model_sizes import read_dimensions
from quantplug.errors import SourceError, UnsupportedModelError
from quantplug.mappings.families import find_family
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.rows import LayerStack
from quantplug.mappings.source_fit import in_form
from quantplug.mappings.table import Family
from quantplug.verify.checks import Check
from quantplug.verify.inventory.checkpoint import Checkpoint
from quantplug.verify.report import Finding, error


@dataclass(frozen=True)
class KnownArchitecture:
    """The table of an architecture, and the sizes that a config gives it.

    Attributes:
        name: As config.json names it.
        family: Its rows in the form that the checkpoint has.
    """

    name: str
    family: Family
    dims: ModelDimensions

    @property
    def numbered_mtp(self) -> range:
        """Numbers of the layers of multi-token prediction, where they are counted on after the decoder's."""
        counted_on = any(row.block is LayerStack.MTP for row in self.family.mappings)
        first = self.dims.num_layers
        return range(first, first + (self.dims.mtp_layers if counted_on else 0))

    def carries(self, tensor: str) -> bool:
        """Whether a tensor is none of the table's, and goes into an export as it is."""
        return tensor.startswith(self.family.passthrough) and tensor not in self._rows

    @cached_property
    def _rows(self) -> frozenset[str]:
        return frozenset(name for names, _ in self.family.expected(self.dims) for name in names)


def known_architecture(checkpoint: Checkpoint) -> tuple[KnownArchitecture | None, list[Finding]]:
    """What a checkpoint's config asks for; None where we have no table, or it gives no sizes, which is then found."""
    config = checkpoint.config
    family = table_of(config)
    if family is None:
        return None, []
    try:
        dims = read_dimensions(config, family)
    # A config that gives no sizes is wrong by itself; the rules that need no table still speak.
    except (SourceError, UnsupportedModelError) as problem:
        return None, [error(Check.ARCHITECTURE, f"config.json {it.parameter}", it.reason) for it in problem.offenders]
    # A family may be published in several forms, as with experts in one tensor or apart: names and shapes tell.
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    (name, *_) = as_texts(config.get("architectures"))
    return KnownArchitecture(name, in_form(family, shapes, dims), dims), []


def with_names_of(export: Checkpoint, source: Checkpoint, family: Family) -> Checkpoint:
    """A source by the names of its export, of tensors that tools and servers call otherwise (`Family.served_names`)."""
    pairs = [pair for name, served in family.served_names.items() for pair in ((name, served), (served, name))]
    named = {
        theirs: ours
        for theirs, ours in pairs
        if theirs in source.tensors and ours in export.tensors and ours not in source.tensors
    }
    tensors = (replace(info, name=named.get(name, name)) for name, info in source.tensors.items())
    return replace(source, tensors={info.name: info for info in tensors})


def table_of(config: Json) -> Family | None:
    """The table of the architecture that config.json names; None where we have none."""
    names = as_texts(config.get("architectures"))
    try:
        return find_family(names[0]) if names else None
    except UnsupportedModelError:
        return None
