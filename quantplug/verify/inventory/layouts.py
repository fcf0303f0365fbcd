"""Which tensors one quantized Linear consists of, with their shapes and dtypes, format by format.

Sources: ModelOpt 0.47's, llm-compressor 0.14's and DeepSeek-V3's written files; vLLM 0.33 `modelopt.py`, `fp8.py` and
`compressed_tensors/` for what is loaded.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil

from quantplug.mappings.rows import Placement
from quantplug.verify.inventory.checkpoint import PLAIN_FLOATS, TensorInfo

SCALARS = ((), (1,))


@dataclass(frozen=True)
class Part:
    """One tensor of a quantized module: the shapes and dtypes it may have."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: frozenset[str]

    def problem(self, info: TensorInfo) -> str | None:
        if info.dtype not in self.dtypes:
            return f"is {info.dtype}, expected {' or '.join(sorted(self.dtypes))}"
        if info.shape not in self.shapes:
            return f"has shape {list(info.shape)}, expected {' or '.join(str(list(shape)) for shape in self.shapes)}"
        return None

    def of_all(self, placement: Placement) -> "Part":
        """The tensor of all experts; what has no axes is one for all of them."""
        if self.shapes == SCALARS:
            return self
        return replace(self, shapes=tuple(placement.stored_shape(shape) for shape in self.shapes))


F32 = frozenset({"F32"})
F8 = frozenset({"F8_E4M3"})
U8 = frozenset({"U8"})
I32, I64 = frozenset({"I32"}), frozenset({"I64"})
FLOATS = frozenset({"F32", "BF16", "F16"})


@dataclass(frozen=True)
class Nvfp4Layout:
    """E2M1 codes, an E4M3 scale for 16 columns, and one FP32 scale.

    Attributes:
        reciprocal: The file holds 2688 / amax (compressed-tensors) and not amax / 2688 (ModelOpt).
        input_scale: Suffix of the static activation scale; None for weight-only.
    """

    name: str
    codes: str
    tensor_scale: str
    reciprocal: bool
    input_scale: str | None
    block: int = 16

    def columns(self, codes: TensorInfo) -> int:
        return 2 * codes.shape[-1] if len(codes.shape) == 2 else 0

    def shape_problem(self, codes: TensorInfo) -> str | None:
        columns = self.columns(codes)
        if columns % self.block:
            return f"in_features {columns} is not a multiple of the block of {self.block}"
        return None

    def parts(self, codes: TensorInfo) -> Mapping[str, Part]:
        rows, packed = codes.shape
        scalars = {self.tensor_scale: Part(SCALARS, F32)}
        if self.input_scale is not None:
            scalars[self.input_scale] = Part(SCALARS, F32)
        # Two codes a byte, so that a row of `packed` bytes has twice as many columns.
        blocks = Part(((rows, ceil(2 * packed / self.block)),), F8)
        return {self.codes: Part(((rows, packed),), U8), "weight_scale": blocks, **scalars}

    @property
    def scalars(self) -> tuple[str, ...]:
        """Suffixes of the FP32 scalars, which fused modules share."""
        return (self.tensor_scale, *([self.input_scale] if self.input_scale else []))


@dataclass(frozen=True)
class Fp8Layout:
    """E4M3 codes and floating-point scales for the tensor, each row, or each block.

    Attributes:
        block: Rows and columns of one block; None for one scale a tensor, (1, 0) for one a row.
        scale_dtypes: What the scale may be stored as.
        weight_only: Activations stay in 16 bits.
        exponents: The scales are powers of two, stored as their exponents plus 127 (E8M0).
    """

    name: str
    scale: str
    block: tuple[int, int] | None
    scale_dtypes: frozenset[str]
    input_scale: str | None
    codes: str = "weight"
    weight_only: bool = False
    exponents: bool = False

    @property
    def per_row(self) -> bool:
        return self.block == (1, 0)

    def columns(self, codes: TensorInfo) -> int:
        return codes.shape[-1] if len(codes.shape) == 2 else 0

    def shape_problem(self, codes: TensorInfo) -> str | None:
        columns = self.columns(codes)
        if self.exponents and self.block is not None and columns % self.block[1]:
            return f"in_features {columns} is not a multiple of the block of {self.block[1]}"
        return None

    def parts(self, codes: TensorInfo) -> Mapping[str, Part]:
        rows, columns = codes.shape
        if self.block is None:
            shapes: tuple[tuple[int, ...], ...] = SCALARS
        elif self.per_row:
            # ModelOpt writes one axis, compressed-tensors two; readers take both.
            shapes = ((rows,), (rows, 1))
        else:
            shapes = ((ceil(rows / self.block[0]), ceil(columns / self.block[1])),)
        inputs = {self.input_scale: Part(SCALARS, self.scale_dtypes)} if self.input_scale else {}
        return {self.codes: Part(((rows, columns),), F8), self.scale: Part(shapes, self.scale_dtypes), **inputs}

    @property
    def scalars(self) -> tuple[str, ...]:
        """Suffixes of the scalars, which fused modules share."""
        return (*([self.scale] if self.block is None else []), *([self.input_scale] if self.input_scale else []))


@dataclass(frozen=True)
class Int4Layout:
    """Integers of four bits, eight to one of 32, with a floating-point scale for a group of columns.

    Attributes:
        block: Columns that share a scale.
    """

    name: str
    block: int
    codes: str = "weight_packed"
    input_scale: str | None = None

    def columns(self, codes: TensorInfo) -> int:
        return 8 * codes.shape[-1] if len(codes.shape) == 2 else 0

    def shape_problem(self, codes: TensorInfo) -> str | None:
        columns = self.columns(codes)
        if columns % self.block:
            return f"in_features {columns} is not a multiple of the group of {self.block}"
        return None

    def parts(self, codes: TensorInfo) -> Mapping[str, Part]:
        rows, packed = codes.shape
        return {
            self.codes: Part(((rows, packed),), I32),
            "weight_scale": Part(((rows, ceil(8 * packed / self.block)),), FLOATS),
            "weight_shape": Part(((2,),), I64),
        }

    @property
    def scalars(self) -> tuple[str, ...]:
        """No scale is shared: each group of a row has one."""
        return ()


@dataclass(frozen=True)
class Mxfp4Layout:
    """The experts of GPT-OSS: E2M1 codes in blocks of 32 columns, and an E8M0 exponent for each.

    `blocks` U8 [experts, out, in / 32, 16] and `scales` U8 [experts, out, in / 32]; the codes of a weight are taken for
    a matrix [out, in / 2], the columns of which are cut into blocks on disk.
    """

    name: str = "MXFP4"
    codes: str = "blocks"
    scale: str = "scales"
    block: int = 32
    input_scale: str | None = None

    def columns(self, codes: TensorInfo) -> int:
        return 2 * codes.shape[-1] if len(codes.shape) == 2 else 0

    def shape_problem(self, codes: TensorInfo) -> str | None:
        return None

    def parts(self, codes: TensorInfo) -> Mapping[str, Part]:
        rows, packed = codes.shape
        blocks, in_one = packed // (self.block // 2), self.block // 2
        return {self.codes: Part(((rows, blocks, in_one),), U8), self.scale: Part(((rows, blocks),), U8)}

    @property
    def scalars(self) -> tuple[str, ...]:
        """No scale is shared: each block has one."""
        return ()


Layout = Nvfp4Layout | Fp8Layout | Int4Layout | Mxfp4Layout


def exponents_of(layout: Layout | None) -> str | None:
    """Suffix of the scales that are powers of two, stored as exponents; None for a layout without such."""
    if isinstance(layout, Mxfp4Layout) or (isinstance(layout, Fp8Layout) and layout.exponents):
        return layout.scale
    return None


@dataclass(frozen=True)
class UnjudgedLayout:
    """A known format whose tensors this checker cannot read."""

    name: str


MODELOPT_NVFP4 = Nvfp4Layout("NVFP4", "weight", "weight_scale_2", False, "input_scale")
MODELOPT_W4A16_NVFP4 = Nvfp4Layout("W4A16_NVFP4", "weight", "weight_scale_2", False, None)
MODELOPT_FP8 = Fp8Layout("FP8", "weight_scale", None, F32, "input_scale")
MODELOPT_MXFP8 = Fp8Layout("MXFP8", "weight_scale", (1, 32), U8, None, exponents=True)
MODELOPT_FP8_PER_CHANNEL = Fp8Layout("FP8_PER_CHANNEL_PER_TOKEN", "weight_scale", (1, 0), F32, None)

# What holds the values of a module's weight: as it is, or its codes.
WEIGHT_SUFFIXES = ("weight", "weight_packed", Mxfp4Layout.codes)
# Suffixes that only a quantized module has.
SCALE_SUFFIXES = frozenset({
    "weight_scale", "weight_scale_2", "weight_scale_inv", "weight_global_scale", "weight_packed", "weight_zero_point",
    "weight_shape", "weight_g_idx", "input_scale", "input_global_scale", "input_zero_point", "pre_quant_scale",
    "activation_scale", "qweight", "qzeros", "blocks", "scales", "g_idx",
})  # fmt: skip
KV_SUFFIXES = frozenset({"k_scale", "v_scale"})
CODE_DTYPES = frozenset({"U8", "I8", "I32", "F8_E4M3", "F8_E5M2"})


def is_plain(info: TensorInfo) -> bool:
    return info.dtype in PLAIN_FLOATS


def scale_names(tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """The suffixes among a module's tensors that speak of quantization."""
    return (suffix for suffix in tensors if suffix in SCALE_SUFFIXES)
