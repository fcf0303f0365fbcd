"""The tensors of a checkpoint grouped into modules, each beside what the config promises for it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from quantplug.mappings.rows import Placement
from quantplug.verify.inventory import names
from quantplug.verify.inventory.checkpoint import Checkpoint, TensorInfo
from quantplug.verify.inventory.excludes import with_parents
from quantplug.verify.inventory.fused import FusedExperts
from quantplug.verify.inventory.known import KnownArchitecture
from quantplug.verify.inventory.layouts import CODE_DTYPES, Layout, Mxfp4Layout, Part, UnjudgedLayout, scale_names
from quantplug.verify.inventory.scheme import DeclaredScheme

# What has the experts along its first axis, and how many axes it has.
_RANKS_OF_ALL = {"weight": 3, "weight_packed": 3, "blocks": 4, "bias": 2}


@dataclass(frozen=True)
class Module:
    """All tensors that share a prefix.

    What follows from them is found once: dozens of rules ask, of tens of thousands of modules.

    Attributes:
        tensors: Suffix (`weight`, `weight_scale`) to header entry.
        excluded: A pattern of the exclude list names it.
        promised: The layout the config gives it, whether or not it is excluded; None for unquantized.
        transposed: Whether the matrices of a module that holds all experts are stored as [in, out]; None for any other.
    """

    name: str
    tensors: Mapping[str, TensorInfo]
    excluded: bool
    promised: Layout | UnjudgedLayout | None
    transposed: bool | None = None

    @property
    def served(self) -> str:
        """The module that servers build for it: of a parameter that holds all experts, the experts."""
        return self.name if self.transposed is None else _served(self.name)

    @cached_property
    def placement(self) -> Placement | None:
        """How the experts lie in the tensors of all of them; None for a module of its own."""
        if self.transposed is None:
            return None
        # Any tensor with an axis of experts tells how many there are; the weight itself may be missing.
        held = ((self.tensors.get(suffix), rank) for suffix, rank in _RANKS_OF_ALL.items())
        experts = next((info.shape[0] for info, rank in held if info is not None and len(info.shape) == rank), 0)
        return Placement(0, experts, self.transposed)

    def stored_shape(self, shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Of a tensor that has this shape for one weight, matrices being [out, in]; None for a size not known."""
        if self.placement is None:
            return shape
        return (self.placement.experts, *(reversed(shape) if self.placement.transposed else shape))

    def matrix(self, info: TensorInfo | None) -> TensorInfo | None:
        """One weight of a tensor, [out, in]; None for what holds no matrix."""
        shape = info.shape if info is not None else ()
        # Blocks lie side by side in a row: [experts, out, blocks, bytes of one].
        if self.transposed is not None and len(shape) == 4:
            shape = (*shape[:2], shape[2] * shape[3])
        if self.transposed is not None and len(shape) == 3:
            shape = (shape[2], shape[1]) if self.transposed else shape[1:]
        elif self.transposed is not None:
            return None
        return replace(info, shape=shape) if info is not None and len(shape) == 2 else None

    @cached_property
    def quantized(self) -> bool:
        """Something on disk speaks of quantization."""
        weight = self.tensors.get("weight")
        # Scales without codes, or codes without scales: either is meant to be quantized, and what lacks is a finding.
        return any(scale_names(self.tensors)) or (weight is not None and weight.dtype in CODE_DTYPES)

    @cached_property
    def plain_matrix(self) -> TensorInfo | None:
        """The weight of an unquantized Linear, embedding or router."""
        return None if self.quantized else self.matrix(self.tensors.get("weight"))

    @cached_property
    def layout(self) -> Layout | None:
        """The layout to judge the tensors by: promised, not excluded, and quantized on disk."""
        if self.excluded or not self.quantized or isinstance(self.promised, UnjudgedLayout):
            return None
        return self.promised

    @cached_property
    def codes(self) -> TensorInfo | None:
        """The quantized values, when they are there and a matrix."""
        return self.matrix(self.tensors.get(self.layout.codes)) if self.layout is not None else None

    @cached_property
    def parts(self) -> Mapping[str, Part]:
        """What the tensors of the layout have to be, given the shape of the codes; empty without codes."""
        if self.layout is None or self.codes is None:
            return {}
        parts, placement = self.layout.parts(self.codes), self.placement
        return parts if placement is None else {suffix: part.of_all(placement) for suffix, part in parts.items()}

    @property
    def sound(self) -> bool:
        """All tensors of the layout are there, with the right shapes and dtypes: the module can be decoded."""
        if self.layout is None or self.codes is None or self.layout.shape_problem(self.codes):
            return False
        return all(name in self.tensors and not part.problem(self.tensors[name]) for name, part in self.parts.items())


@dataclass(frozen=True)
class Inventory:
    """A checkpoint as the rules see it.

    Attributes:
        fused: Its tensors that hold all experts of a layer.
        known: Its architecture, where we have the table.
    """

    checkpoint: Checkpoint
    scheme: DeclaredScheme
    modules: Mapping[str, Module]
    fused: FusedExperts
    known: KnownArchitecture | None

    @cached_property
    def quantized(self) -> tuple[Module, ...]:
        return tuple(module for module in self.modules.values() if module.layout is not None)

    @cached_property
    def mixtures(self) -> Mapping[str, Mapping[int, Mapping[str, str]]]:
        return names.mixtures(self.modules)

    @cached_property
    def expert_groups(self) -> Mapping[str, tuple[str, ...]]:
        """Prefix of each mixture to the names of its experts' modules, one by one or all in one tensor."""
        groups = {
            experts: [name for parts in found.values() for name in parts.values()]
            for experts, found in self.mixtures.items()
        }
        for module in self.modules.values():
            if module.transposed is not None:
                groups.setdefault(module.served, []).append(module.name)
        return {experts: tuple(modules) for experts, modules in groups.items()}

    @cached_property
    def served(self) -> Mapping[str, None]:
        """The names of the modules that servers build, in order."""
        return dict.fromkeys(module.served for module in self.modules.values())

    @cached_property
    def fused_groups(self) -> tuple[names.FusedGroup, ...]:
        return tuple(names.fused_groups(self.modules))

    @cached_property
    def experts_parents(self) -> frozenset[str]:
        """The modules that have one that is called `experts`, or begins so (`experts_bias`)."""
        return frozenset(
            name.removesuffix(f".{last}")
            for module in with_parents(self.modules)
            for name, last in ((module, names.last(module)),)
            if last.startswith("experts") and name != last
        )

    @cached_property
    def merged_plain(self) -> frozenset[str]:
        """What servers make of modules that are all excluded; they may look it up by its own name.

        Of linears that they merge, and of the experts of a layer, of which they build one module.
        """
        merged = chain(((group.fused, group.members) for group in self.fused_groups), self.expert_groups.items())
        return frozenset(name for name, members in merged if all(self.modules[member].excluded for member in members))

    def routers(self) -> Iterator[Module]:
        """Gates that stand beside experts."""
        for experts in self.expert_groups:
            parent = experts.removesuffix(".experts")
            yield from (
                self.modules[f"{parent}.{name}"] for name in names.ROUTERS if f"{parent}.{name}" in self.modules
            )


def _served(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def take_inventory(
    checkpoint: Checkpoint, scheme: DeclaredScheme, fused: FusedExperts, known: KnownArchitecture | None
) -> Inventory:
    """The modules of a checkpoint whose names are those that `with_inner_names` gives."""
    grouped: dict[str, dict[str, TensorInfo]] = {}
    for info in checkpoint.tensors.values():
        module, suffix = names.split(info.name)
        grouped.setdefault(module, {})[suffix] = info
    modules = {}
    for name, tensors in sorted(grouped.items()):
        # Blocks are of [out, in], also where the architecture stores a plain tensor as [in, out].
        transposed = fused.is_transposed(name) and Mxfp4Layout.codes not in tensors
        # Exclude lists and layouts are written for the modules that servers build, and these build one for all experts.
        served = name if transposed is None else _served(name)
        excluded, promised = scheme.excludes.names(served), scheme.layout_of(served)
        modules[name] = Module(name, tensors, excluded, promised, transposed)
    return Inventory(checkpoint, scheme, modules, fused, known)
