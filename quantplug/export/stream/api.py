"""From a live Megatron-Core model to quantized Hugging Face tensors in memory: the refit of RL, without a disk."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from quantplug.errors import MappingError, Offender
from quantplug.export.plan.types import Held, QuantConfig, QuantizerState
from quantplug.export.sources.live import LiveWeights, Model, live_weights
from quantplug.export.sources.live_rows import LiveSource
from quantplug.export.stream.plan import PlannedStream, make_stream_plan
from quantplug.export.stream.request import AS_QUANTIZED, StreamRequest, refuse_adapters, with_arguments_of
from quantplug.export.stream.rounds import Delivery, Run, cut_into_runs
from quantplug.formats import TensorSpec
from quantplug.mappings.keys import ParamKey
from quantplug.megatron.agreement import all_or_none, collective_device
from quantplug.megatron.parallel import current_topology, process_groups

__all__ = ["AS_QUANTIZED", "StreamPlan", "export_hf_weights_quant", "plan_stream"]

# By weight: shape and dtype of this rank's tensor, its weight quantizer and the input quantizer of its linear.
_Portrait = dict[ParamKey, tuple[tuple[int, ...], torch.dtype, QuantizerState | None, QuantizerState | None]]


@dataclass(frozen=True, eq=False)
class StreamPlan:
    """Made once by `plan_stream`, and good for every step of a training.

    Attributes:
        model: The live model.
        stream: What is sent.
        runs: The weights, cut into rounds.
        delivery: How this rank takes part.
        portrait: What of the model must stay as it was.
        has_quantizers: Whether the amaxes of its quantizers are part of that.
    """

    model: Model
    stream: PlannedStream
    runs: tuple[Run, ...]
    delivery: Delivery
    portrait: _Portrait
    has_quantizers: bool

    @property
    def quant_config(self) -> QuantConfig | None:
        """What a server must be told of the tensors; None for plain weights, and where only the caller knows."""
        return self.stream.plan.quant_config

    def expected(self) -> dict[str, TensorSpec]:
        """Every tensor that a receiver gets, by name, in the order in which it comes."""
        parts = (part for task in self.stream.tasks for part in task.outputs)
        return {name: replace(spec, name=name) for name, spec in self.stream.outputs(parts)}

    def families(self) -> dict[str, int]:
        """For every tensor the number of the weight that it is made of; tensors of one follow each other."""
        units: dict[str, int] = {}
        return {
            name: units.setdefault(task.unit, len(units))
            for task in self.stream.tasks
            for name, _ in self.stream.outputs(task.outputs)
        }

    # Not under torch.no_grad: around a generator it keeps each tensor that is yielded until the next one is there.
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every (name, tensor) of the model as it is now: each weight and, right after it, its scales.

        All ranks must run through it to the end, those too that are no receivers and get nothing from it. Every
        tensor has memory of its own and no gradient graph; the model is not changed.

        Raises:
            MappingError: The model is no longer the one that was planned; or, at the end, tensors that did not come.
            WeightError: NaN or Inf in a weight, or a value beside which most others would be packed to zero.
            CalibrationError: A weight is larger than its calibrated amax (as_quantized).
            UnsupportedQuantizationError: quant_fn raised, or returned something else than when it was planned.
            RankLostError: A rank ended.
        """
        # Parameters are looked up anew at every run: an optimizer may have put other tensors in their place.
        source = LiveSource(all_or_none(self._held_now), self.delivery.dims)
        missing = dict.fromkeys(self.expected()) if self.delivery.rank in self.delivery.receivers else {}
        for run, bucket in self.delivery.rounds(self.runs, source):
            # A rank that is no receiver takes part in every round, and yields nothing.
            if missing:
                outputs = list(self.stream.outputs(part for _, part in run.parts))
                # A tied weight is given once under each of its names. Only the last time may its memory be given away.
                uses = Counter(spec.name for _, spec in outputs)
                for name, spec in outputs:
                    # A KeyError here would be a tensor that was not planned, or came twice.
                    missing.pop(name)
                    uses[spec.name] -= 1
                    yield name, bucket.tensor(spec.name, is_last_use=not uses[spec.name])
            del bucket  # Before the next one is packed.
        _refuse_missing(list(missing), self.delivery.rank)

    def _held_now(self) -> Held:
        """How to get each weight, provided that the model is still the one that was planned."""
        weights = live_weights(self.model)
        now = _portrait(weights, self.has_quantizers)
        # In both directions: what has gone, and what has come.
        changed = [key for key in {**self.portrait, **now} if now.get(key) != self.portrait.get(key)]
        if changed:
            raise MappingError(
                "The model is no longer the one that was planned.",
                [_changed(key, now, self.portrait) for key in changed],
                "Call plan_stream again after the model's parameters, or the amaxes of its quantizers, have changed.",
            )
        return {ref.key: ref for ref in weights.refs}


@with_arguments_of(StreamRequest)
def plan_stream(request: StreamRequest) -> StreamPlan:
    """Plans a stream that can then be run any number of times while the weights change. A collective of metadata.

    Takes the arguments of `export_hf_weights_quant`, and raises what is raised there at the call.
    """
    return _plan(request)


@with_arguments_of(StreamRequest)
def export_hf_weights_quant(request: StreamRequest) -> Iterator[tuple[str, torch.Tensor]]:
    """Streams a model's weights, quantized, as Hugging Face tensors: packed where they are, so that bits travel few.

    Two ways in. `quant_format` names a built-in format, for a model that need not be quantized: amaxes are those of the
    weights themselves, one for a fused weight (q, k and v; gate and up), over all slices. Or `quant_fn` quantizes, with
    the signature of Megatron-Bridge: it is given q, k, v, gate, up, ... one by one, as whole Hugging Face weights,
    unless its blocks do not straddle slices; then slices are quantized where they are, which a trial proves equal.

    Everything that can be wrong with the arguments or the model is raised here, not at the first tensor. All ranks must
    call it, and run through what it returns. For every step of a training: `plan_stream` once, then its `tensors()`.

    Args:
        model: A `GPTModel` or `HybridModel`, bare or wrapped (Float16Module, DDP), or the list of its virtual stages.
        pretrained_model_name_or_path: Directory or hub id of the Hugging Face model it was built from.
        quantization_checker: Whether to quantize a weight, by its global Megatron name, such as
            `decoder.layers.3.mlp.experts.linear_fc1.weight69`; None for all linears. Each rank is asked for its own
            weights; answers must agree, and be alike for all experts of a layer. It may leave linears out, not take in
            what servers load in high precision. With `quant_fn` it is asked for the
            embedding and the output layer too; for routers and norms never.
        quant_fn: (weight [out, in], quant_block_size) to (codes, scale).
        quant_block_size: Rows and columns of a block of `quant_fn`; None if it has no blocks.
        quant_format: w4a16_nvfp4, w8a16_fp8, fp8_blockwise, fp8_dynamic, mxfp8, int4: by the amaxes of the weights
            alone. as_quantized: as the model's ModelOpt quantizers say, with the amaxes that they hold.
        expert_format: With the name of a format: that of routed experts, where it is another one, such as w4a16_nvfp4
            beside mxfp8. One dialect must have names for both.
        group_size: With int4: how many input features share a scale, 128 (None) or 32.
        scales: With w4a16_nvfp4: how the scales of blocks are found, a `Scales` or its name: `max` (of the largest
            element), `four_over_six` or `mse` (the one with the least squared error).
        quantize_mtp: Whether linears of multi-token prediction are quantized too; they are kept in any case.
        quantize_lm_head: With the name of a format: whether the output layer is quantized too.
        preset: With a `quant_format`: which linears are quantized at all, as in `quantize_checkpoint`.
        scale_suffix: What a scale of `quant_fn` is called: this behind the weight's name.
        dtype: Type of tensors that are not quantized.
        moe_router_dtype: Type of the routers, None for `dtype`.
        trust_remote_code: Whether transformers may run code from the source to read its config.
        emit_tied: Whether a tied `lm_head.weight` is given too, behind the embedding and, like it, with its scale.
        receiver_ranks: The ranks that get the tensors; None for all.
        amax: With as_quantized, what becomes of a weight that training has moved beyond its calibrated amax:
            `calibrated`, an error, as its largest values would be clipped; `refresh`, the amaxes of all weights are
            those of the weights as they are, as with the other formats, and only inputs keep theirs; `clip`, it is
            clipped, as a fake-quantized forward does.
        bucket_bytes: Memory of a bucket; beyond the model there are two of them and the largest tensor. A `quant_fn`
            that must be given whole weights needs two copies of one, and what it uses itself, on top.
        unchecked_settings: Settings that are not held against the config, by the names that errors give them.
        vocab_size: Number of tokens that the model was trained with, so many rows of the embedding and the output layer
            are given; None for that of the config.
        drop_mtp: Whether layers of multi-token prediction are left out.
        dialect: How tensors are named and `quant_config` is spelled, where a format has several ways: a `DialectName`
            or its name. None takes what most servers read.

    Returns:
        An iterator over (name, tensor): each weight with its scales right after it, layer by layer; CPU tensors with
        gloo, CUDA tensors with NCCL. On a rank that is no receiver it yields nothing, and must be run through.

    Raises:
        SourceError: The source has no usable config.
        UnsupportedModelError: Its architecture is not supported, or it has LoRA adapters that are not merged.
        TopologyError: Megatron's groups are not initialized, receivers that are no ranks, or ranks that disagree.
        MappingError: The model is not the one that the config describes.
        ShapeError: Likewise by its shapes, or they do not divide as the format needs.
        ArgumentError: No format has the name in `quant_format`, no policy that in `amax`, or no dialect that in
            `dialect`; or the format has not the `scales`, or the model no experts for `expert_format`.
        UnsupportedQuantizationError: A format that quantizes activations, which needs data; arguments, checker or
            function that cannot be used, or quantizers that cannot be written.
        CalibrationError: Enabled quantizers without a usable amax (as_quantized); while it runs, before the first
            tensor, weights that have grown beyond it.
        WeightError: While it runs, before the first tensor: NaN or Inf in a weight, or a value beside which most
            others would be packed to zero.
    """
    return _plan(request).tensors()


def _plan(request: StreamRequest) -> StreamPlan:
    topology = current_topology()

    def check() -> None:
        request.check(topology)
        refuse_adapters(request.model)

    # Before the model is read: contradicting arguments are told of at once, on all ranks together.
    all_or_none(check)
    weights = all_or_none(lambda: live_weights(request.model))
    # A rank may hold no weight at all; its trials then run where its collectives do.
    device = next((ref.load().device for ref in weights.refs), collective_device())
    stream = make_stream_plan(request, topology, device)
    has_quantizers = request.as_quantized
    return StreamPlan(
        model=request.model,
        stream=stream,
        runs=tuple(cut_into_runs(stream.tasks, stream.plan.dims, request.bucket_bytes)),
        delivery=Delivery(
            stream.plan.dims,
            process_groups(),
            topology.rank,
            topology.world_size,
            request.receivers(topology),
            request.policy,
        ),
        portrait=_portrait(weights, has_quantizers),
        has_quantizers=has_quantizers,
    )


def _portrait(weights: LiveWeights, with_quantizers: bool) -> _Portrait:
    """Shapes, dtypes and quantizers of this rank's weights, which must stay as they were planned; values need not."""
    return {
        ref.key: (ref.shape, ref.dtype, *((ref.weight, ref.activation) if with_quantizers else (None, None)))
        for ref in weights.refs
    }


def _changed(key: ParamKey, now: _Portrait, planned: _Portrait) -> Offender:
    reasons = {(True, False): "is new", (False, True): "is gone"}
    reason = reasons.get((key in now, key in planned), "has another shape, dtype or quantizer")
    return Offender(key.name, reason, key.expert)


def _refuse_missing(names: Sequence[str], rank: int) -> None:
    if names:
        raise MappingError(
            "Tensors that were planned did not come.",
            [Offender(name, "is missing", rank=rank) for name in names],
            "Do not load what came: it is not the whole model.",
        )
