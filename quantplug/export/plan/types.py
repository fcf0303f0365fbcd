"""The types that flow through an export: where a weight lives, what becomes of it, and the plan that says so."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from quantplug.formats import TensorSpec, WeightFormat
from quantplug.formats.names import Scheme
from quantplug.formats.search.candidates import BY_MAX, ScaleSearch
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.rows import Placement, WeightMapping
from quantplug.topology import Shard, ShardAxis


@dataclass(frozen=True)
class QuantizerState:
    """What one calibrated quantizer says, as plain data: the plan needs no ModelOpt to read it.

    Attributes:
        name: The quantizer's name in the model, for messages.
        num_bits: (exponent, mantissa) of a float format, or a number of integer bits.
        block_sizes: (axis, block size) pairs, such as ((-1, 16),), None being all of an axis; empty for one scale a
            tensor.
        scale_bits: (exponent, mantissa) of the block scales; None where they stay FP32.
        dynamic_blocks: Whether the block scales are made when a tensor is quantized, not in calibration.
        axis: Axes with a scale of their own; None for one scale a tensor.
        amax: Largest |value| seen in calibration, over all blocks if it has blocks; None if not calibrated.
        unsupported: Features switched on that no output format expresses, such as `pre_quant_scale`.
        dynamic: Whether its scales are made of each tensor that it sees, so that it needs no amax.
        search: How the scales of blocks are found: of their amaxes, by error, or by the quantizer already.
    """

    name: str
    num_bits: int | tuple[int, int]
    block_sizes: tuple[tuple[int, int | None], ...] = ()
    scale_bits: tuple[int, int] | None = None
    dynamic_blocks: bool = False
    axis: int | tuple[int, ...] | None = None
    amax: float | None = None
    unsupported: tuple[str, ...] = ()
    dynamic: bool = False
    search: ScaleSearch = BY_MAX


def not_here() -> torch.Tensor:
    """The `load` of a weight that another rank holds."""
    raise AssertionError("this rank does not hold the weight")


@dataclass(frozen=True)
class Unquantized:
    """That a weight's linear has no weight quantizer, not even a disabled one: no rule of a config was asked of it.

    Attributes:
        chunk: Which virtual pipeline stage of its rank it is in.
        whole_chunk: Whether nothing of that has quantizers.
    """

    chunk: int
    whole_chunk: bool


@dataclass(frozen=True)
class WeightRef:
    """What one rank holds of one weight, and how to get it.

    Attributes:
        shape: Shape of this rank's tensor.
        shard: The part of the whole parameter that this rank holds; None if it holds all of it.
        load: Returns the tensor, on whatever device it lives; never a copy that outlives the caller's use.
        weight: Its weight quantizer, None if it has none or a disabled one.
        activation: The input quantizer of its linear, None if it has none or a disabled one.
        zero_centred: Of a norm's weight, whether the norm multiplies with 1 + weight; None for all others.
        unquantized: Said of a weight without a weight quantizer; None where it has one.
        group_amaxes: Returns the amaxes that its quantizer holds of single groups; None where it holds none or one.
    """

    key: ParamKey
    shape: tuple[int, ...]
    dtype: torch.dtype
    shard: Shard | None
    load: Callable[[], torch.Tensor]
    weight: QuantizerState | None = None
    activation: QuantizerState | None = None
    zero_centred: bool | None = None
    unquantized: Unquantized | None = None
    group_amaxes: Callable[[], torch.Tensor] | None = None


Held = Mapping[ParamKey, WeightRef]
"""Every weight of which this rank holds a slice, or all, by its key."""


ON_ONE_RANK = ((0,),)
"""The `replicas` of all weights where one process holds everything, as it does a checkpoint on disk."""


@dataclass(frozen=True)
class WholeWeight:
    """A weight of the model, and which ranks can deliver it.

    Attributes:
        shape: Shape of the whole parameter.
        axis: The parallel dimension that cuts it into slices; None for a weight that each of its ranks holds whole.
        replicas: Groups of ranks that each hold all of it, in slice order.
        weight: Its weight quantizer, with the largest amax over all ranks; None if it is not quantized.
        activation: The input quantizer of its linear, likewise.
        source_names: What its tensors are called where they come from; empty where that is its name in the model.
        zero_centred: Of a norm's weight, whether the norm multiplies with 1 + weight; None for all others, and where
            the values are those of the family.
        part_dtypes: Types of its parts, where they are of several; `dtype` holds the values of all of them then.
        packed_as: Formats in which the source holds its parts already, None for those that it holds otherwise; empty
            where no part is.
        unquantized: Said of a weight without a weight quantizer on some rank; None where all have one, or could not.
    """

    key: ParamKey
    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: ShardAxis | None = None
    replicas: tuple[tuple[int, ...], ...] = ON_ONE_RANK
    weight: QuantizerState | None = None
    activation: QuantizerState | None = None
    source_names: tuple[str, ...] = ()
    zero_centred: bool | None = None
    part_dtypes: tuple[torch.dtype, ...] = ()
    packed_as: tuple[WeightFormat | None, ...] = ()
    unquantized: Unquantized | None = None

    @property
    def label(self) -> str:
        """The name that a user finds in the source, for messages."""
        return " and ".join(self.source_names) or self.key.name

    @property
    def rank(self) -> int:
        """A rank that holds it, for messages."""
        return self.replicas[0][0]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Constant:
    """A tensor that is made of no row of a weight, and known in the plan: the scale of a linear's input, for example.

    Attributes:
        values: Its elements, row after row; each is one of `spec.dtype`.
    """

    spec: TensorSpec
    values: tuple[float, ...]

    def data(self) -> torch.Tensor:
        """The tensor itself, on the CPU."""
        return torch.tensor(self.values, dtype=self.spec.dtype).reshape(self.spec.shape)


@dataclass(frozen=True)
class PartOutput:
    """One Hugging Face weight of a task and the tensors it becomes on disk.

    Attributes:
        name: Hugging Face name of the plain weight, such as `model.layers.0.self_attn.q_proj.weight`.
        shape: Its shape before packing; of one expert's slice where the tensors hold all experts of a layer.
        tensors: What is written for it, in this order: first what is packed of its rows, then `constants`.
        format: How it is packed; None for a plain tensor.
        placement: Where the slice lies in those tensors; None if they are all its own.
        constants: Those of the tensors that are made of no row, as far as their values are known: the scale of a
            linear's input is not before calibration.
        as_stored: Whether the source holds it in this very format, so that its codes and scales are written as they
            are: decoded and packed anew, most of them would come out as others.
        reciprocals: Names of those of which 1 / value is written, of the scale without axes that the format makes.
    """

    name: str
    shape: tuple[int, ...]
    tensors: tuple[TensorSpec, ...]
    format: WeightFormat | None = None
    placement: Placement | None = None
    constants: tuple[Constant, ...] = ()
    reciprocals: frozenset[str] = frozenset()
    as_stored: bool = False

    @property
    def plain_dtype(self) -> torch.dtype | None:
        """Type on disk of a part that is not packed; None for one that is."""
        return self.tensors[0].dtype if self.format is None else None

    def nbytes(self, spec: TensorSpec) -> int:
        """Bytes that are written for it of one of its tensors."""
        if self.placement is None:
            return spec.nbytes
        if self.placement.is_shared(spec.shape):  # A scale of all experts is written with the first of them.
            return spec.nbytes if self.placement.expert == 0 else 0
        # Experts of a tensor are slices of one size along its first axis.
        return spec.nbytes // self.placement.experts


@dataclass(frozen=True)
class ExportTask:
    """One weight's way from Megatron to Hugging Face.

    Attributes:
        mapping: The row that says what is written.
        stored: The row that says how a plain checkpoint holds it; another one only where a quantized one holds it
            otherwise, or where servers know another name.
        ranks: The ranks that deliver it, in slice order.
        owner: The one of them that writes it.
        gather_first: Whether its slices are put together before they are packed, because a block or a head straddles
            them; otherwise every rank packs its own slice and only packed bytes travel.
        scheme: How its linear is quantized; None if it stays plain, or a function of the caller's packs it.
        format: How its parts are packed, but for those that stay plain; None if all do.
        amax: Calibrated amax of the weight. All parts (gate and up; q, k and v) share it, and so one `weight_scale_2`.
        row_step: Rows of a part can be packed apart from the others in multiples of this many; None if only all of them
            give the part's bytes.
        outputs: The parts, in the order of the layout.
        duplicates: Outputs that hold the same as the one part, under other names.
        scale_group: Name of the weights that it shares its amax with; None if it is alone.
    """

    source: WholeWeight
    mapping: WeightMapping
    stored: WeightMapping
    ranks: tuple[int, ...]
    owner: int
    # Decided once, in the plan: every rank must know whether rows or packed bytes will travel, as the sizes of a
    # collective follow from it.
    gather_first: bool
    scheme: Scheme | None
    format: WeightFormat | None
    amax: float | None
    # Of the format, not of the layout: 16 columns share a scale of NVFP4, any rows can be parted; FP8 blocks part at
    # 128.
    row_step: int | None
    outputs: tuple[PartOutput, ...]
    duplicates: tuple[PartOutput, ...] = ()
    scale_group: str | None = None

    @property
    def unit(self) -> str:
        """Name of the weight it writes to: tasks of experts in one tensor have the same."""
        return self.outputs[0].name

    @property
    def has_given_scales(self) -> bool:
        """Whether its weight's quantizer has scales of blocks already, which its parts are packed by."""
        return self.scheme is not None and self.source.weight is not None and self.source.weight.search.is_given

    @property
    def all_outputs(self) -> tuple[PartOutput, ...]:
        """Everything that is written for it."""
        return (*self.outputs, *self.duplicates)


@dataclass(frozen=True)
class TensorRows:
    """Consecutive rows of an output tensor: what the pipeline hands to a sink.

    Attributes:
        name: Name of the tensor on disk.
        first: Index in the whole tensor of the first row; 0 for a tensor without axes.
        data: The rows [rows, ...] in the tensor's own dtype, contiguous; or all of a tensor without axes.
    """

    name: str
    first: int
    data: torch.Tensor


Schemes = Mapping[ParamKey, Scheme]
"""How each quantized weight is; plain ones are not in it."""


@dataclass(frozen=True)
class QuantConfig:
    """The two config files that tell a server how to read the checkpoint.

    Attributes:
        algorithm: Short name for tables and messages, such as `W4A16_NVFP4`.
        config_json: `quantization_config` of config.json.
        hf_quant_config: hf_quant_config.json, for the schemas that have it.
    """

    algorithm: str
    config_json: Mapping[str, Any]
    hf_quant_config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ShardFile:
    """One safetensors file of the output.

    Attributes:
        owners: The ranks that write it: one, or those that own experts of tensors that hold all experts of a layer. The
            first of them makes it and gives it its final name.
        tensors: Names of its tensors. All tensors of a weight are in one file.
    """

    name: str
    owners: tuple[int, ...]
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class ExportPlan:
    """The waist of an export: everything that will be written is known here, and nothing has been yet.

    Attributes:
        dims: Sizes of the model, for the layouts.
        exclude_modules: Hugging Face names of the linear modules that stay unquantized.
        quant_config: None for an export without quantization.
        files: What goes where.
        digest: SHA-256 over names, shapes, dtypes, scales and config: two plans with one digest write the same files.
    """

    tasks: tuple[ExportTask, ...]
    dims: ModelDimensions
    exclude_modules: tuple[str, ...]
    quant_config: QuantConfig | None
    files: tuple[ShardFile, ...]
    # Compared by all ranks before a byte moves, and by a resumed export with what an earlier one left.
    digest: str

    def with_amaxes(self, amaxes: Mapping[ParamKey, float]) -> "ExportPlan":
        """The same plan with other calibrated amaxes, for those weights of which one is given.

        A rank must give the amax of every weight of which it delivers a slice, as its scale is made there.
        """
        tasks = tuple(
            replace(task, amax=amaxes[task.source.key]) if task.source.key in amaxes else task for task in self.tasks
        )
        # The digest changes with the amaxes: files that an earlier run finished have scales of other ones, and a
        # resumed export must not mix the two.
        known = sorted((key.name, amax) for key, amax in amaxes.items())
        digest = hashlib.sha256(f"{self.digest} {known}".encode()).hexdigest()
        return replace(self, tasks=tasks, digest=digest)

    def expected(self) -> dict[str, TensorSpec]:
        """Every tensor that must be on disk afterwards, by name."""
        return {spec.name: spec for task in self.tasks for part in task.all_outputs for spec in part.tensors}
