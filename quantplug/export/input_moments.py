"""Writes how large the inputs of a model's linears are, by the names of its export (`checkpoint/moments_file.py`)."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from quantplug.atomic import write_atomically
from quantplug.calibration.inputs.linears import Linear, linears_of
from quantplug.calibration.inputs.moments import InputPolicy, known_moments
from quantplug.calibration.inputs.plain_forward import run_unquantized
from quantplug.calibration.inputs.sketches import Sketches, sketch_of
from quantplug.calibration.inputs.sums import Squares, whole_columns
from quantplug.calibration.run import ForwardLoop
from quantplug.calibration.shared_amax import Axis
from quantplug.checkpoint.disk_errors import disk_errors
from quantplug.checkpoint.moments_file import MOMENTS, SKETCH, tensor_name, weight_name
from quantplug.export.live_plan import PlannedExport
from quantplug.export.plan.types import PartOutput
from quantplug.mappings.table import ParamKey
from quantplug.megatron.agreement import all_or_none, gather_on_first
from quantplug.megatron.parallel import current_topology

OfWeight = Mapping[str, torch.Tensor]
"""By the ends of their names."""


@torch.no_grad()
def write_input_moments(model: nn.Module, forward_loop: ForwardLoop, planned: PlannedExport, file: str | Path) -> None:
    """Runs data through a model and writes how large its linears' inputs are, by which `verify` weighs errors.

    Quantizers are off meanwhile. An expert that saw few tokens has the layer's beside its own, as in `weighted_mse`.
    The file has 68 bytes for each input channel of each weight, in the memory of the first rank too, which writes it.
    A collective: all ranks must call it.

    Args:
        model: A quantized Megatron model, as it is exported.
        forward_loop: Runs data through it; called once.
        planned: Of `plan_export`, for the names.
        file: Is written over.

    Raises:
        CalibrationError: Data that does not reach a linear or is not finite.
        WriteError: The file cannot be written.
    """
    linears = [one for one in linears_of(model) if any(weight.quantizer.is_enabled for weight in one.weights)]
    squares, sketches = Squares(linears), Sketches(linears)
    run_unquantized(model, forward_loop, linears, squares.take, sketches.take)
    of_squares = squares.reduced(linears)
    moments = known_moments(linears, of_squares, InputPolicy())
    sums = sketches.reduced(linears)
    mine: dict[ParamKey, OfWeight] = {}
    for linear, known, found, squared in zip(linears, moments, sums, of_squares, strict=True):
        mine.update(_of_linear(linear, known.values, sketch_of(linear, found, squared)))
    # Each linear is of one rank alone.
    by_key = {key: values for of_rank in gather_on_first(mine) for key, values in of_rank.items()}

    def written() -> None:
        if current_topology().rank == 0:
            with disk_errors(Path(file)):
                write_atomically(Path(file), save(dict(_named(planned, by_key))))

    all_or_none(written)


def _of_linear(linear: Linear, moments: torch.Tensor, sketches: torch.Tensor) -> Iterator[tuple[ParamKey, OfWeight]]:
    """Of all ranks' channels, on the first of the ranks that hold a linear or its slices. A collective."""
    whole_moments = whole_columns(linear, moments).float().cpu()
    whole_sketches = whole_columns(linear, sketches.flatten(0, 1)).bfloat16().cpu().unflatten(0, sketches.shape[:2])
    if all(group.rank() == 0 for axis, group in linear.axes.items() if axis is not Axis.EXPERT):
        for weight, of_moments, of_sketch in zip(linear.weights, whole_moments, whole_sketches, strict=True):
            yield weight.key, {MOMENTS: of_moments, SKETCH: of_sketch}


def _named(planned: PlannedExport, by_key: Mapping[ParamKey, OfWeight]) -> Iterator[tuple[str, torch.Tensor]]:
    for task in planned.plan.tasks:
        for output in task.outputs:
            for end, values in by_key.get(task.source.key, {}).items():
                # Safetensors writes no tensor twice, however alike the inputs of gate and up are.
                yield tensor_name(_weight(output), end), values.clone()


def _weight(output: PartOutput) -> str:
    expert = None if output.placement is None else output.placement.expert
    return weight_name(output.name.removesuffix(".weight"), expert)
