"""The search for scales by errors that inputs' products weigh: with e the error of a block, e H e^T.

H is the mean of x^T x over inputs x of the block's columns, which the vector of `importance` is the diagonal of. Plain
PyTorch in FP64, on any device: another order of sums then changes a choice as good as never.
"""

import torch

from quantplug.formats.encoding import Encoding
from quantplug.formats.scale_types import scale_from_amax
from quantplug.formats.search.candidates import BY_WEIGHTED_ERROR
from quantplug.formats.search.reference import candidates_of

_ELEMENTS = 2**20
"""Values of a weight that are worked on at a time."""


def scales_by_products(
    encoding: Encoding, weight: torch.Tensor, amax: torch.Tensor, products: torch.Tensor
) -> torch.Tensor:
    """The E4M3 scales [out, in / 16] of the least weighted error of each block.

    Args:
        encoding: NVFP4's.
        weight: [out, in].
        amax: FP32 scalar, which the scale of the whole is made of.
        products: FP64 [in / 16, 16, 16].
    """
    step = max(1, _ELEMENTS // weight.shape[1])
    scale_2 = scale_from_amax(amax.reshape(()).to(weight.device), encoding.largest)
    return torch.cat([_of_rows(encoding, rows, scale_2, products) for rows in weight.split(step)])


def _of_rows(encoding: Encoding, weight: torch.Tensor, scale_2: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    blocks = weight.float().unflatten(-1, (-1, products.shape[-1]))
    best = torch.full(blocks.shape[:-1], torch.inf, dtype=torch.float64, device=weight.device)
    found: torch.Tensor | None = None
    largest = encoding.code.largest * scale_2
    for candidate in candidates_of(BY_WEIGHTED_ERROR, encoding.scale, blocks.abs().amax(-1), largest):
        steps = (candidate.float() * scale_2)[..., None]
        left = (encoding.code.decode(encoding.code.encode(blocks / steps)) * steps - blocks).double()
        # [blocks, out, 16] @ [blocks, 16, 16], and the product with the errors once more.
        errors = ((left.transpose(0, 1) @ products).transpose(0, 1) * left).sum(-1)
        is_less = errors < best
        best = torch.where(is_less, errors, best)
        codes = candidate.view(torch.uint8)
        found = codes if found is None else torch.where(is_less, codes, found)
    assert found is not None
    return found.view(encoding.scale.dtype)
