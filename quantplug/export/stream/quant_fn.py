"""A quantization function of the caller's as a weight format: (weight, block size) to (codes, scale).

The signature is that of Megatron-Bridge's `export_hf_weights_quant`, where DeepSeek's blockwise FP8 comes from. What
such a function returns is not known before it is called, so it is tried while the plan is made: once on every shape
that it will meet, and, where slices could be quantized apart, on a whole and on its slices, which must agree.
"""

import math
from collections.abc import Callable, Sequence

import torch

from quantplug.errors import Offender, UnsupportedQuantizationError
from quantplug.export.plan.slices import divided
from quantplug.formats import PackedWeight, TensorSpec

QuantFn = Callable[[torch.Tensor, tuple[int, int] | None], tuple[torch.Tensor, torch.Tensor]]
"""Takes a weight [out, in] of its own, returns codes and scale; must depend on its arguments alone."""

_SEED = 0
_REMEDY = "Let it return two tensors, codes and scale, whose shapes and dtypes follow from those of the weight."


class QuantFunction:
    """A `WeightFormat` around a quantization function; its tensors are `weight` and `scale`.

    Args:
        block_size: Rows and columns that share a scale, handed on to the function; None if it has no blocks.
        dtype: Dtype of the weights.
        device: Where the weights are.
    """

    static_activations = False
    cut_steps = (None, None)
    """What the function makes of parts is not known before it has been tried: `packs_apart` does."""

    def __init__(
        self, quant_fn: QuantFn, block_size: tuple[int, int] | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._quant_fn = quant_fn
        self._block_size = block_size
        self._dtype = dtype
        self._device = device
        self._specs: dict[tuple[int, ...], tuple[TensorSpec, TensorSpec]] = {}
        self._apart: dict[tuple[tuple[int, ...], int, int], bool] = {}

    @property
    def name(self) -> str:
        """What messages call it."""
        return "quant_fn"

    def weight_bits(self, shape: tuple[int, ...]) -> int:
        """Bits of a code, scales apart, that the function makes of a weight of this shape."""
        codes, _ = self.outputs(shape)
        return math.ceil(8 * codes.nbytes / math.prod(shape))

    def problem(self, shape: tuple[int, ...]) -> str | None:
        return None if len(shape) == 2 and all(shape) else f"shape {list(shape)} is not [out_features, in_features]"

    def outputs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """What the function gives for a shape, by one call on ones the first time.

        Raises:
            UnsupportedQuantizationError: It raises, or does not return two tensors.
        """
        if shape not in self._specs:
            # Ones and not zeros, whose scale a function may divide by.
            codes, scale = self._call(torch.ones(shape, dtype=self._dtype, device=self._device))
            self._specs[shape] = (_spec("weight", codes), _spec("scale", scale))
        return self._specs[shape]

    def pack(self, weight: torch.Tensor, amax: torch.Tensor | None = None) -> PackedWeight:
        """Codes and scale of a weight; `amax` is of no use to the function.

        Raises:
            UnsupportedQuantizationError: The function raises, or returns something else than when it was tried.
        """
        # A copy, so that the function may work in place and the live model still is never changed.
        codes, scale = self._call(weight.detach().clone(memory_format=torch.contiguous_format))
        given = (_spec("weight", codes), _spec("scale", scale))
        expected = self.outputs(tuple(weight.shape))
        if given != expected:
            raise _refusal(f"gives {_described(given)} for {list(weight.shape)} where it gave {_described(expected)}")
        return PackedWeight({"weight": codes, "scale": scale})

    def pack_group(
        self, weights: Sequence[torch.Tensor], amaxes: torch.Tensor, block_amaxes: Sequence[torch.Tensor] = ()
    ) -> Sequence[PackedWeight]:
        return [self.pack(weight) for weight in weights]

    def unpack(self, packed: PackedWeight) -> torch.Tensor:
        raise NotImplementedError("only the caller knows the way back")

    def input_scale(self, amax: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("quant_fn has no static activations: check static_activations first")

    def packs_apart(self, shape: tuple[int, ...], axis: int, slices: int) -> bool:
        """Whether slices of a weight of this shape, quantized one by one, are the whole quantized at once.

        So it is where no block straddles two slices, there is one scale a block, and the function agrees on a trial.
        """
        key = (shape, axis, slices)
        if key not in self._apart:
            self._apart[key] = self._whole_blocks(shape, axis, slices) and self._agrees(shape, axis, slices)
        return self._apart[key]

    def _whole_blocks(self, shape: tuple[int, ...], axis: int, slices: int) -> bool:
        # Every slice must end where a block does.
        if self._block_size is None or shape[axis] % (slices * self._block_size[axis]):
            return False
        # One scale a block can be cut together with its slice; a scale of any other shape cannot.
        blocks = tuple(math.ceil(size / block) for size, block in zip(shape, self._block_size, strict=True))
        codes, scale = self.outputs(shape)
        pieces = self.outputs(divided(shape, axis, slices))
        return (
            scale.shape == blocks
            and len(codes.shape) == 2
            and all(
                piece.shape == divided(whole.shape, axis, slices)
                for piece, whole in zip(pieces, (codes, scale), strict=True)
            )
        )

    def _agrees(self, shape: tuple[int, ...], axis: int, slices: int) -> bool:
        """Whether it does on random slices, each of another magnitude: a scale of the whole tensor would show.

        Slices are drawn anew rather than kept, so that no more is there than the whole, or what it gave and a slice.
        """
        codes_and_scale = self._call(self._random_whole(shape, axis, slices))
        for index in range(slices):
            # The seed is the slice's own: the same values as in the whole, on every rank.
            of_slice = self._call(self._random_slice(divided(shape, axis, slices), index))
            for part, whole in zip(of_slice, codes_and_scale, strict=True):
                if not torch.equal(_bytes(part), _bytes(whole.chunk(slices, dim=axis)[index])):
                    return False
        return True

    def _random_whole(self, shape: tuple[int, ...], axis: int, slices: int) -> torch.Tensor:
        whole = torch.empty(shape, dtype=self._dtype, device=self._device)
        for index, place in enumerate(whole.chunk(slices, dim=axis)):
            place.copy_(self._random_slice(divided(shape, axis, slices), index))
        return whole

    def _random_slice(self, shape: tuple[int, ...], index: int) -> torch.Tensor:
        # A generator of its own: a trial must not move the random state of a training.
        generator = torch.Generator(device=self._device).manual_seed(_SEED + index)
        return torch.randn(shape, generator=generator, dtype=self._dtype, device=self._device).mul_(2.0**index)

    def _call(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            returned = self._quant_fn(weight, self._block_size)
        except Exception as error:  # The caller's code may raise anything, and other ranks wait for this one.
            raise _refusal(f"raised {type(error).__name__} for {list(weight.shape)}: {error}") from error
        # A list or tuple of two tensors; detached, so that no graph is kept alive.
        match returned:
            case (torch.Tensor() as codes, torch.Tensor() as scale):
                return codes.detach(), scale.detach()
        raise _refusal(f"does not return two tensors (codes, scale) for {list(weight.shape)}")


def _refusal(reason: str) -> UnsupportedQuantizationError:
    return UnsupportedQuantizationError("quant_fn cannot be used.", [Offender("quant_fn", reason)], _REMEDY)


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, tuple(tensor.shape), tensor.dtype)


def _described(specs: tuple[TensorSpec, ...]) -> str:
    return " and ".join(f"{spec.dtype} {list(spec.shape)}" for spec in specs)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that a NaN equals itself, and codes of any dtype can be compared."""
    return tensor.contiguous().view(torch.uint8)
