"""What a stream will send: the plan of an export to disk, with the caller's quantization in place of the model's."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from quantplug.choices import Preset
from quantplug.export.asked_formats import require_experts
from quantplug.export.live_plan import PlannedExport, plan_export
from quantplug.export.plan.quantizers.scheme import quantizers_for
from quantplug.export.plan.types import ExportPlan, ExportTask, PartOutput, WholeWeight
from quantplug.export.stream.checker import chosen_weights, refuse_widened
from quantplug.export.stream.quant_fn import QuantFn, QuantFunction
from quantplug.export.stream.request import StreamRequest
from quantplug.formats import TensorSpec, WeightFormat
from quantplug.formats.names import Scheme
from quantplug.formats.search.candidates import Scales
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.rows import Role
from quantplug.mappings.table import Family
from quantplug.megatron.agreement import all_or_none, require_same
from quantplug.selection.advice import by_checker
from quantplug.selection.output_layer import require_output_layer
from quantplug.selection.policy import Kept, Policy, refuse_nothing
from quantplug.topology import ParallelTopology


@dataclass(frozen=True)
class PlannedStream:
    """What is sent, and in which order.

    Attributes:
        plan: The plan of an export to disk that it was made from: sizes, excluded modules, config.
        aliases: Names of weights that are given again, with the names that they have then.
    """

    plan: ExportPlan
    tasks: tuple[ExportTask, ...]
    aliases: Mapping[str, tuple[str, ...]]

    def outputs(self, parts: Iterable[PartOutput]) -> Iterator[tuple[str, TensorSpec]]:
        """What a receiver is given for some of the parts: (its name, the tensor that it is).

        A weight, its scales, then the same once more under the name of a weight that is tied to it.
        """
        for part in parts:
            if part.placement is not None and part.placement.expert > 0:
                continue  # The first expert stands for the tensors of all.
            yield from ((spec.name, spec) for spec in part.tensors)
            for alias in self.aliases.get(part.name, ()):
                for spec in part.tensors:
                    yield f"{alias}{spec.name.removeprefix(part.name)}", spec

    def digest(self) -> str:
        """SHA-256, in hex, of all that ranks must agree on before one sends a byte: owners, shapes, types, names."""
        # Formats by name: a function of the caller's is another object on each rank.
        sent = [
            (task.owner, task.ranks, task.gather_first, part.shape, part.tensors, part.placement, _name(part.format))
            for task in self.tasks
            for part in task.outputs
        ]
        return hashlib.sha256(repr((sent, sorted(self.aliases.items()))).encode()).hexdigest()


def make_stream_plan(request: StreamRequest, topology: ParallelTopology, device: torch.device) -> PlannedStream:
    """Plans a stream. A collective of metadata.

    Args:
        device: Where the model's weights are, for trials of `quant_fn`.

    Raises:
        QuantplugError: As `export_hf_weights_quant` says.
    """
    planned = plan_export(
        request.model,
        request.pretrained_model_name_or_path,
        dtype=request.dtype,
        moe_router_dtype=request.moe_router_dtype,
        trust_remote_code=request.trust_remote_code,
        calibrated=request.as_quantized,
        unchecked_settings=request.unchecked_settings,
        vocab_size=request.vocab_size,
        drop_mtp=request.drop_mtp,
        dialect=request.dialect,
        with_passthrough=False,  # A receiver has what never changes.
        leave_out=None if request.as_quantized else by_checker,
        # None leaves the model's own quantizers in force. In all other cases they are not looked at, so that a model
        # that was never quantized can be streamed.
        requantize=None
        if request.as_quantized
        else lambda weights, family: _requantized(weights, family, request, topology.rank),
    )
    tasks = planned.plan.tasks
    if request.quant_fn is not None:
        tasks = _with_quant_fn(tasks, planned.plan.dims, request.quant_fn, request, topology.rank, device)
    aliases = _aliases(planned, tasks, request.emit_tied)
    # Copies are given under another name from the same bytes (`aliases`), and are not sent twice.
    stream = PlannedStream(planned.plan, tuple(replace(task, duplicates=()) for task in tasks), aliases)
    require_same(
        f"{stream.digest()} {request.receivers(topology)}",
        "stream",
        "Call with the same arguments on all ranks, and with a quant_fn that depends on its arguments alone.",
    )
    return stream


def _name(packing: WeightFormat | None) -> str | None:
    return None if packing is None else packing.name


def _requantized(
    weights: Sequence[WholeWeight], family: Family, request: StreamRequest, rank: int
) -> Sequence[WholeWeight]:
    """The weights with quantizers of the built-in formats where they are wanted, and none elsewhere."""
    # Formats of a stream are made of the weights alone: what the model's quantizers say is left out.
    plain = [replace(weight, weight=None, activation=None, unquantized=None) for weight in weights]
    formats = request.formats
    if formats is None:
        return plain
    policy = Policy.of(
        formats.linears, request.quantize_mtp, request.named_preset, quantize_lm_head=request.quantize_lm_head
    )
    decisions = formats.decide((weight.key for weight in plain), family, policy)
    has_experts = any(key.expert is not None for key in decisions)
    tied = all(it.row.role is not Role.OUTPUT_LAYER for it in decisions.values())

    def check() -> None:
        require_experts(request.expert_format, has_experts=has_experts)
        require_output_layer(quantize_lm_head=request.quantize_lm_head, tied=tied)
        refuse_nothing(decisions)

    all_or_none(check)
    askable = {Role.LINEAR, Role.OUTPUT_LAYER} if request.quantize_lm_head else {Role.LINEAR}
    linears = {key: it for key, it in decisions.items() if it.row.role in askable}
    asked = [weight for weight in plain if weight.key in linears]
    # The checker is asked for linears alone: routers and norms are no question.
    chosen = _chosen(asked, lambda weight: linears[weight.key].kept, request, rank)
    scales = request.found_scales
    return [_quantized(weight, formats.of(weight.key), scales) if weight.key in chosen else weight for weight in plain]


def _quantized(weight: WholeWeight, scheme: Scheme, scales: Scales) -> WholeWeight:
    found = scales if scheme.weight.encoding.can_search else Scales.MAX
    quantizer, activation = quantizers_for(scheme, weight.key.name, found)
    return replace(weight, weight=quantizer, activation=activation)


def _chosen(
    asked: Sequence[WholeWeight],
    why_kept: Callable[[WholeWeight], Kept | None],
    request: StreamRequest,
    rank: int,
) -> frozenset[ParamKey]:
    """Of some weights those that are quantized: what the checker wants, which may be less than the policy, never more.

    Without a checker nobody has asked for what the policy keeps, so that it simply stays as it is.
    """
    checker = request.quantization_checker
    wanted = None if checker is None else chosen_weights(asked, checker, rank)
    weights = [weight for weight in asked if wanted is None or weight.key in wanted]
    kept = all_or_none(lambda: {weight.key: found for weight in weights if (found := why_kept(weight)) is not None})
    if checker is not None:
        refuse_widened(kept)
    return frozenset(weight.key for weight in weights) - kept.keys()


def _with_quant_fn(
    tasks: Sequence[ExportTask],
    dims: ModelDimensions,
    quant_fn: QuantFn,
    request: StreamRequest,
    rank: int,
    device: torch.device,
) -> tuple[ExportTask, ...]:
    """The tasks of plain weights, those that are wanted quantized by the caller's function."""
    asked = request.quantization_checker is not None
    by_key = {
        task.source.key: task
        for task in tasks
        if task.mapping.role is Role.LINEAR or (asked and task.mapping.role.is_of_vocabulary)
    }
    # One for each dtype: what the function gives may depend on it, and is tried on the dtype that it will meet.
    functions = {
        dtype: QuantFunction(quant_fn, request.quant_block_size, dtype, device)
        for dtype in {task.source.dtype for task in by_key.values()}
    }

    def why_kept(weight: WholeWeight) -> Kept | None:
        task = by_key[weight.key]
        if task.mapping.role.is_of_vocabulary:
            return None  # Whoever brings a function has a reader of his own, and has asked for it by name.
        bits = functions[weight.dtype].weight_bits(task.outputs[0].shape)
        # What his function loses is his to judge.
        return Policy(bits, request.quantize_mtp, preset=Preset.ALL).why_kept(task.mapping)

    chosen = _chosen([task.source for task in by_key.values()], why_kept, request, rank)
    # Each new shape is a trial of the caller's function, which may raise on one rank alone.
    return all_or_none(
        lambda: tuple(
            _task_with(task, functions[task.source.dtype], request.scale_suffix, dims)
            if task.source.key in chosen
            else task
            for task in tasks
        )
    )


def _task_with(task: ExportTask, function: QuantFunction, suffix: str, dims: ModelDimensions) -> ExportTask:
    """The task of a plain weight with the caller's function for a format, but for parts that stay plain in any case."""
    outputs = tuple(
        part if pattern in task.mapping.high_precision else _part_with(part, function, suffix)
        for pattern, part in zip(task.mapping.hf, task.outputs, strict=True)
    )
    # Unless slices have been proved to give the same, the function is given whole weights. Never some rows of one:
    # nobody knows over which of them it takes a scale, hence no row_step.
    gather_first = len(task.ranks) > 1 and not _packs_apart(task, function, dims)
    return replace(task, format=function, gather_first=gather_first, row_step=None, outputs=outputs)


def _part_with(part: PartOutput, function: QuantFunction, suffix: str) -> PartOutput:
    codes, scale = (_stored(part, tensor) for tensor in function.outputs(part.shape))
    tensors = (replace(codes, name=part.name), replace(scale, name=f"{part.name}{suffix}"))
    return replace(part, tensors=tensors, format=function)


def _stored(part: PartOutput, tensor: TensorSpec) -> TensorSpec:
    """The tensor as a receiver gets it: that of all experts where they are one tensor, each with a scale of its own."""
    return tensor if part.placement is None else replace(tensor, shape=part.placement.stored_shape(tensor.shape))


def _packs_apart(task: ExportTask, function: QuantFunction, dims: ModelDimensions) -> bool:
    """Whether every slice of every part can be quantized where it is."""
    axis, slices = task.mapping.layout.shard_axis, len(task.ranks)
    rows = sum(part.shape[0] for part in task.outputs)
    if axis is None or rows != task.source.shape[0]:
        return False  # Padding rows of the vocabulary would count in the scale of the last block.
    cleanly = task.mapping.layout.cuts_cleanly(slices, dims)
    return cleanly and all(function.packs_apart(part.shape, axis, slices) for part in task.outputs)


def _aliases(planned: PlannedExport, tasks: Sequence[ExportTask], tied: bool) -> dict[str, tuple[str, ...]]:
    """Every weight that is given again: its copies, and with `tied` the name of another that is tied to it."""
    names = {part.name for task in tasks for part in task.outputs}
    aliases = {task.outputs[0].name: tuple(copy.name for copy in task.duplicates) for task in tasks if task.duplicates}
    for name, source in planned.family.tied.items() if tied else ():
        # An output layer that is a tensor of its own is sent as one, whatever the config ties.
        if name not in names:
            aliases[source] = (*aliases.get(source, ()), name)
    return aliases
