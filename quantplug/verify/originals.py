"""The weights of a source, a few rows [out, in] at a time, in FP32 or as they are stored.

Floating-point tensors, GPT-OSS's own MXFP4, and FP8 in blocks as DeepSeek-V3 is published.
"""

from dataclasses import dataclass

import torch

from quantplug.checkpoint.untrusted.json_reader import Json, as_count, as_object
from quantplug.verify import decode, names
from quantplug.verify.checkpoint import ITEM_BYTES, Checkpoint, TensorInfo, rows_at_a_time
from quantplug.verify.layouts import is_plain
from quantplug.verify.matrices import Matrix

_MXFP4_BYTES = decode.MXFP4_BLOCK // 2
_FP8_SCALES = "weight_scale_inv"


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
    """FP8 in blocks: `weight` F8_E4M3 [out, in] times `weight_scale_inv` of its block, rounded to BF16.

    Attributes:
        scales: One a block.
        block: Rows and columns of a block.
    """

    source: Checkpoint
    info: TensorInfo
    scales: TensorInfo
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in floating point."""
        return self.info.shape

    def rows(self, expert: int | None, first: int, last: int) -> torch.Tensor:
        """FP32 rows [first, last)."""
        codes = self.source.rows(self.info.name, first, last).view(torch.uint8)
        scales = self.source.read(self.scales.name).float()
        spread = decode.spread_blocks(scales, first, codes.shape[0], codes.shape[1], self.block)
        # Rounded to BF16, which is what an importer reads from such a source and so what was quantized.
        return (decode.decode_e4m3(codes) * spread).bfloat16().float()

    def step(self, columns: int) -> int:
        """How many rows of so many columns are read at a time: as of BF16."""
        return rows_at_a_time(columns * ITEM_BYTES["BF16"])


@dataclass(frozen=True)
class Fp8ExpertsOriginal:
    """All experts of a layer in one FP8 tensor [experts, ., .], each with a table of blocks in `weight_scale_inv`.

    Attributes:
        block: Rows and columns of a block, as the matrices are stored.
        transposed: Whether they are stored as [in, out].
    """

    source: Checkpoint
    info: TensorInfo
    block: tuple[int, int]
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    def rows(self, expert: int | None, first: int, last: int) -> torch.Tensor:
        """FP32 rows [first, last) of one expert's weight."""
        matrix = Matrix(self.source, names.split(self.info.name)[0], expert, self.transposed)
        codes = matrix.rows("weight", first, last).view(torch.uint8)
        # The table is of the matrix as it is stored; turned to [out, in], rows and columns of a block change places.
        block = (self.block[1], self.block[0]) if self.transposed else self.block
        rows, columns = codes.shape
        spread = decode.spread_blocks(matrix.scales(_FP8_SCALES).float(), first, rows, columns, block)
        return (decode.decode_e4m3(codes) * spread).bfloat16().float()

    def step(self, columns: int) -> int:
        """How many rows of so many columns are read at a time: as of BF16."""
        return rows_at_a_time(columns * ITEM_BYTES["BF16"])


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

    all_experts: PlainOriginal | Fp8ExpertsOriginal
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


Original = PlainOriginal | Mxfp4Original | Fp8Original | Fp8ExpertsOriginal | PartOriginal


def is_decoded(config: Json) -> bool:
    """Whether a source of this config is quantized in a way that is read here."""
    return as_object(config.get("quantization_config")).get("quant_method") == "mxfp4" or _fp8_block(config) is not None


def _fp8_block(config: Json) -> tuple[int, int] | None:
    said = as_object(config.get("quantization_config"))
    sizes = said.get("weight_block_size")
    if said.get("quant_method") != "fp8" or not isinstance(sizes, list) or len(sizes) != 2:
        return None
    rows, columns = map(as_count, sizes)
    return (rows, columns) if rows and columns else None


def is_packed(source: Checkpoint, info: TensorInfo) -> bool:
    """Whether a tensor of the source holds codes, so that it has to be decoded before its values mean anything."""
    return is_mxfp4(info) or (_fp8_block(source.config) is not None and _is_fp8(source, info))


def is_read_with_another(source: Checkpoint, info: TensorInfo) -> bool:
    """Whether a tensor holds the scales of a packed one, and so is read together with that and not by itself."""
    module, suffix = names.split(info.name)
    # Only where the weight is there to be read with them; scales without it stay tensors of the source that the export
    # lacks.
    if suffix == _FP8_SCALES:
        weight = source.tensors.get(f"{module}.weight")
        return weight is not None and is_packed(source, weight)
    return is_mxfp4(info) and suffix == "scales" and f"{module}.blocks" in source.tensors


def _is_fp8(source: Checkpoint, info: TensorInfo) -> bool:
    return info.dtype == "F8_E4M3" and f"{names.split(info.name)[0]}.{_FP8_SCALES}" in source.tensors


def is_mxfp4(info: TensorInfo) -> bool:
    """Whether a tensor is part of the experts' MXFP4, by its name: blocks or scales."""
    return info.stored != info.name and names.split(info.name)[1] in ("blocks", "scales")


def original_of(source: Checkpoint, info: TensorInfo, transposed: bool | None) -> Original | None:
    """How to read a weight of the source; None for one that cannot be read.

    Args:
        transposed: Whether the tensor is [experts, in, out] in floating point; None where it does not hold all experts.
    """
    block = _fp8_block(source.config)
    # Both must hold: a BF16 tensor beside FP8 ones is plain, whatever the config says of the others.
    if block is not None and _is_fp8(source, info):
        return _fp8_original(source, info, block, transposed)
    if not is_mxfp4(info):
        return PlainOriginal(source, info, bool(transposed)) if is_plain(info) else None
    scales = source.tensors.get(f"{names.split(info.name)[0]}.scales")
    # Anybody's file: what does not fit together has no original, and the caller says so.
    shapes_fit = len(info.shape) == 4 and info.shape[-1] == _MXFP4_BYTES
    if scales is None or not shapes_fit or scales.shape != info.shape[:-1] or {info.dtype, scales.dtype} != {"U8"}:
        return None
    return Mxfp4Original(source, info)


def _fp8_original(
    source: Checkpoint, info: TensorInfo, block: tuple[int, int], transposed: bool | None
) -> Fp8Original | Fp8ExpertsOriginal | None:
    scales = source.tensors[f"{names.split(info.name)[0]}.{_FP8_SCALES}"]
    experts, matrix = info.shape[:-2], info.shape[-2:]
    # A partial block at the edge has a scale too.
    blocks = tuple(-(-size // side) for size, side in zip(matrix, block, strict=False))
    rank = 2 if transposed is None else 3
    readable = is_plain(scales) or scales.dtype == "F8_E8M0"
    if len(info.shape) != rank or scales.shape != (*experts, *blocks) or not readable:
        return None
    if transposed is None:
        return Fp8Original(source, info, scales, block)
    return Fp8ExpertsOriginal(source, info, block, transposed)


def part_original(source: Checkpoint, part: ExpertPart) -> PartOriginal | None:
    """How to read one expert's tensor out of the source's tensor of all; None for one that cannot be read."""
    match original_of(source, part.info, part.transposed):
        case PlainOriginal() | Fp8ExpertsOriginal() as whole:
            return PartOriginal(whole, part)
    return None
