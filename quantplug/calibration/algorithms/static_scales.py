"""Scales of NVFP4's blocks by squared error, for the static quantizers of a model: ModelOpt's `mse` without Triton.

ModelOpt's own search for such scales needs Triton and a GPU. Ours is that of the formats, in whatever kernels there are
for the weights' device, all experts of a linear in one call; what it leaves in a quantizer is ModelOpt's state: an amax
for each block and one of the whole, which make the very scales that were found.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from modelopt.torch.quantization import model_calib
from modelopt.torch.quantization.nn import QuantModule, StaticBlockScaleQuantizer, TensorQuantizer
from torch import nn

from quantplug.calibration.run import ForwardLoop, max_calibrate
from quantplug.formats import NVFP4
from quantplug.formats.encoding import Encoding
from quantplug.formats.search.candidates import BY_ERROR, FOUR_OVER_SIX, ScaleSearch
from quantplug.formats.search.given import block_amaxes_of_scales

_FOUR_AND_SIX = (1.0, 1.5, 0.5)
"""First and last multiple of the amax, and the step between them, by which ModelOpt's config says four-over-six."""


@torch.no_grad()
def mse_calibrate(
    model: nn.Module,
    forward_loop: ForwardLoop | None = None,
    distributed_sync: bool | None = True,
    step_size: float = 0.1,
    start_multiplier: float = 0.25,
    stop_multiplier: float = 4.0,
    fp8_scale_sweep: bool | None = False,
    **options: Any,
) -> None:
    """Stands for ModelOpt's calibration of the same name and arguments.

    Static NVFP4 weights get the scales of `mse` (`fp8_scale_sweep`), or of `four_over_six` (multiples of 1 and 1.5, for
    quantizers that say so). Where a model has none of them, or is searched by other multiples, ModelOpt's own runs.

    Raises:
        CalibrationError: As `calibrate`.
    """
    wanted = BY_ERROR if fp8_scale_sweep else FOUR_OVER_SIX
    is_known = bool(fp8_scale_sweep) or (start_multiplier, stop_multiplier, step_size) == _FOUR_AND_SIX
    if not is_known or not any(wants(quantizer, wanted) for _, quantizer in _weights(model)):
        model_calib.mse_calibrate(
            model,
            forward_loop,
            distributed_sync,
            step_size,
            start_multiplier,
            stop_multiplier,
            bool(fp8_scale_sweep),
            **options,
        )
        return
    # Amaxes of blocks and of wholes first: a scale of the whole is one of all slices and copies.
    max_calibrate(model, forward_loop, distributed_sync, **options)
    for module in model.modules():
        if isinstance(module, QuantModule):
            pairs = module.iter_weights_for_calibration()
            find_scales((Searched(*pair) for pair in pairs if wants(pair[1], wanted)), wanted)


@dataclass(frozen=True)
class Searched:
    """A weight whose scales are to be found.

    Attributes:
        weight: [out, in].
        quantizer: Of static NVFP4 blocks, with the amax of the whole weight.
        importance: FP32 [in], by which the squared errors of columns are weighted; None where all count alike.
    """

    weight: torch.Tensor
    quantizer: StaticBlockScaleQuantizer
    importance: torch.Tensor | None = None


def find_scales(searched: Iterable[Searched], search: ScaleSearch) -> None:
    """Gives quantizers the scales that a search finds for their weights, all alike weights at once."""
    alike: defaultdict[tuple[torch.Size, torch.dtype, bool], list[Searched]] = defaultdict(list)
    for one in searched:
        alike[one.weight.shape, one.weight.dtype, one.importance is None].append(one)
    packing = NVFP4.searched(search)
    for group in alike.values():
        wholes = torch.stack([one.quantizer.global_amax.float().reshape(()) for one in group])
        of_columns = [one.importance for one in group if one.importance is not None]
        packed = packing.pack_group(
            [one.weight.detach() for one in group],
            wholes,
            importance=torch.stack(of_columns) if of_columns else None,
        )
        for one, made, whole in zip(group, packed, wholes, strict=True):
            set_scales(one.quantizer, made.tensors["weight_scale"], whole, packing.encoding)


def set_scales(
    quantizer: StaticBlockScaleQuantizer, scales: torch.Tensor, whole: torch.Tensor, encoding: Encoding
) -> None:
    """Gives a quantizer E4M3 scales [out, blocks] under the amax of the whole weight, as amaxes of blocks."""
    quantizer.amax = block_amaxes_of_scales(encoding, scales, whole).view(quantizer.amax.shape)


def _weights(model: nn.Module) -> Iterator[tuple[torch.Tensor, nn.Module]]:
    for module in model.modules():
        if isinstance(module, QuantModule):
            yield from module.iter_weights_for_calibration()


def wants(quantizer: nn.Module, search: ScaleSearch) -> bool:
    """Whether a quantizer is of static NVFP4 blocks, enabled, and its settings go with a search."""
    if not isinstance(quantizer, TensorQuantizer) or not (quantizer.is_nvfp4_static and quantizer.is_enabled):
        return False
    return bool(quantizer.block_sizes.get("four_over_six")) is (search is FOUR_OVER_SIX)
