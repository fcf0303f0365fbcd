"""The tensors of a checkpoint grouped into modules, each beside what the config promises for it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from quantplug.export.verify import names
from quantplug.export.verify.checkpoint import Checkpoint, TensorInfo
from quantplug.export.verify.layouts import CODE_DTYPES, Layout, UnjudgedLayout, scale_names
from quantplug.export.verify.scheme import Scheme


@dataclass(frozen=True)
class Module:
    """All tensors that share a prefix.

    Attributes:
        tensors: Suffix (`weight`, `weight_scale`) to header entry.
        excluded: A pattern of the exclude list names it.
        promised: The layout the config gives it, whether or not it is excluded; None for unquantized.
    """

    name: str
    tensors: Mapping[str, TensorInfo]
    excluded: bool
    promised: Layout | UnjudgedLayout | None

    @property
    def quantized(self) -> bool:
        """Something on disk speaks of quantization."""
        weight = self.tensors.get("weight")
        return any(scale_names(self.tensors)) or (weight is not None and weight.dtype in CODE_DTYPES)

    @property
    def plain_matrix(self) -> TensorInfo | None:
        """The weight of an unquantized Linear, embedding or router."""
        weight = self.tensors.get("weight")
        return weight if weight is not None and len(weight.shape) == 2 and not self.quantized else None

    @property
    def layout(self) -> Layout | None:
        """The layout to judge the tensors by: promised, not excluded, and quantized on disk."""
        if self.excluded or not self.quantized or isinstance(self.promised, UnjudgedLayout):
            return None
        return self.promised

    @property
    def codes(self) -> TensorInfo | None:
        """The quantized values, when they are there and a matrix."""
        info = self.tensors.get(self.layout.codes) if self.layout is not None else None
        return info if info is not None and len(info.shape) == 2 else None

    @property
    def sound(self) -> bool:
        """All tensors of the layout are there, with the right shapes and dtypes: the module can be decoded."""
        if self.layout is None or self.codes is None or self.layout.shape_problem(self.codes):
            return False
        parts = self.layout.parts(self.codes)
        return all(name in self.tensors and not part.problem(self.tensors[name]) for name, part in parts.items())


@dataclass(frozen=True)
class Inventory:
    """A checkpoint as the rules see it."""

    checkpoint: Checkpoint
    scheme: Scheme
    modules: Mapping[str, Module]

    @cached_property
    def quantized(self) -> tuple[Module, ...]:
        return tuple(module for module in self.modules.values() if module.layout is not None)

    @cached_property
    def mixtures(self) -> Mapping[str, Mapping[int, Mapping[str, str]]]:
        return names.mixtures(self.modules)

    @cached_property
    def fused_groups(self) -> tuple[names.FusedGroup, ...]:
        return tuple(names.fused_groups(self.modules))

    def routers(self) -> Iterator[Module]:
        """Gates that stand beside experts."""
        for experts in self.mixtures:
            parent = experts.removesuffix(".experts")
            yield from (
                self.modules[f"{parent}.{name}"] for name in names.ROUTERS if f"{parent}.{name}" in self.modules
            )


def take_inventory(checkpoint: Checkpoint, scheme: Scheme) -> Inventory:
    grouped: dict[str, dict[str, TensorInfo]] = {}
    for info in checkpoint.tensors.values():
        module, suffix = names.split(info.name)
        grouped.setdefault(module, {})[suffix] = info
    modules = {
        name: Module(name, tensors, scheme.excludes.excludes(name), scheme.layout_of(name))
        for name, tensors in sorted(grouped.items())
    }
    return Inventory(checkpoint, scheme, modules)
