"""The search for scales by errors that inputs' products weigh: with e the error of a block, e H e^T.

H is the mean of x^T x over inputs x of the block's columns, which the vector of `importance` is the diagonal of. Errors
of different blocks meet in one output. What they have in common there, as far as inputs' means m tell, is

    (sum over blocks of e m^T)^2,

of which the squares of single blocks are in e H e^T already. So each block's scale is chosen for its own error and for
2 (e m^T) times the sum of the others', block after block, in two passes that begin with the best scales by themselves.

Plain PyTorch in FP64, on any device: another order of sums then changes a choice as good as never.
"""

import torch

from quantplug.formats.encoding import Encoding
from quantplug.formats.scale_types import scale_from_amax
from quantplug.formats.search.candidates import BY_WEIGHTED_ERROR
from quantplug.formats.search.reference import candidates_of

_ELEMENTS = 2**18
"""Values of a weight that are worked on at a time."""
_PASSES = 2
"""Over the blocks of a row; a third changes next to nothing."""


def scales_by_products(
    encoding: Encoding, weight: torch.Tensor, amax: torch.Tensor, products: torch.Tensor, means: torch.Tensor
) -> torch.Tensor:
    """The E4M3 scales [out, in / 16] of the least weighted error of each block.

    Args:
        encoding: NVFP4's.
        weight: [out, in].
        amax: FP32 scalar, which the scale of the whole is made of.
        products: FP64 [in / 16, 16, 16].
        means: FP64 [in].
    """
    step = max(1, _ELEMENTS // weight.shape[1])
    scale_2 = scale_from_amax(amax.reshape(()).to(weight.device), encoding.largest)
    by_blocks = means.view(-1, products.shape[-1])
    return torch.cat([_of_rows(encoding, rows, scale_2, products, by_blocks) for rows in weight.split(step)])


def _of_rows(
    encoding: Encoding, weight: torch.Tensor, scale_2: torch.Tensor, products: torch.Tensor, means: torch.Tensor
) -> torch.Tensor:
    blocks = weight.float().unflatten(-1, (-1, products.shape[-1]))
    largest = encoding.code.largest * scale_2
    codes, own, common = [], [], []
    for candidate in candidates_of(BY_WEIGHTED_ERROR, encoding.scale, blocks.abs().amax(-1), largest):
        steps = (candidate.float() * scale_2)[..., None]
        left = (encoding.code.decode(encoding.code.encode(blocks / steps)) * steps - blocks).double()
        codes.append(candidate.view(torch.uint8))
        # [blocks, out, 16] @ [blocks, 16, 16], and the product with the errors once more.
        own.append(((left.transpose(0, 1) @ products).transpose(0, 1) * left).sum(-1))
        common.append((left * means).sum(-1))
    chosen = _best(torch.stack(own), torch.stack(common))
    return torch.stack(codes).gather(0, chosen[None])[0].view(encoding.scale.dtype)


def _best(own: torch.Tensor, common: torch.Tensor) -> torch.Tensor:
    """Which of the candidates [candidates, out, blocks] each block [out, blocks] takes."""
    chosen = own.argmin(0)
    taken = common.gather(0, chosen[None])[0]
    for _ in range(_PASSES):
        sums = taken.sum(1)
        for block in range(own.shape[-1]):
            others = sums - taken[:, block]
            chosen[:, block] = (own[..., block] + 2 * common[..., block] * others).argmin(0)
            taken[:, block] = common[..., block].gather(0, chosen[None, :, block])[0]
            sums = others + taken[:, block]
    return chosen
