"""How a weight becomes codes and scales, as data: what kernels are chosen by, and all that they must know.

Names on disk, activations and whatever else a checkpoint says of a format are no part of it: `block_format` adds them.
"""

from dataclasses import dataclass, replace
from math import ceil

from quantplug.formats.codes import E2M1, E4M3, INT4, Code
from quantplug.formats.constants import FP8_BLOCK_SIDE, INT4_GROUP, INT4_SMALL_GROUP, MX_BLOCK, NVFP4_BLOCK
from quantplug.formats.scale_types import BF16_SCALE, E4M3_SCALE, E8M0_SCALE, F32_SCALE, ScaleType
from quantplug.formats.search.candidates import BY_MAX, ScaleSearch


@dataclass(frozen=True)
class Block:
    """The elements that share one scale.

    Attributes:
        rows: How many rows of a weight; None for all of them, which goes with all columns alone.
        columns: How many columns; None for all of them.
    """

    rows: int | None
    columns: int | None

    def count(self, shape: tuple[int, int]) -> tuple[int, int]:
        """How many blocks a weight [out, in] has, below each other and side by side; the last ones may be partial."""
        # An axis without a limit is one block, as long as the weight is.
        return ceil(shape[0] / (self.rows or shape[0])), ceil(shape[1] / (self.columns or shape[1]))


WHOLE_TENSOR = Block(None, None)


@dataclass(frozen=True)
class Encoding:
    """A value is its code times the scale of its block, with two levels times the scale of the tensor too.

    The scale of a block is made of what is in it. That of the tensor is made of an amax that the caller gives, so that
    weights which servers fuse can share it, and slices of a weight have the one of the whole.

    Attributes:
        code: What each element is stored as.
        block: The elements that share one scale of type `scale`.
        scale: How the scale of a block is stored; where the block is the whole tensor, how the scale of that is.
        levels: 1, or 2 where an FP32 scale of the tensor stands above those of its blocks.
        partial_blocks: Whether the last blocks of a row or column may be cut off by the edge of the weight.
        search: How the scale of a block is found. Another one changes what is stored, and not how it is read.
    """

    code: Code
    block: Block
    scale: ScaleType
    levels: int = 1
    partial_blocks: bool = False
    search: ScaleSearch = BY_MAX

    @property
    def has_block_scales(self) -> bool:
        return self.block != WHOLE_TENSOR

    @property
    def has_tensor_scale(self) -> bool:
        return self.levels == 2 or not self.has_block_scales

    @property
    def largest(self) -> float:
        """What the scale of the tensor maps the amax to: the largest code, times the largest scale of a block."""
        # NVFP4: 6 * 448, so that the block with the tensor's amax gets the largest E4M3 scale. FP8 has one level: 448.
        return self.code.largest * (self.search.largest or self.scale.largest or 1.0 if self.levels == 2 else 1.0)

    @property
    def can_search(self) -> bool:
        """Whether scales of blocks can be found otherwise than of amaxes: where they stand below one of the tensor."""
        return self.levels == 2

    def searched(self, search: ScaleSearch) -> "Encoding":
        """The same encoding, with scales that are found otherwise."""
        return replace(self, search=search)

    @property
    def vanishing(self) -> float:
        """Part of the tensor's amax below which every value is packed to 0, whatever block it is in.

        FP8 has one level: half the smallest E4M3 subnormal, of 448. Blocks of NVFP4 have a scale of at least 2^-9 of
        the tensor's, with which E2M1's smallest code is 0.5: half of that, of 6 * 448.
        """
        smallest_scale = (self.scale.smallest or 1.0) if self.levels == 2 else 1.0
        return self.code.smallest / 2 * smallest_scale / self.largest

    @property
    def cut_steps(self) -> tuple[int, int | None]:
        """Rows and columns in multiples of which a weight can be cut, and its parts packed apart to the same bytes.

        None for columns that have one scale among all of them.
        """
        rows, columns = self.block.rows or 1, self.block.columns
        if columns is None:
            # All parts are given the amax that a scale of the whole tensor is made of: only bytes must not be cut.
            columns = None if self.has_block_scales else self.code.in_a_byte
        return rows, columns

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be packed, naming the divisor; None when it can."""
        if len(shape) != 2:
            return f"shape {list(shape)} is not [out_features, in_features]"
        # A block may be partial, a byte may not: a row of codes ends with a whole one.
        rows, columns = (1, self.code.in_a_byte) if self.partial_blocks else (self.block.rows, self.block.columns)
        sizes = (("out_features", shape[0], rows or 1), ("in_features", shape[1], columns or self.code.in_a_byte))
        empty = [f"{axis} is 0" for axis, size, _ in sizes if size == 0]
        uneven = [
            f"{axis} {size} is not a multiple of the block size {block}" for axis, size, block in sizes if size % block
        ]
        return "; ".join(empty + uneven) or None


NVFP4_ENCODING = Encoding(E2M1, Block(1, NVFP4_BLOCK), E4M3_SCALE, levels=2)
FP8_ENCODING = Encoding(E4M3, WHOLE_TENSOR, F32_SCALE)
FP8_ROW_ENCODING = Encoding(E4M3, Block(1, None), F32_SCALE)
FP8_BLOCK_ENCODING = Encoding(E4M3, Block(FP8_BLOCK_SIDE, FP8_BLOCK_SIDE), F32_SCALE, partial_blocks=True)
INT4_ENCODING = Encoding(INT4, Block(1, INT4_GROUP), BF16_SCALE)
INT4_32_ENCODING = Encoding(INT4, Block(1, INT4_SMALL_GROUP), BF16_SCALE)
MXFP8_ENCODING = Encoding(E4M3, Block(1, MX_BLOCK), E8M0_SCALE)
MXFP4_ENCODING = Encoding(E2M1, Block(1, MX_BLOCK), E8M0_SCALE)
"""These have loops of their own in `kernels`; any other encoding is worked on by plain PyTorch."""
