"""A weight format as a row of data: how values become codes and scales, and what a checkpoint calls them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from quantplug.formats.codes import E4M3
from quantplug.formats.encoding import Encoding
from quantplug.formats.kernels import Encoded, kernels_for
from quantplug.formats.scale_types import F32_SCALE, scale_from_amax
from quantplug.formats.scales import weight_amax
from quantplug.formats.search.candidates import ScaleSearch
from quantplug.formats.search.given import scales_of_block_amaxes
from quantplug.formats.weight_format import PackedWeight, TensorSpec, empty_groups

_CODES = "weight"


@dataclass(frozen=True)
class EncodedRows:
    """Rows of a weight in a format, as whoever packed them left them."""

    packing: "BlockFormat"
    packed: PackedWeight

    @property
    def nbytes(self) -> int:
        """Size of codes and scales."""
        return sum(tensor.nbytes for tensor in self.packed.tensors.values())

    def values(self) -> torch.Tensor:
        """The FP32 values [rows, in] that a reader computes."""
        return self.packing.unpack(self.packed)

    def amax(self) -> torch.Tensor:
        """max|value|, an FP32 scalar; NaN where they hold one."""
        return self.packing.amax(self.packed)


@dataclass(frozen=True)
class BlockFormat:
    """A `WeightFormat` of codes and scales; `table` holds those that there are.

    Attributes:
        name: Short name for tables and messages.
        encoding: What a value is made of.
        scales: Suffixes of the scales' names: the one of the blocks, then the one of the tensor. A format with one kind
            of scale has one.
        static_activations: Whether activations are quantized by a scale that calibration has found.
    """

    name: str
    encoding: Encoding
    scales: tuple[str, ...]
    static_activations: bool

    @property
    def cut_steps(self) -> tuple[int | None, int | None]:
        return self.encoding.cut_steps

    def problem(self, shape: tuple[int, ...]) -> str | None:
        return self.encoding.problem(shape)

    def outputs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        rows, columns = shape
        encoding = self.encoding
        # Codes, block scales, tensor scale: in this order they are written, and allocated by `pack_group`.
        specs = [TensorSpec(_CODES, (rows, columns // encoding.code.in_a_byte), encoding.code.dtype)]
        if self._block_scale is not None:
            blocks = encoding.block.count((rows, columns))
            specs.append(TensorSpec(self._block_scale, blocks, encoding.scale.dtype))
        if self._tensor_scale is not None:
            specs.append(TensorSpec(self._tensor_scale, (), torch.float32))
        return tuple(specs)

    def searched(self, search: ScaleSearch) -> "BlockFormat":
        """The same format on disk, with scales of blocks that are found otherwise."""
        if search == self.encoding.search:
            return self
        return replace(self, name=f"{self.name} ({search.name})", encoding=self.encoding.searched(search))

    def pack(self, weight: torch.Tensor, amax: torch.Tensor | None = None) -> PackedWeight:
        if amax is None:  # Only a scale of the tensor is made of it.
            amax = weight_amax(weight) if self.encoding.has_tensor_scale else torch.zeros((), device=weight.device)
        (packed,) = self.pack_group((weight,), amax.reshape(1))
        return packed

    def pack_group(
        self,
        weights: Sequence[torch.Tensor],
        amaxes: torch.Tensor,
        block_amaxes: Sequence[torch.Tensor] = (),
        importance: torch.Tensor | None = None,
    ) -> Sequence[PackedWeight]:
        first = weights[0]
        # One allocation a name for the whole group: on a GPU one launch then fills the tensors of all its weights.
        tensors = empty_groups(self.outputs(tuple(first.shape)), len(weights), first.device)
        if self._tensor_scale is not None:
            # On the weights' device: CUDA takes a divisor on the CPU for a Python number, and multiplies.
            tensors[self._tensor_scale] = scale_from_amax(amaxes.to(first.device), self.encoding.largest)
        if self._block_scale is not None and self.encoding.search.is_given:
            on_device = amaxes.to(first.device, torch.float32)
            tensors[self._block_scale] = scales_of_block_amaxes(self.encoding, block_amaxes, on_device)
        encoded = replace(self._encoded(tensors), importance=importance)
        kernels_for(first).pack(self.encoding, weights, encoded)
        return PackedWeight.of_group(tensors)

    def unpack(self, packed: PackedWeight) -> torch.Tensor:
        # Kernels know groups only, and one weight is a group of one.
        group = {name: tensor.unsqueeze(0) for name, tensor in packed.tensors.items()}
        codes = group[_CODES]
        columns = codes.shape[-1] * self.encoding.code.in_a_byte
        values = torch.empty(*codes.shape[:-1], columns, dtype=torch.float32, device=codes.device)
        kernels_for(values).unpack(self.encoding, self._encoded(group), values)
        return values[0]

    def amax(self, packed: PackedWeight) -> torch.Tensor:
        """max|value| of a packed weight, an FP32 scalar on its device; NaN where it holds one."""
        encoding = self.encoding
        if encoding.code is not E4M3 or encoding.scale is not F32_SCALE or self._block_scale is None:
            return weight_amax(self.unpack(packed))
        # Without the sign the bytes of E4M3 are in the order of their values, the NaN above all: those of a block are
        # compared as they are, which takes a tenth of the time of decoding them.
        magnitudes = packed.tensors[_CODES].view(torch.uint8) & 0x7F
        rows, columns = encoding.block.rows or len(magnitudes), encoding.block.columns or magnitudes.shape[1]
        cut = (0, -magnitudes.shape[1] % columns, 0, -len(magnitudes) % rows)
        whole = torch.nn.functional.pad(magnitudes, cut) if any(cut) else magnitudes
        largest = whole.unflatten(0, (-1, rows)).amax(1).unflatten(1, (-1, columns)).amax(2)
        return (largest.view(torch.float8_e4m3fn).float() * packed.tensors[self._block_scale].abs()).max()

    def input_scale(self, amax: torch.Tensor) -> torch.Tensor:
        if not self.static_activations:
            raise NotImplementedError(f"{self.name} has no static activations: check static_activations first")
        return scale_from_amax(amax.reshape(()), self.encoding.largest)

    # With one kind of scale `scales` has one name, which is its first and its last.
    @property
    def _block_scale(self) -> str | None:
        return self.scales[0] if self.encoding.has_block_scales else None

    @property
    def _tensor_scale(self) -> str | None:
        return self.scales[-1] if self.encoding.has_tensor_scale else None

    def _encoded(self, tensors: Mapping[str, torch.Tensor]) -> Encoded:
        """The tensors of a group, from their names on disk to what kernels call them; scales it lacks are None."""
        block_scales = None if self._block_scale is None else tensors[self._block_scale]
        tensor_scales = None if self._tensor_scale is None else tensors[self._tensor_scale]
        return Encoded(tensors[_CODES], block_scales, tensor_scales)
