"""Calibrates a quantized model: ModelOpt collects; here tokens are counted, cold experts judged, amaxes reduced."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import modelopt.torch.quantization as mtq
from modelopt.torch.quantization import model_calib
from torch import nn

from quantplug.calibration.algorithms.static_slices import slices_are_calibrated
from quantplug.calibration.finite import require_finite_weights
from quantplug.calibration.policy import (
    CalibrationPolicy,
    ColdExperts,
    ExpertWeights,
    apply_to_cold_experts,
    refuse_weight_only_fallback,
)
from quantplug.calibration.progress import reporting
from quantplug.calibration.quantizers import quantized_roots
from quantplug.calibration.shared_amax import plan_reductions
from quantplug.calibration.stand_in import take_input_amaxes
from quantplug.calibration.sync import synchronize
from quantplug.calibration.tokens import ExpertLayer, LayerTokens, TokenCounter, expert_layers
from quantplug.megatron.agreement import all_or_none
from quantplug.megatron.parameters import refuse_sharded
from quantplug.megatron.releases.mtp import without_labels
from quantplug.progress import Progress

Model = nn.Module | Sequence[nn.Module]
ForwardLoop = Callable[[Any], None]

# ModelOpt's own synchronization gathers objects for every quantizer and group (model_calib.py, `max_calibrate`), which
# grows with layers times experts. `synchronize` does it in one bucket an axis.
_COLLECT = {"method": "max", "distributed_sync": False}


@dataclass(frozen=True)
class CalibrationRecord:
    """What calibration saw of the routed experts, which the model itself does not keep.

    Attributes:
        tokens: Global layer to its experts' tokens over all ranks, for the layers that this rank holds; empty without
            data. Layers of multi-token prediction are counted on after the decoder's.
        fallback: (global layer, global expert) of every expert whose input amax is its layer's largest.
    """

    tokens: Mapping[int, LayerTokens] = field(default_factory=dict)
    fallback: frozenset[tuple[int, int]] = frozenset()


def calibrate(
    model: Model,
    forward_loop: ForwardLoop | None = None,
    policy: CalibrationPolicy | None = None,
    progress: Progress | None = None,
    *,
    stand_in: Model | None = None,
) -> CalibrationRecord:
    """Gives every quantizer that `mtq.quantize(model, {**config, "algorithm": None})` placed its amax, by maximum.

    A collective: all ranks must call it. The number of its collectives, beside those of the forward loop, does not
    depend on the model (`sync`, `tokens`).

    Args:
        model: A quantized model, bare or wrapped since (Float16Module, DDP), or the list of them that virtual
            pipelining makes.
        forward_loop: Runs calibration data through the model that it is given (the list under virtual pipelining), the
            layers of multi-token prediction too; without labels. None calibrates the weights alone.
        policy: The choices; by default every expert has its own weight amax, and a cold expert is an error.
        progress: Called as ("Calibrating", done, total) over the weights that this rank holds, before any data.
        stand_in: Where the model has no forward, as Transformer Engine's modules without a GPU: a model of the same
            weights, layout and config of quantizers that has one, such as `LayerSpec.LOCAL` in FP32 (its forward runs
            inside `quantplug.megatron.cpu.local_forward()`). The data run through it, and its inputs' amaxes are taken.

    Returns:
        What `gather_statistics` shows of tokens and fallbacks.

    Raises:
        CalibrationError: An expert saw no token under the policy `error`; or an amax is missing or not a finite number
            of at least zero; or the stand-in has not the quantizers of the model. On all ranks.
        WeightError: A weight to quantize holds NaN or Inf; named by global layer and expert, all at once.
        UnsupportedQuantizationError: The policy `weight_only_fallback` does not go with a format of the model.
    """
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    policy = policy or CalibrationPolicy()
    if stand_in is not None and forward_loop is not None:
        _refuse_fallback(policy, expert_layers(chunks))
        record = calibrate(stand_in, forward_loop, policy)
        others = [stand_in] if isinstance(stand_in, nn.Module) else list(stand_in)
        all_or_none(lambda: take_input_amaxes(chunks, others))
        calibrate(model, None, policy, progress)
        return record
    # ModelOpt calibrates nothing but the very module that it has quantized, which a trainer may have wrapped since.
    roots = list(quantized_roots(chunks)) or chunks

    def collect(loop: ForwardLoop | None) -> None:
        with reporting(chunks, progress) if progress else nullcontext():
            _collect(roots, None if loop is None else lambda: loop(model))

    return _calibrate(chunks, collect, forward_loop, policy, strict=True)


def max_calibrate(
    model: nn.Module,
    forward_loop: ForwardLoop | None = None,
    distributed_sync: bool | None = True,
    sync_expert_weight_amax: bool = False,
    **options: Any,
) -> None:
    """Stands for ModelOpt's calibration of the same name and arguments: its collection, and our reductions.

    An activation that saw no data on any rank stays without an amax, as in ModelOpt. `sync_expert_weight_amax` is the
    policy `shared`.

    Raises:
        CalibrationError: As `calibrate`.
    """

    def collect(loop: ForwardLoop | None) -> None:
        with slices_are_calibrated():
            model_calib.max_calibrate(model, loop, distributed_sync=False, **options)

    if not distributed_sync:
        with slices_are_calibrated():
            model_calib.max_calibrate(
                model, forward_loop, distributed_sync=False, sync_expert_weight_amax=sync_expert_weight_amax, **options
            )
        return
    weights = ExpertWeights.SHARED if sync_expert_weight_amax else ExpertWeights.PER_EXPERT
    _calibrate([model], collect, forward_loop, CalibrationPolicy(weights), strict=False)


def _calibrate(
    chunks: Sequence[nn.Module],
    collect: Callable[[ForwardLoop | None], None],
    forward_loop: ForwardLoop | None,
    policy: CalibrationPolicy,
    *,
    strict: bool,
) -> CalibrationRecord:
    def look() -> None:
        refuse_sharded(chunks)
        require_finite_weights(chunks)

    # ModelOpt would stop at the first NaN, on the rank that has it, while the others went on into a collective.
    all_or_none(look)
    layers = expert_layers(chunks)
    with_data = forward_loop is not None
    # Known before any data has run, and so said before the data has cost an hour.
    if with_data:
        _refuse_fallback(policy, layers)
    counter = TokenCounter(layers)
    # Without labels, since Megatron asks for them wherever it predicts several tokens, and calibration data has none.
    with counter.counting() if with_data else nullcontext(), without_labels(chunks):
        all_or_none(lambda: collect(forward_loop))
    # Summed over ranks first: an expert that is cold on this rank's data may have seen another's.
    tokens = counter.reduced() if with_data else []
    fallback: frozenset[tuple[int, int]] = frozenset()
    if with_data:
        fallback = all_or_none(lambda: apply_to_cold_experts(policy.cold_experts, layers, tokens))
    # After the policy, which may have turned quantizers off: these must not wait for an amax.
    plan = all_or_none(lambda: plan_reductions(chunks, policy.expert_weights))
    synchronize(plan, require_activations=strict and with_data)
    return CalibrationRecord({counted.layer: counted for counted in tokens}, fallback)


def _refuse_fallback(policy: CalibrationPolicy, layers: Sequence[ExpertLayer]) -> None:
    if policy.cold_experts is ColdExperts.WEIGHT_ONLY_FALLBACK:
        all_or_none(lambda: refuse_weight_only_fallback(layers))


def _collect(chunks: Sequence[nn.Module], run: Callable[[], None] | None) -> None:
    """Runs ModelOpt's collection in all chunks at the same time. Forwards of `run` are what they collect from.

    Args:
        run: Runs the calibration data once through the whole model; None calibrates the weights alone.
    """
    # Under virtual pipelining one forward runs through all chunks, and ModelOpt collects in one model during one call.
    # So the call of the next chunk is nested in the data of this one, and the innermost runs the real data.
    first, *rest = chunks

    def forward(_: nn.Module) -> None:
        if rest:
            _collect(rest, run)
        elif run is not None:
            run()

    # Weights alone need no forward, and so no nesting.
    if run is None:
        for chunk in chunks:
            mtq.calibrate(chunk, _COLLECT)
    else:
        mtq.calibrate(first, _COLLECT, forward)
