"""Calibration by maximum, and what linears multiply in the same run of the data."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

from torch import nn

from quantplug.calibration.algorithms.targets import require_data, targets
from quantplug.calibration.inputs.linears import Linear
from quantplug.calibration.inputs.moments import InputPolicy, Moments, known_moments
from quantplug.calibration.inputs.rows import watching
from quantplug.calibration.inputs.sums import BlockProductsAndTotals, Squares
from quantplug.calibration.run import ForwardLoop, max_calibrate
from quantplug.megatron.agreement import all_or_none
from quantplug.megatron.releases.mtp import without_labels

Sums = TypeVar("Sums", Squares, BlockProductsAndTotals)


def seen(
    model: nn.Module,
    forward_loop: ForwardLoop | None,
    method: str,
    sums: Callable[[Sequence[Linear]], Sums],
    policy: InputPolicy,
    distributed_sync: bool | None,
    options: Mapping[str, Any],
) -> tuple[list[Linear], list[Moments], Sums]:
    """The linears whose scales are to be found, calibrated by maximum, the moments of their inputs, and the sums.

    A collective.

    Args:
        model: Quantized, its weights in static NVFP4 blocks.
        forward_loop: Runs calibration data through the model; once, with `skip_forward_without_activation_calib` too.
        method: Of `mtq.quantize`, for messages.
        sums: Makes what rows are added up in.
        policy: What is taken for the inputs of experts that saw few tokens.
        distributed_sync: As ModelOpt's `max`.
        options: Of ModelOpt's `max`.

    Raises:
        CalibrationError: No data, data that does not reach a linear or is not finite; or as `calibrate`.
        UnsupportedQuantizationError: A weight of another format.
    """
    require_data(forward_loop, method)
    assert forward_loop is not None
    linears = all_or_none(lambda: targets(model, method))
    added, loops = sums(linears), 0

    def loop(module: nn.Module) -> None:
        nonlocal loops
        loops += 1
        with watching(linears, added.take) if loops == 1 else nullcontext():
            forward_loop(module)

    max_calibrate(model, loop, distributed_sync, **options)
    if not loops:
        with without_labels([model]):
            all_or_none(lambda: loop(model))
    return linears, known_moments(linears, added.reduced(linears), policy), added
