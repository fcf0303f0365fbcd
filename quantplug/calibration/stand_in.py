"""Inputs that are calibrated in another model of the same weights, where the model itself has no forward.

Transformer Engine's modules run on a GPU alone. Megatron-Core's own modules (`LayerSpec.LOCAL`) run anywhere, have the
same linears by nearly the same names, and see the same inputs. Only experts differ: one module each there, of which
each has its layer's amax, and one grouped linear here.
"""

import re
from collections.abc import Iterator, Sequence

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

from quantplug.calibration.quantizers import needs_amax
from quantplug.errors import CalibrationError, Offender

_ONE_EXPERT = re.compile(r"\.local_experts\.\d+(?=\.)")


def take_input_amaxes(chunks: Sequence[nn.Module], stand_ins: Sequence[nn.Module]) -> None:
    """Gives each static quantizer of an activation the amax of the one that stands for it. No collective.

    Args:
        chunks: A quantized model's virtual pipeline stages on this rank.
        stand_ins: Those of a calibrated model of the same layout and config of quantizers.

    Raises:
        CalibrationError: Quantizers have no counterpart with an amax; all are named, and none has changed.
    """
    given: list[tuple[TensorQuantizer, torch.Tensor]] = []
    offenders = []
    for chunk, stand_in in zip(chunks, stand_ins, strict=True):
        found = dict(_amaxes(stand_in))
        for name, quantizer in _activations(chunk):
            amax = found.get(_ONE_EXPERT.sub("", name))
            if amax is None:
                offenders.append(Offender(name, "has no counterpart that was calibrated"))
            else:
                given.append((quantizer, amax))
    if offenders:
        raise CalibrationError(
            "Activations are quantized that the model which stands in for this one does not quantize.",
            offenders,
            "Quantize both with one config, or calibrate on a GPU.",
        )
    for quantizer, amax in given:
        quantizer.amax = amax.clone()


def _activations(chunk: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    for name, module in chunk.named_modules():
        is_weight = re.search(r"weight_quantizer(\.\d+)*$", name) is not None
        if isinstance(module, TensorQuantizer) and not is_weight and needs_amax(module):
            yield name, module


def _amaxes(chunk: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, quantizer in _activations(chunk):
        if quantizer.amax is not None:
            yield _ONE_EXPERT.sub("", name), quantizer.amax
