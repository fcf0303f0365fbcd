"""Second moments of what a model's linears multiply, in a file by the names of its export: for `verify --moments`.

The file is one of safetensors, with `<module>.input_moments` F32 [in] for each weight of the export that is quantized,
the mean square of each of its input channels over the data; `<module>[3].input_moments` for expert 3 in a tensor that
holds all experts of a layer. It belongs to the model as it is exported: after channels were folded, inputs are others.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from quantplug.atomic import write_atomically
from quantplug.calibration.inputs.linears import Linear, linears_of
from quantplug.calibration.inputs.moments import InputPolicy, Moments
from quantplug.calibration.inputs.plain_forward import unquantized_moments
from quantplug.calibration.inputs.sums import whole_columns
from quantplug.calibration.run import ForwardLoop
from quantplug.calibration.shared_amax import Axis
from quantplug.checkpoint.disk_errors import disk_errors
from quantplug.export.live_plan import PlannedExport
from quantplug.export.plan.types import PartOutput
from quantplug.mappings.table import ParamKey
from quantplug.megatron.agreement import all_or_none, gather_objects
from quantplug.megatron.parallel import current_topology


@torch.no_grad()
def write_input_moments(model: nn.Module, forward_loop: ForwardLoop, planned: PlannedExport, file: str | Path) -> None:
    """Runs data through a model and writes the second moments of its linears' inputs, by which `verify` weighs errors.

    Quantizers are off meanwhile. An expert that saw few tokens has the layer's beside its own, as in `weighted_mse`. A
    collective: all ranks must call it; the first one writes.

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
    moments = unquantized_moments(model, forward_loop, linears, InputPolicy())
    mine = dict(pair for one, found in zip(linears, moments, strict=True) for pair in _of_linear(one, found))
    # Vectors, and of each linear on one rank alone: little beside the model.
    by_key = {key: values for of_rank in gather_objects(mine) for key, values in of_rank.items()}

    def written() -> None:
        if current_topology().rank == 0:
            with disk_errors(Path(file)):
                write_atomically(Path(file), save(dict(_named(planned, by_key))))

    all_or_none(written)


def _of_linear(linear: Linear, moments: Moments) -> Iterator[tuple[ParamKey, torch.Tensor]]:
    """FP32 [in] of all ranks' channels, on the first of the ranks that hold a linear or its slices. A collective."""
    values = whole_columns(linear, moments.values)
    if all(group.rank() == 0 for axis, group in linear.axes.items() if axis is not Axis.EXPERT):
        for weight, of_weight in zip(linear.weights, values.float().cpu(), strict=True):
            yield weight.key, of_weight


def _named(planned: PlannedExport, by_key: Mapping[ParamKey, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for task in planned.plan.tasks:
        if (values := by_key.get(task.source.key)) is not None:
            for output in task.outputs:
                # Safetensors writes no tensor twice, however alike the inputs of gate and up are.
                yield f"{_module(output)}.input_moments", values.clone()


def _module(output: PartOutput) -> str:
    module = output.name.removesuffix(".weight")
    return module if output.placement is None else f"{module}[{output.placement.expert}]"
