"""The search for scales in plain PyTorch, on any device: what the fused loops must equal in every bit."""

from collections.abc import Iterator

import torch

from quantplug.formats.encoding import Encoding
from quantplug.formats.scale_types import ScaleType
from quantplug.formats.search.candidates import ScaleSearch

_LEAST_CODE, _LARGEST_CODE = 1, 126


def found_scales(
    encoding: Encoding, blocks: torch.Tensor, scale_2: torch.Tensor, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """The E4M3 scales [n, m] that the search of an encoding finds for blocks of a weight.

    Args:
        blocks: FP32 values [n, 1, m, columns of a block].
        scale_2: FP32 scalar, the scale of the tensor.
        importance: FP32 [m * columns of a block], by which errors are weighted; None for all alike.
    """
    by_column = None if importance is None else importance.view(blocks.shape[2:])
    magnitudes = blocks.abs().squeeze(1)
    amaxes = magnitudes.amax(-1)
    largest = encoding.code.largest * scale_2
    # By a tensor and not by a Python number, of which CUDA would make another operation.
    in_units = magnitudes * (torch.ones_like(scale_2) / scale_2)
    best = torch.full_like(amaxes, torch.inf)
    found: torch.Tensor | None = None
    for candidate in candidates_of(encoding.search, encoding.scale, amaxes, largest):
        found = candidate if found is None else found
        errors = _errors(encoding, in_units, candidate.float(), by_column)
        # A comparison with NaN is false: of what is not finite the first candidate stays.
        is_less = errors < best
        best = torch.where(is_less, errors, best)
        codes = torch.where(is_less, candidate.view(torch.uint8), found.view(torch.uint8))
        found = codes.view(candidate.dtype)
    assert found is not None
    return found


def candidates_of(
    search: ScaleSearch, scale: ScaleType, amaxes: torch.Tensor, largest: torch.Tensor
) -> Iterator[torch.Tensor]:
    """The scales that a search tries for blocks, of a type's dtype and of the shape of their FP32 amaxes, in order.

    Args:
        largest: FP32 scalar, the value that a scale of 1 reaches.
    """
    for multiple in search.multiples:
        nearest = scale.from_amax(amaxes * multiple, largest).view(torch.uint8)
        for offset in search.offsets:
            codes = nearest if offset == 0 else (nearest.int() + offset).clamp(_LEAST_CODE, _LARGEST_CODE).byte()
            yield codes.view(scale.dtype)


def _errors(
    encoding: Encoding, in_units: torch.Tensor, scales: torch.Tensor, importance: torch.Tensor | None
) -> torch.Tensor:
    """Squared errors [n, m] of magnitudes [n, m, columns] under scales [n, m], weighted by [m, columns]."""
    quotients = in_units * (torch.ones_like(scales) / scales)[..., None]
    left = quotients - encoding.code.decode(encoding.code.encode(quotients))
    squares = left * left if importance is None else left * left * importance
    while squares.shape[-1] > 1:
        squares = squares[..., 0::2] + squares[..., 1::2]
    return squares.squeeze(-1) * (scales * scales)
