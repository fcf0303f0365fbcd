"""What calibration asks of a quantizer."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from modelopt.torch.opt.conversion import ModeloptStateManager
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import nn


def leaf_quantizers(quantizer: nn.Module) -> list[TensorQuantizer]:
    """The tensor quantizers in one quantizer: itself, or the members of a sequential or grouped one."""
    return [module for module in quantizer.modules() if isinstance(module, TensorQuantizer)]


def is_dynamic(quantizer: TensorQuantizer) -> bool:
    """Whether its amax is computed anew in every forward."""
    # ModelOpt has no public name for "dynamic" of a whole quantizer, only for the MX formats.
    return bool(quantizer.is_mx_format or quantizer._dynamic)


def needs_amax(quantizer: TensorQuantizer) -> bool:
    """Whether calibration must give it an amax: it is enabled, and its amax neither dynamic nor set to a constant."""
    constant = quantizer._use_constant_amax or quantizer._constant_amax is not None  # No public name either.
    return bool(quantizer.is_enabled and not is_dynamic(quantizer) and not constant)


def weights_to_calibrate(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, torch.Tensor, nn.Module]]:
    """Local name, tensor and quantizer of every weight that calibration must give an amax."""
    for chunk in chunks:
        for prefix, module in chunk.named_modules():
            if isinstance(module, QuantModule):
                # Quantizers come with tensors, not names; those of a grouped linear have a tensor for each expert.
                names = {id(weight): name for name, weight in module.named_parameters(prefix, recurse=False)}
                for weight, quantizer in module.iter_weights_for_calibration():
                    if any(map(needs_amax, leaf_quantizers(quantizer))):
                        yield names.get(id(weight), prefix), weight, quantizer


def quantized_roots(chunks: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The modules that `mtq.quantize` was called on: inside of wrappers that were put around them later."""
    for chunk in chunks:
        # By its private name: `is_converted` says whether there is one, and fails where there are several.
        yield from (module for module in chunk.modules() if ModeloptStateManager._state_key in vars(module))
