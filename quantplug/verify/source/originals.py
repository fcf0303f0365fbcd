"""The weights of a source, a few rows [out, in] at a time, in FP32 or as they are stored.

Floating-point tensors, GPT-OSS's own MXFP4, and FP8 of whichever tool, with a scale a tensor, a row or a block.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch

from quantplug.checkpoint.untrusted.json_reader import Json, as_object, as_text
from quantplug.verify.inventory import names
from quantplug.verify.inventory.checkpoint import ITEM_BYTES, Checkpoint, TensorInfo, rows_at_a_time
from quantplug.verify.inventory.layouts import KV_SUFFIXES, SCALARS, Fp8Layout, is_plain
from quantplug.verify.inventory.scheme import DeclaredScheme
from quantplug.verify.numbers import decode
from quantplug.verify.source.matrices import Matrix

_MXFP4_BYTES = decode.MXFP4_BLOCK // 2
_EVERYTHING = 2**40  # more than any side of a weight
_DTYPE_KEYS = ("dtype", "torch_dtype")  # of transformers 5, and of earlier ones


@dataclass(frozen=True)
class PlainOriginal:
    """A floating-point tensor: one weight, or those of all experts of a layer.

    Attributes:
        transposed: Whether the experts' matrices are stored as [in, out].
    """

    source: Checkpoint
    info: TensorInfo
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in floating point."""
        return self.info.shape

    def rows(self, expert: int | None, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of one weight, in the type they are stored in."""
        module, suffix = names.split(self.info.name)
        return Matrix(self.source, module, expert, self.transposed).rows(suffix, first, last)

    def step(self, columns: int) -> int:
        """How many rows of so many columns are read at a time."""
        return rows_at_a_time(columns * ITEM_BYTES[self.info.dtype])


@dataclass(frozen=True)
class Mxfp4Original:
    """The experts of GPT-OSS as OpenAI published them.

    `blocks` U8 [experts, out, in / 32, 16] and E8M0 `scales` U8 [experts, out, in / 32]: not transposed, though the
    tensor in floating point is (transformers 5.23, `integrations/mxfp4.py`, `convert_moe_packed_tensors`).
    """

    source: Checkpoint
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in floating point."""
        experts, rows, blocks, _ = self.info.shape
        return experts, blocks * decode.MXFP4_BLOCK, rows

    def rows(self, expert: int | None, first: int, last: int) -> torch.Tensor:
        """FP32 rows [first, last) of one expert's weight."""
        matrix = Matrix(self.source, names.split(self.info.name)[0], expert)
        return decode.decode_mxfp4(matrix.rows("blocks", first, last), matrix.rows("scales", first, last))

    def step(self, columns: int) -> int:
        """How many rows of so many columns are read at a time: as of BF16."""
        return rows_at_a_time(columns * ITEM_BYTES["BF16"])


@dataclass(frozen=True)
class Fp8Original:
    """FP8: `weight` F8_E4M3 times its scales, rounded to the type that config.json names; one weight or all experts.

    Attributes:
        layout: What shares a scale.
        experts: How many matrices the tensor holds; None for one that is a matrix.
        transposed: Whether the experts' matrices are stored as [in, out].
    """

    source: Checkpoint
    info: TensorInfo
    layout: Fp8Layout
    experts: int | None
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in floating point."""
        return self.info.shape

    def rows(self, expert: int | None, first: int, last: int) -> torch.Tensor:
        """FP32 rows [first, last) of one weight [out, in]."""
        module = names.split(self.info.name)[0]
        matrix = Matrix(self.source, module, expert, self.transposed)
        codes = matrix.rows("weight", first, last).view(torch.uint8)
        scales = self._table(module, expert)
        rows, columns = codes.shape
        sides = self._sides(scales)
        values = decode.decode_e4m3(codes) * decode.spread_blocks(scales, first, rows, columns, sides)
        # Rounded, which is what an importer reads from such a source and so what was quantized.
        return values.to(_saved_dtype(self.source.config)).float()

    def step(self, columns: int) -> int:
        """How many rows of so many columns are read at a time: as of BF16."""
        return rows_at_a_time(columns * ITEM_BYTES["BF16"])

    def _table(self, module: str, expert: int | None) -> torch.Tensor:
        """FP32 scales [., .] of one matrix [out, in]."""
        name = f"{module}.{self.layout.scale}"
        of_each = expert is not None and self.source.tensors[name].shape[:1] == (self.experts,)
        scales = (
            self.source.part(name, (expert,)) if of_each and expert is not None else self.source.read(name)
        ).float()
        if scales.numel() == 1:
            return scales.reshape(1, 1)
        table = scales.reshape(-1, 1) if scales.dim() == 1 else scales
        # It is of the matrix as it is stored; turned to [out, in], rows and columns change places.
        return table.mT if self.transposed else table

    def _sides(self, table: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of a matrix [out, in] that share a scale."""
        if self.layout.block is not None and not self.layout.per_row:
            rows, columns = self.layout.block
            return (columns, rows) if self.transposed else (rows, columns)
        rows, columns = (1 if count > 1 else _EVERYTHING for count in table.shape)
        return rows, columns


@dataclass(frozen=True)
class ExpertPart:
    """What one expert's tensor is in a source that holds all experts of a layer in one.

    Attributes:
        name: Of the expert's own tensor.
        info: The source's tensor [experts, ., .].
        expert: Its place in that tensor.
        transposed: Whether the matrices in it are [in, out].
        place: Which of the equal parts of the expert's rows it has, such as those of gate_proj before those of up_proj.
        parts: How many these are.
    """

    name: str
    info: TensorInfo
    expert: int
    transposed: bool
    place: int
    parts: int

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in] of the part."""
        _, first, second = self.info.shape
        rows, columns = (second, first) if self.transposed else (first, second)
        return rows // self.parts, columns


@dataclass(frozen=True)
class PartOriginal:
    """What one expert's tensor is in a source that holds all experts of a layer in one."""

    all_experts: PlainOriginal | Fp8Original
    part: ExpertPart

    @property
    def info(self) -> TensorInfo:
        return self.part.info

    @property
    def shape(self) -> tuple[int, ...]:
        return self.part.shape

    def rows(self, expert: int | None, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of the part, in the type of the whole."""
        # Gate and up lie one below the other in the expert's matrix: [gate rows, then up rows, in].
        above = self.part.place * self.shape[0]
        return self.all_experts.rows(self.part.expert, above + first, above + last)

    def step(self, columns: int) -> int:
        """How many rows of so many columns are read at a time."""
        return self.all_experts.step(columns)


Original = PlainOriginal | Mxfp4Original | Fp8Original | PartOriginal


@dataclass(frozen=True)
class Originals:
    """The weights of a source, of whichever form.

    Attributes:
        scheme: What its configs say of its quantization.
    """

    source: Checkpoint
    scheme: DeclaredScheme

    @property
    def undecoded(self) -> bool:
        """Whether the source says that it is quantized, and none of its weights is so in a way that is read here."""
        said = as_object(self.source.config.get("quantization_config"))
        if not (said or self.scheme.method) or said.get("quant_method") == "mxfp4":
            return False
        return all(self._layout(info) is None for info in self.source.tensors.values())

    @cached_property
    def usual_type(self) -> str | None:
        """The type, as safetensors spells it, of most bytes of plain matrices; None where there are none."""
        plain = (info for info in self.source.tensors.values() if is_plain(info) and len(info.shape) > 1)
        counts: Counter[str] = Counter()
        for info in plain:
            counts[info.dtype] += info.nbytes
        return max(counts, key=counts.__getitem__, default=None)

    def is_packed(self, info: TensorInfo) -> bool:
        """Whether a tensor holds codes, so that it has to be decoded before its values mean anything."""
        return is_mxfp4(info) or self._layout(info) is not None

    def is_no_weight(self, info: TensorInfo) -> bool:
        """Whether a tensor is read together with a packed one and not by itself, or says nothing of a weight.

        Those are the scales of a packed weight; of its linear's input and of a KV cache, which an export has its own
        of.
        """
        module, suffix = names.split(info.name)
        if suffix in KV_SUFFIXES:
            return bool(self.scheme.method)
        # Only where the weight is there to be read with them; scales without it stay tensors of the source that the
        # export lacks.
        weight = self.source.tensors.get(f"{module}.weight")
        layout = None if weight is None else self._layout(weight)
        if layout is not None and suffix in (layout.scale, "input_scale"):
            return True
        return is_mxfp4(info) and suffix == "scales" and f"{module}.blocks" in self.source.tensors

    def of(self, info: TensorInfo, transposed: bool | None) -> Original | None:
        """How to read a weight; None for one that cannot be read.

        Args:
            transposed: Whether the tensor is [experts, in, out] in floating point; None where it does not hold all
                experts.
        """
        layout = self._layout(info)
        if layout is not None:
            return self._fp8(info, layout, transposed)
        if not is_mxfp4(info):
            return PlainOriginal(self.source, info, bool(transposed)) if is_plain(info) else None
        scales = self.source.tensors.get(f"{names.split(info.name)[0]}.scales")
        # Anybody's file: what does not fit together has no original, and the caller says so.
        shapes_fit = len(info.shape) == 4 and info.shape[-1] == _MXFP4_BYTES
        if scales is None or not shapes_fit or scales.shape != info.shape[:-1] or {info.dtype, scales.dtype} != {"U8"}:
            return None
        return Mxfp4Original(self.source, info)

    def of_part(self, part: ExpertPart) -> PartOriginal | None:
        """How to read one expert's tensor out of the tensor of all; None for one that cannot be read."""
        match self.of(part.info, part.transposed):
            case PlainOriginal() | Fp8Original() as whole:
                return PartOriginal(whole, part)
        return None

    def _layout(self, info: TensorInfo) -> Fp8Layout | None:
        """How a tensor's scales lie beside it; None where it is no FP8 weight that has some."""
        module, suffix = names.split(info.name)
        # Both must hold: a BF16 tensor beside FP8 ones is plain, whatever the config says of the others.
        if info.dtype != "F8_E4M3" or suffix != "weight":
            return None
        layout = self.scheme.layout_of(module)
        is_beside = isinstance(layout, Fp8Layout) and f"{module}.{layout.scale}" in self.source.tensors
        return layout if isinstance(layout, Fp8Layout) and is_beside else None

    def _fp8(self, info: TensorInfo, layout: Fp8Layout, transposed: bool | None) -> Fp8Original | None:
        scales = self.source.tensors[f"{names.split(info.name)[0]}.{layout.scale}"]
        if len(info.shape) != (2 if transposed is None else 3) or not (is_plain(scales) or scales.dtype == "F8_E8M0"):
            return None
        if scales.shape not in _scale_shapes(info.shape, layout):
            return None
        return Fp8Original(self.source, info, layout, None if transposed is None else info.shape[0], bool(transposed))


def _scale_shapes(shape: tuple[int, ...], layout: Fp8Layout) -> tuple[tuple[int, ...], ...]:
    """The shapes that the scales of a weight [out, in], or of all experts', may have."""
    experts, (rows, columns) = shape[:-2], shape[-2:]
    if layout.block is None:
        return (*SCALARS, *((experts, (*experts, 1), (*experts, 1, 1)) if experts else ()))
    if layout.per_row:
        return ((*experts, rows, 1), (*experts, 1, columns)) if experts else ((rows,), (rows, 1))
    # A partial block at the edge has a scale too.
    return ((*experts, -(-rows // layout.block[0]), -(-columns // layout.block[1])),)


def _saved_dtype(config: Json) -> torch.dtype:
    """Type that the weights of a config are in once they are decoded."""
    named = (as_text(place.get(key)) for place in (config, as_object(config.get("text_config"))) for key in _DTYPE_KEYS)
    spelled = next(filter(None, named), "").removeprefix("torch.")
    return {"float16": torch.float16, "float32": torch.float32}.get(spelled, torch.bfloat16)


def is_mxfp4(info: TensorInfo) -> bool:
    """Whether a tensor is part of the experts' MXFP4, by its name: blocks or scales."""
    return info.stored != info.name and names.split(info.name)[1] in ("blocks", "scales")
