"""Weights with NaN or Inf, all named before ModelOpt's collection ends at the first, on the rank that has it alone."""

from collections.abc import Sequence

import torch
from torch import nn

from quantplug.calibration.quantizers import weights_to_calibrate
from quantplug.errors import Offender, WeightError
from quantplug.formats import first_nonfinite
from quantplug.mappings.keys import ParamKey
from quantplug.megatron.parameters import LanguageModel, iter_parameters


def require_finite_weights(chunks: Sequence[nn.Module]) -> None:
    """Refuses weights to calibrate that hold NaN or Inf. No collective.

    Args:
        chunks: A quantized model's virtual pipeline stages on this rank. Weights of a Megatron model are named with
            global layers and experts; those of any other module as `named_parameters` does.

    Raises:
        WeightError: Names every such weight that this rank holds, with the number of NaN and Inf and the first's index
            in this rank's slice.
    """
    found = [(name, weight, reason) for name, weight, _ in weights_to_calibrate(chunks) if (reason := _reason(weight))]
    # Global names cost a walk over the whole model, which nearly no calibration has to pay for.
    if not found:
        return
    keys = global_keys(chunks)
    offenders = []
    for name, weight, reason in found:
        key = keys.get(id(weight), ParamKey(name))
        offenders.append(Offender(key.name, reason, expert=key.expert))
    raise WeightError("Weights to quantize are not finite.", offenders, "Import the weights, or mend their source.")


def _reason(weight: torch.Tensor) -> str | None:
    return first_nonfinite(weight) if weight.numel() else None


def global_keys(chunks: Sequence[nn.Module]) -> dict[int, ParamKey]:
    """Identity across ranks by the `id` of the tensor; empty where no chunk holds a Megatron model."""
    models = [module for chunk in chunks for module in chunk.modules() if isinstance(module, LanguageModel)]
    return {id(parameter.tensor): parameter.key for parameter in iter_parameters(models)} if models else {}
