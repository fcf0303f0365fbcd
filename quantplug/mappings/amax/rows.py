"""Amax names: which Hugging Face quantizers one Megatron quantizer stands for, read in both directions.

ModelOpt names an amax after its module: `q_proj.weight_quantizer._amax`. Megatron's linears are fused, so one of its
amaxes stands for several in Hugging Face: linear_qkv's for q, k and v; linear_fc1's for gate and up; that of a block of
experts for every expert in it. Megatron to Hugging Face each of them gets the value; the way back takes the largest.

A value is never made up: 0 stays 0, NaN stays NaN and wins over every number, and a member that is missing is an error.
`quantplug.mappings.amax.transfer` applies rows to whole models and to what one rank holds.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import reduce
from typing import TypeVar

import torch

from quantplug.errors import MappingError, Offender, ShapeError, UnsupportedQuantizationError
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import Identity, ModelDimensions
from quantplug.mappings.rows import WeightMapping

Name = TypeVar("Name", bound=Hashable)


class Operand(Enum):
    """What a quantizer quantizes, and so what each value is of in an amax that has many."""

    WEIGHT = "rows of the weight, which the layout cuts as it cuts the weight"
    ACTIVATION = "channels of one activation, the same for every linear that reads it"


class FusedAmax(Enum):
    """How Hugging Face holds the amaxes of a tensor that has all experts of a layer, as `experts.gate_up_proj`.

    ModelOpt 0.47 has the first for transformers' fused experts (`_QuantFusedExperts`), the last for GPT-OSS and
    Llama 4.
    """

    PER_EXPERT = "gate_up_proj_weight_quantizers.{expert}._amax, one for each expert"
    STACKED = "gate_up_proj_weight_quantizer._amax of shape [E]"
    SHARED = "gate_up_proj_weight_quantizer._amax, the largest of all experts"


@dataclass(frozen=True)
class AmaxMapping(WeightMapping):
    """One quantizer under one Hugging Face name. `megatron` and `hf` are patterns of amax names.

    Attributes:
        operand: What the quantizer quantizes.
    """

    operand: Operand = Operand.WEIGHT

    @property
    def spellings(self) -> tuple[str, ...]:
        """Every Megatron name that this row reads and writes, with `*` for numbers."""
        return self.megatron

    def quantized_names(self, key: ParamKey, dims: ModelDimensions) -> tuple[str, ...]:
        """The Hugging Face names of those parts that are not kept in high precision."""
        # What servers load in high precision has no quantizer in Hugging Face, though Megatron's fused linear has one.
        names = zip(self.hf, self.hf_names(key, dims), strict=True)
        return tuple(name for pattern, name in names if pattern not in self.high_precision)

    def spread(self, key: ParamKey, experts: Iterable[int]) -> tuple[ParamKey, ...]:
        """The quantizers that one name of this row stands for: one, but where experts share it."""
        return (key,)

    def members(self, keys: Iterable[ParamKey], dims: ModelDimensions) -> dict[str, int | None]:
        """The Hugging Face names that these quantizers stand for, each with the expert it is of."""
        return {name: key.expert for key in keys for name in self.quantized_names(key, dims)}

    def to_hf(self, key: ParamKey, amax: torch.Tensor, dims: ModelDimensions) -> dict[str, torch.Tensor]:
        """The amax of every Hugging Face quantizer that one Megatron quantizer stands for, each a tensor of its own.

        Raises:
            UnsupportedQuantizationError: The amax has many values, and they cannot be told apart by part.
        """
        names = self.quantized_names(key, dims)
        # q, k and v read one activation, so its amax, of any shape, is that of each. A weight's goes to each of them
        # only where it is one number: servers that fuse the three need equal scales anyway.
        if is_per_tensor(amax) or self.operand is Operand.ACTIVATION:
            # Copies, because safetensors refuses to save one storage under several names.
            return {name: amax.clone() for name in names}
        # Cut by all names, then taken by those that are quantized: the layout knows all parts of a weight or none.
        parts = dict(zip(self.hf_names(key, dims), self._split(key.name, amax, dims), strict=True))
        return {name: parts[name].clone() for name in names}

    def to_megatron(self, key: ParamKey, amaxes: Mapping[str, torch.Tensor], dims: ModelDimensions) -> torch.Tensor:
        """The amax of the Megatron quantizer: the largest of those it stands for.

        Raises:
            MappingError: Some of them are missing.
            UnsupportedQuantizationError: They have many values, and these cannot be put together.
        """
        names = self.quantized_names(key, dims)
        raise_missing([Offender(name, "is missing", key.expert) for name in names if name not in amaxes])
        parts = tuple(amaxes[name] for name in names)
        # One quantizer for all of them must not clip any: the largest.
        if all(map(is_per_tensor, parts)):
            return largest(parts)
        if self.operand is Operand.ACTIVATION:
            if len({part.shape for part in parts}) > 1:
                raise _inseparable(key.name, parts[0], "others have another")
            return largest(parts)
        # One number a row is needed for each row of Megatron's weight, and these rows would have to be made up.
        if self.high_precision:
            raise _inseparable(key.name, parts[0], "parts of its weight that are not quantized have none")
        return self._merge(key.name, parts, dims)

    def layer_to_hf(self, amaxes: Mapping[ParamKey, torch.Tensor], dims: ModelDimensions) -> dict[str, torch.Tensor]:
        """`to_hf` of all quantizers that one layer has by this row."""
        return merge_amaxes(self.to_hf(key, amax, dims) for key, amax in amaxes.items())

    def layer_to_megatron(
        self, keys: Sequence[ParamKey], amaxes: Mapping[str, torch.Tensor], dims: ModelDimensions
    ) -> dict[ParamKey, torch.Tensor]:
        """`to_megatron` of all quantizers that one layer has by this row."""
        return {key: self.to_megatron(key, amaxes, dims) for key in keys}

    def _split(self, name: str, amax: torch.Tensor, dims: ModelDimensions) -> tuple[torch.Tensor, ...]:
        """An amax of many values of a weight as those of its parts, cut as the weight is."""
        # Any shape of amax is right for a weight that is the same tensor in both, and none where rows move.
        if not isinstance(self.layout, Identity):
            raise _inseparable(name, amax, "its weight does not have the same rows in Hugging Face")
        return (amax,)

    def _merge(self, name: str, parts: tuple[torch.Tensor, ...], dims: ModelDimensions) -> torch.Tensor:
        """The parts' amaxes of many values as the one of the weight: `_split` backwards."""
        return self._split(name, parts[0], dims)[0].clone()


@dataclass(frozen=True)
class AmaxFanoutMapping(AmaxMapping):
    """One quantizer under several Hugging Face names: q, k and v; gate and up.

    The amax of a whole weight goes to each of them. One amax a row, [N, 1], is cut by the layout as the weight is.
    """

    def _split(self, name: str, amax: torch.Tensor, dims: ModelDimensions) -> tuple[torch.Tensor, ...]:
        if isinstance(self.layout, Identity):
            return super()._split(name, amax, dims)
        # [N, 1] has the weight's rows, so the weight's layout checks and cuts it. Blocks may lie across the cut.
        problem = self.layout.problem(tuple(amax.shape), dims) if is_per_row(amax) else "is of blocks"
        if problem is not None:
            raise _inseparable(name, amax, problem)
        return self.layout.split(amax, dims)

    def _merge(self, name: str, parts: tuple[torch.Tensor, ...], dims: ModelDimensions) -> torch.Tensor:
        if isinstance(self.layout, Identity):
            return super()._merge(name, parts, dims)
        if not all(map(is_per_row, parts)):
            other = next(part for part in parts if not is_per_row(part))
            raise _inseparable(name, other, "others of its parts have another")
        return self.layout.merge(parts, dims)


@dataclass(frozen=True)
class MoeAmaxFanoutMapping(AmaxFanoutMapping):
    """The quantizers of a layer's routed experts.

    `megatron` holds the spellings with an expert number, `linear_fc1.weight_quantizer.*._amax` and
    `local_experts.*.linear_fc1.weight_quantizer._amax`.

    Attributes:
        shared: Spellings without one, `linear_fc1.weight_quantizer._amax`: one quantizer for all experts of a block, as
            the inputs of a grouped linear have it, and its weights had it before ModelOpt 0.47.
        fused: How Hugging Face holds the amaxes if one of its tensors has all experts; None if each expert has its own.
    """

    shared: tuple[str, ...] = ()
    fused: FusedAmax | None = None

    @property
    def spellings(self) -> tuple[str, ...]:
        # A shared quantizer is read and written, but has no key of its own: it stands for those of its experts.
        return (*self.megatron, *self.shared)

    def spread(self, key: ParamKey, experts: Iterable[int]) -> tuple[ParamKey, ...]:
        """The experts that a quantizer without an expert number stands for; itself if it has one."""
        if key.expert is not None:
            return (key,)
        return tuple(ParamKey(self.megatron[0], key.layer, expert) for expert in experts)

    def members(self, keys: Iterable[ParamKey], dims: ModelDimensions) -> dict[str, int | None]:
        # A name that stands for all experts of a layer is of none of them.
        names = super().members(keys, dims)
        return dict.fromkeys(names) if self.fused in (FusedAmax.STACKED, FusedAmax.SHARED) else names

    def to_hf(self, key: ParamKey, amax: torch.Tensor, dims: ModelDimensions) -> dict[str, torch.Tensor]:
        """The Hugging Face amaxes of one expert; of all experts of the layer, alike, if the key has no expert."""
        if key.expert is None:
            return self.layer_to_hf(dict.fromkeys(self.spread(key, range(dims.num_experts)), amax), dims)
        return super().to_hf(key, amax, dims)

    def layer_to_hf(self, amaxes: Mapping[ParamKey, torch.Tensor], dims: ModelDimensions) -> dict[str, torch.Tensor]:
        if self.fused is not FusedAmax.STACKED:
            return super().layer_to_hf(amaxes, dims)
        # Only their order says which expert a value is of, and a gap would shift all that come behind it.
        keys = sorted(amaxes)
        raise_missing(self.missing_experts(keys, dims))
        for key in keys:
            if not is_per_tensor(amaxes[key]):
                raise _inseparable(key.name, amaxes[key], "has no place in one value an expert")
        stacked = torch.stack([amaxes[key].reshape(()) for key in keys])
        return {name: stacked.clone() for name in self.hf_names(keys[0], dims)}

    def layer_to_megatron(
        self, keys: Sequence[ParamKey], amaxes: Mapping[str, torch.Tensor], dims: ModelDimensions
    ) -> dict[ParamKey, torch.Tensor]:
        if self.fused is not FusedAmax.STACKED:
            return super().layer_to_megatron(keys, amaxes, dims)
        names = self.hf_names(keys[0], dims)
        raise_missing([Offender(name, "is missing") for name in names if name not in amaxes])
        wrong = [
            Offender(
                name, f"has shape {list(amaxes[name].shape)}, not one value for each of {dims.num_experts} experts"
            )
            for name in names
            if amaxes[name].numel() != dims.num_experts
        ]
        if wrong:
            raise ShapeError("A stacked amax has another number of experts.", wrong, "Convert with the model's config.")
        # [E]: for each expert the largest of its parts' amaxes, where Hugging Face has more than one tensor of them.
        whole = largest([amaxes[name].flatten() for name in names])
        return {key: whole[key.expert].clone() for key in keys if key.expert is not None}

    def missing_experts(self, keys: Iterable[ParamKey], dims: ModelDimensions) -> list[Offender]:
        """An offender for every expert of the layers of these keys that has none."""
        # Only layers that have an amax at all: a layer without any is not quantized, and nothing is missing there.
        here = set(keys)
        wanted = {ParamKey(key.module, key.layer, expert) for key in here for expert in range(dims.num_experts)}
        return [Offender(key.name, "is missing, other experts have one", key.expert) for key in sorted(wanted - here)]

    def _split(self, name: str, amax: torch.Tensor, dims: ModelDimensions) -> tuple[torch.Tensor, ...]:
        if self.fused is not None:
            raise _inseparable(name, amax, "Hugging Face may hold the rows of fused experts in another order")
        return super()._split(name, amax, dims)

    def _merge(self, name: str, parts: tuple[torch.Tensor, ...], dims: ModelDimensions) -> torch.Tensor:
        if self.fused is not None:
            raise _inseparable(name, parts[0], "Hugging Face may hold the rows of fused experts in another order")
        return super()._merge(name, parts, dims)


def is_per_tensor(amax: torch.Tensor) -> bool:
    """Whether an amax is one number for the whole tensor: [] or [1]."""
    return amax.numel() == 1


def is_per_row(amax: torch.Tensor) -> bool:
    """Whether an amax has one value for each row of a weight: [N, 1]."""
    return amax.ndim == 2 and amax.shape[1] == 1


def largest(amaxes: Iterable[torch.Tensor]) -> torch.Tensor:
    """The elementwise maximum of amaxes of one shape, a tensor of its own; NaN wins over every number."""
    # `torch.maximum` keeps NaN from either side, as Python's max does not.
    first, *others = amaxes
    return reduce(torch.maximum, others, first.clone())


def merge_amaxes(ranks: Iterable[Mapping[Name, torch.Tensor]]) -> dict[Name, torch.Tensor]:
    """What several ranks hold, put together: the largest of what stands under one name, everything else as it is.

    So it is the reduction over TP, ETP and DP, and the gather over EP and PP. Names are global: ranks' own numbers of
    layers and experts must have been replaced (`transfer.read_amaxes`). NaN wins over every number.

    Raises:
        UnsupportedQuantizationError: Several ranks hold an amax of many values under one name. It may be of different
            rows: put its slices together first, or pass one of the ranks that hold the same.
    """
    # An amax of one number that several ranks hold is of shards of one tensor, or of the same data seen in parts: the
    # maximum is right for both. One of many values may be of different rows on each, and a maximum would mix them.
    found: dict[Name, list[torch.Tensor]] = {}
    for rank in ranks:
        for name, amax in rank.items():
            found.setdefault(name, []).append(amax)
    offenders = [
        Offender(name.name if isinstance(name, ParamKey) else str(name), f"has shape {list(amax.shape)}")
        for name, amaxes in found.items()
        if len(amaxes) > 1
        for amax in amaxes[:1]
        if not all(map(is_per_tensor, amaxes))
    ]
    if offenders:
        raise UnsupportedQuantizationError(
            "An amax of many values is held more than once, and may be of other rows each time.",
            offenders,
            "Put the slices of its weight's amax together first, and pass every amax of many values once.",
        )
    return {name: largest(amaxes) for name, amaxes in found.items()}


def raise_missing(offenders: Sequence[Offender]) -> None:
    """Raises MappingError if there is any offender: an amax that is not there is never made up."""
    if offenders:
        raise MappingError(
            "Amaxes are missing that stand together with others that are there.",
            offenders,
            "Pass all of them: those of every expert, of q, k and v, of gate and up.",
        )


def _inseparable(name: str, amax: torch.Tensor, why: str) -> UnsupportedQuantizationError:
    return UnsupportedQuantizationError(
        "Only an amax of a whole tensor, or one a row, goes to several Hugging Face names or comes from them.",
        [Offender(name, f"has shape {list(amax.shape)}: {why}")],
        "Calibrate the converted model's weights anew: max|W| of blocks needs no data.",
    )
