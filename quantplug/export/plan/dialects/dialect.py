"""What a dialect is: how a checkpoint spells its quantized weights, and the config that announces them.

A checkpoint has one dialect, as it has one config. Of each weight it is asked by itself what its tensors are called and
how they lie, by the weight's own scheme; of the config once, with all of them.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from quantplug.choices import DialectName
from quantplug.export.plan.types import Constant, QuantConfig
from quantplug.formats import TensorSpec
from quantplug.formats.names import KVCacheFormat, QuantFormat, Scheme

INPUT_SCALE = TensorSpec("input_scale", (), torch.float32)
"""The scale of a linear's input, amax / (largest value of the format), which follows what is packed of its weight."""


@dataclass(frozen=True)
class Spelled:
    """A tensor of a packed weight as a dialect stores it.

    Attributes:
        spec: Its name, shape and type on disk. A row of it has the bytes of a row of the packed tensor, which may be
            viewed as another type, or cut into more axes.
        reciprocal: Whether 1 / value is stored, in FP32; for scales without axes alone.
    """

    spec: TensorSpec
    reciprocal: bool = False


class Dialect(Protocol):
    """A way to spell a checkpoint.

    Attributes:
        name: What it is called.
        fused_is_read: The formats in which servers read all experts in one tensor, of any architecture.
        turns_experts: Whether experts in one tensor lie in it as they do where they are plain, [in, out] where that is
            so, and not [out, in] in any case.
        all_experts: Whether readers take the experts of all layers for quantized, as soon as those of one are.
        reads_globs: Whether its list of plain modules may hold shell patterns.
        scales_of_cast: Whether the scales of a KV cache that is cast are written too, though all are 1.
    """

    name: ClassVar[DialectName]
    fused_is_read: ClassVar[Set[QuantFormat]]
    turns_experts: ClassVar[bool] = True
    all_experts: ClassVar[bool] = False
    reads_globs: ClassVar[bool]
    scales_of_cast: ClassVar[bool] = False

    @property
    def formats(self) -> Set[QuantFormat]:
        """The formats that it has a name for."""

    def mix_problem(self, formats: Set[QuantFormat]) -> str | None:
        """Why it cannot say several of its formats side by side, in words that go on after `which`; None if it can.

        Args:
            formats: Of `formats` alone; one, where it stands for several schemes.
        """

    def stored(self, scheme: Scheme, weight: str, tensor: TensorSpec) -> Spelled:
        """How a tensor of a packed weight is stored.

        Args:
            weight: Hugging Face name of the plain weight, such as `model.layers.0.self_attn.q_proj.weight`.
            tensor: As the format makes it, or `INPUT_SCALE`; its name is a suffix, and its shape that of all experts
                where these are one tensor.
        """

    def constants(self, scheme: Scheme, weight: str, shape: tuple[int, ...]) -> tuple[Constant, ...]:
        """Tensors that stand beside those of a packed weight and are made of no data.

        Args:
            weight: Hugging Face name of the plain weight.
            shape: Its shape before packing.
        """
        return ()

    def cache_problem(self, kv_cache: KVCacheFormat, formats: Set[QuantFormat]) -> str | None:
        """Why its config cannot ask for a KV cache beside weights of these formats; None if it can."""

    def cache_scale(self, projection: str, scale: str) -> TensorSpec:
        """Where a scale of a calibrated KV cache is stored.

        Args:
            projection: Hugging Face name of the linear that makes keys or values.
            scale: `k_scale` or `v_scale`.
        """
        return TensorSpec(f"{projection}.{scale}", (), torch.float32)

    def config(
        self, modules: Mapping[str, Scheme], excluded: Sequence[str], kv_cache: KVCacheFormat | None
    ) -> QuantConfig:
        """The config files of a checkpoint.

        Args:
            modules: The scheme of every quantized module by its Hugging Face name; that of all experts of a layer where
                these are one tensor. At least one, of `formats` alone.
            excluded: Names of the modules that stay plain.
            kv_cache: The KV cache that the checkpoint asks for, of which `cache_problem` says nothing.
        """


def modules_by_scheme(modules: Mapping[str, Scheme]) -> dict[Scheme, list[str]]:
    """Names of the modules of each scheme, both in an order of their own, whichever way found the modules."""
    found: dict[Scheme, list[str]] = {}
    for name, scheme in sorted(modules.items(), key=lambda item: (item[1].label, item[0])):
        found.setdefault(scheme, []).append(name)
    return found


def stored_name(weight: str, tensor: str) -> str:
    """Name on disk of a tensor of a weight, in most dialects.

    A module's `weight` has its scales beside it (`q_proj.weight_scale`). Experts in one tensor, which is a parameter by
    another name, have it in theirs (`experts.gate_up_proj_weight_scale`), as ModelOpt writes them for GPT-OSS.
    """
    module, dot, last = weight.rpartition(".")
    if last == "weight":
        return f"{module}{dot}{tensor}"
    return weight if tensor == "weight" else f"{weight}_{tensor}"
