"""A checkpoint whose linears are FP8, read as the model in 16 bits that it stands for.

`X.weight` F8_E4M3 [out, in] times the scales beside it: one of the tensor, one a row (`X.weight_scale`, as
compressed-tensors and ModelOpt write them) or one a block (`X.weight_scale_inv`, which despite its name multiplies:
config.json of deepseek-ai/DeepSeek-V3, `weight_block_size`). Experts in one tensor, `X` [experts, ., .], have theirs in
`X_weight_scale` or `X_scale_inv`, one for all, one an expert, one a channel, or a table of blocks for each (as vLLM,
SGLang and transformers read Qwen3-VL-MoE FP8). Only what is asked for is read and decoded.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from quantplug.checkpoint.encoded.described import BlockSize, FP8Storage, Sharing
from quantplug.checkpoint.reader import HFCheckpoint, ScalesAside, TensorHeader, damaged
from quantplug.errors import Offender
from quantplug.formats import FP8_BLOCK, FP8_ROW, BlockFormat, EncodedRows, PackedWeight
from quantplug.formats.constants import F32_SMALLEST_NORMAL, FP8_BLOCK_SIDE

# The last is a power of two alone, 2^(code - 127) (OCP Microscaling Formats v1.0, 5.4.1).
_SCALE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
# Scales of activations and of KV caches, as all of these tools name them: they say nothing of a weight.
_OF_INPUTS = "input_scale"
_OF_CACHE = ("k_scale", "v_scale")

# What a linear can be written in with the very codes and scales that it has, by what shares a scale.
_FORMATS: Mapping["Steps", BlockFormat] = {(FP8_BLOCK_SIDE, FP8_BLOCK_SIDE): FP8_BLOCK, (1, None): FP8_ROW}

Shape = tuple[int, ...]
Steps = tuple[int | None, ...]
"""Along each axis how many neighbours share a scale; None for all of them."""


@dataclass(frozen=True)
class _Scales:
    """The scales of one weight.

    Attributes:
        header: As they are stored.
        table: Their shape with an axis for each of the weight's.
    """

    name: str
    header: TensorHeader
    table: Shape
    steps: Steps


class FP8Checkpoint(HFCheckpoint):
    """A directory of safetensors with FP8 weights, which it gives in 16 bits; other tensors are as they are.

    Scales of activations and of a KV cache are none of its tensors; `aside` names them.

    Args:
        storage: How its config says that they are stored.
        dtype: Type that the weights are given in.

    Raises:
        SourceError: As `HFCheckpoint`; or an FP8 weight is without scales, or scales do not go with their weight, or
            the config says that the weight is not quantized.
    """

    def __init__(self, directory: Path, storage: FP8Storage, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(directory)
        stored = self.tensors
        # By type, not by name: the norms, embeddings and routers beside them are BF16 or FP32.
        packed = sorted(name for name, header in stored.items() if header.dtype is torch.float8_e4m3fn)
        self._scales: dict[str, _Scales] = {}
        offenders: list[Offender] = []
        for name in packed:
            found = _scales_of(name, stored, storage)
            if isinstance(found, _Scales):
                self._scales[name] = found
            else:
                offenders.append(Offender(name, found))
        if offenders:
            raise damaged(offenders)
        by_steps = {name: _FORMATS.get(scales.steps) for name, scales in self._scales.items()}
        self.packed_as = {name: packing for name, packing in by_steps.items() if packing is not None}
        self.aside = ScalesAside(tuple(_scales_aside(stored, packed)))
        # To a reader the scales are no tensors: they are part of how a weight is written.
        hidden = {scales.name for scales in self._scales.values()}.union(self.aside.names)
        plain = {name: header for name, header in stored.items() if name not in hidden}
        self.tensors = plain | {name: TensorHeader(stored[name].shape, dtype, stored[name].file) for name in packed}

    def _files_of(self, name: str) -> tuple[str, ...]:
        files = super()._files_of(name)
        # The scales may lie in another file than the codes.
        return (*files, self._scales[name].header.file) if name in self._scales else files

    def read(self, name: str, index: tuple[int | slice, ...] = ()) -> torch.Tensor:
        codes = super().read(name, index)
        scales = self._scales.get(name)
        if scales is None:
            return codes
        # Multiplied in FP32 and rounded once, as DeepSeek's own `weight_dequant` does (deepseek-ai/DeepSeek-V3,
        # inference/kernel.py).
        values = codes.float().mul_(self._spread(scales, self.tensors[name].shape, index))
        return values.to(self.tensors[name].dtype)

    def read_packed(self, name: str, rows: slice, expert: int | None) -> EncodedRows:
        assert expert is None, "experts of one tensor are not among `packed_as`"
        codes, (step, _) = super().read(name, (rows,)), self._scales[name].steps
        assert step is not None
        of_rows = slice(rows.start // step, -(-rows.stop // step))
        scales = self._table(self._scales[name], (of_rows,))
        odd = ~scales.isnan() & ~((scales >= F32_SMALLEST_NORMAL) & (scales <= 1 / F32_SMALLEST_NORMAL))
        if odd.any():
            self._pack_odd(name, rows, odd, codes, scales)
        packing = self.packed_as[name]
        return EncodedRows(packing, PackedWeight({"weight": codes, packing.scales[0]: scales}))

    def _pack_odd(self, name: str, rows: slice, odd: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Packs anew what has a scale that no kernel reads right: 0, one below zero, or one that GPUs flush to 0."""
        packed = self.packed_as[name].pack(self.read(name, (rows,)))
        fresh, fresh_scales = packed.tensors.values()
        spread = odd
        for axis, step in enumerate(self._scales[name].steps):
            if step is not None:
                spread = spread.index_select(axis, torch.arange(codes.shape[axis]) // step)
        # As bytes: torch selects among no FP8.
        codes.view(torch.uint8).copy_(torch.where(spread, fresh.view(torch.uint8), codes.view(torch.uint8)))
        scales.copy_(torch.where(odd, fresh_scales, scales))

    def _table(self, scales: _Scales, index: tuple[int | slice, ...]) -> torch.Tensor:
        """FP32 scales with an axis for each of the weight's, of which an index gives some along the first."""
        stored = self._read(scales.name, scales.header.file, index).float()
        return stored.reshape((-1, *scales.table[1:]))

    def _spread(self, scales: _Scales, shape: Shape, index: tuple[int | slice, ...]) -> torch.Tensor:
        """FP32 scales that broadcast to what an index gives of a weight of this shape."""
        # An index may leave out last axes; from here on there is one for each.
        parts = (*index, *(slice(None) for _ in shape))[: len(shape)]
        one = isinstance(parts[0], int)
        # Of a table for each expert that of the one is read; all other tables are small beside their weights.
        alone = one and scales.steps[0] == 1 and scales.header.shape[:1] == shape[:1]
        table = self._table(scales, (parts[0],) if alone else ())
        for axis, (part, step, size) in enumerate(zip(parts, scales.steps, shape, strict=True)):
            if step is not None and not (alone and axis == 0):
                # For each row (then column) that is read, the place of its scale in the table.
                table = table.index_select(axis, _places(part, size) // step)
        return table[0] if one else table


def _places(part: int | slice, size: int) -> torch.Tensor:
    """The indices that an index takes of an axis of this size."""
    start, stop, _ = part.indices(size) if isinstance(part, slice) else (part, part + 1, 1)
    return torch.arange(start, max(start, stop))


def _scales_of(name: str, stored: Mapping[str, TensorHeader], storage: FP8Storage) -> _Scales | str:
    """The scales of an FP8 weight, or what is wrong with them."""
    if name.removesuffix(".weight") in storage.plain:
        return "is FP8, and the list of modules that are not quantized names it"
    suffix, scales = storage.scales, _beside(name, storage.scales)
    if scales not in stored:
        return f"is FP8 without its *{suffix}"
    weight, header = stored[name], stored[scales]
    if header.dtype not in _SCALE_TYPES:
        return f"has *{suffix} in {header.dtype}, not {' or '.join(map(str, _SCALE_TYPES))}"
    kinds = [kind for kind in Sharing if kind in storage.sharing]
    for kind in kinds:
        for table, steps, shapes in _tables(weight.shape, kind, storage.block):
            if header.shape in shapes:
                return _Scales(scales, header, table, steps)
    said = " or ".join(f"one a {kind.value}" for kind in kinds)
    blocks = "" if storage.block is None else f" of {list(storage.block)}"
    return f"has shape {list(weight.shape)}, its *{suffix} {list(header.shape)}, which is not {said}{blocks}"


def _beside(weight: str, suffix: str) -> str:
    """Name of the scales of a weight: a parameter that is no module's `weight` has the word in its scale's name."""
    is_module = weight.endswith(".weight") or suffix == "_scale_inv"
    return weight + (suffix if is_module else f"_weight{suffix}")


def _tables(shape: Shape, kind: Sharing, block: BlockSize | None) -> Iterator[tuple[Shape, Steps, tuple[Shape, ...]]]:
    """The ways to have scales of this kind: as a table with all axes, with its steps, and the shapes on disk."""
    if len(shape) not in (2, 3):
        return
    experts, (rows, columns) = shape[:-2], shape[-2:]
    own, each = tuple(1 for _ in experts), tuple(1 for _ in experts)
    every: Steps = tuple(None for _ in experts)
    if kind is Sharing.TENSOR:
        yield (*own, 1, 1), (*every, None, None), ((), (1,), (*own, 1, 1))
        if experts:
            yield (*experts, 1, 1), (*each, None, None), (experts, (*experts, 1), (*experts, 1, 1))
    elif kind is Sharing.ROWS:
        # ModelOpt writes one axis, compressed-tensors two.
        yield (*experts, rows, 1), (*each, 1, None), ((*experts, rows, 1), *(() if experts else ((rows,),)))
        if experts:  # Of matrices that are stored as [in, out].
            yield (*experts, 1, columns), (*each, None, 1), ((*experts, 1, columns),)
    elif block is not None:
        # The last block of an axis may be partial, and has a scale all the same.
        blocks = tuple(-(-size // side) for size, side in zip((rows, columns), block, strict=True))
        yield (*experts, *blocks), (*each, *block), ((*experts, *blocks),)


def _scales_aside(stored: Mapping[str, TensorHeader], packed: list[str]) -> Iterator[str]:
    """Scales of the inputs of FP8 linears, and those of KV caches."""
    for name in packed:
        stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
        if stem + _OF_INPUTS in stored:
            yield stem + _OF_INPUTS
    yield from (name for name in stored if name.rpartition(".")[2] in _OF_CACHE)
