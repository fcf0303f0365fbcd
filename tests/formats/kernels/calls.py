"""Calls of kernels: what they are given, made from a weight and a scale."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantplug.formats import encoding as encodings
from quantplug.formats.encoding import Encoding
from quantplug.formats.kernels.protocol import Encoded, Kernels
from quantplug.formats.search import candidates


def empty(encoding: Encoding, shape: Sequence[int], scales: Sequence[float]) -> Encoded:
    """What is filled for weights of this shape, one for each scale; zeros, so that what is not filled shows."""
    rows, columns = shape
    codes = torch.zeros(len(scales), rows, columns // encoding.code.in_a_byte, dtype=torch.uint8)
    blocks = torch.zeros(len(scales), *encoding.block.count((rows, columns)), dtype=encoding.scale.dtype)
    return Encoded(
        codes.view(encoding.code.dtype),
        blocks if encoding.has_block_scales else None,
        torch.tensor(scales, dtype=torch.float32) if encoding.has_tensor_scale else None,
    )


def tensors_of(encoded: Encoded) -> tuple[torch.Tensor, ...]:
    return tuple(tensor for tensor in (encoded.codes, encoded.blocks, encoded.whole) if tensor is not None)


def pack_one(
    kernels: Kernels, encoding: Encoding, weight: torch.Tensor, scale: float = 1.0
) -> tuple[torch.Tensor, ...]:
    """Codes, scales of blocks and scale of the tensor, as far as the encoding has them, each with a first axis of 1."""
    encoded = empty(encoding, weight.shape, (scale,))
    kernels.pack(encoding, (weight,), encoded)
    return tensors_of(encoded)


@dataclass(frozen=True)
class Call:
    """A call as plain data, so that another process can make it too.

    Attributes:
        name: Of the function: `amax`, `pack` or `unpack`.
        encoding: Name of the encoding; empty for `amax`.
        weights: What is read by `amax` and `pack`, or filled by `unpack`, [count, out, in].
        encoded: Fields of `Encoded`, of which `pack` fills the first two.
        search: Name of how scales of blocks are found.
    """

    name: str
    encoding: str
    weights: list[torch.Tensor]
    encoded: tuple[torch.Tensor | None, ...] = ()
    search: str = "BY_MAX"

    def made_by(self, kernels: Kernels) -> list[torch.Tensor]:
        """All that there is when the call is over; what is filled is filled in a copy."""
        if self.name == "amax":
            return [kernels.amax(*self.weights)]
        encoding = getattr(encodings, self.encoding).searched(getattr(candidates, self.search))
        encoded = Encoded(*(None if tensor is None else tensor.clone() for tensor in self.encoded))
        if self.name == "pack":
            kernels.pack(encoding, self.weights, encoded)
            return [*self.weights, *tensors_of(encoded)]
        (values,) = (weight.clone() for weight in self.weights)
        kernels.unpack(encoding, encoded, values)
        return [values, *tensors_of(encoded)]
