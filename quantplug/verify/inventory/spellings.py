"""What a checkpoint's config says, in our own names of formats and of their spellings on disk."""

from quantplug.choices import DialectName, QuantFormat
from quantplug.verify.inventory.layouts import Fp8Layout, Int4Layout, Layout, Mxfp4Layout, Nvfp4Layout

_DIALECTS = {
    "modelopt": DialectName.MODELOPT,
    "fp8": DialectName.DEEPSEEK,
    "compressed-tensors": DialectName.COMPRESSED_TENSORS,
    "mxfp4": DialectName.MXFP4,
}
_MX_BLOCK = (1, 32)


def dialect_of(method: str) -> DialectName | None:
    """The spelling of a `quant_method`; None for one that is not judged."""
    return _DIALECTS.get(method)


def format_of(method: str, layout: Layout | None) -> QuantFormat | None:
    """The public name of a layout; None for one that quantplug does not write.

    Args:
        method: As in `DeclaredScheme`.
    """
    match layout:
        case Nvfp4Layout():
            # By its name: compressed-tensors' inputs may be scaled as they come, without a scale on disk.
            return QuantFormat.NVFP4 if layout.name == "NVFP4" else QuantFormat.W4A16_NVFP4
        case Int4Layout():
            return QuantFormat.INT4
        case Mxfp4Layout():
            return QuantFormat.MXFP4
        case Fp8Layout():
            return _of_fp8(method, layout)
        case None:
            return None


def code_bits(layout: Layout) -> int:
    """Bits of a code."""
    return 8 if isinstance(layout, Fp8Layout) else 4


def _of_fp8(method: str, layout: Fp8Layout) -> QuantFormat | None:
    if layout.exponents and layout.block == _MX_BLOCK:
        return QuantFormat.MXFP8
    if layout.per_row:
        # ModelOpt spells rows otherwise, and vendors scale inputs by a static scale; we write neither.
        is_dynamic = method == "compressed-tensors" and not layout.weight_only and layout.input_scale is None
        return QuantFormat.FP8_DYNAMIC if is_dynamic else None
    if layout.block is not None:
        return QuantFormat.FP8_BLOCKWISE
    if layout.input_scale is not None:
        return QuantFormat.FP8
    return QuantFormat.W8A16_FP8 if layout.weight_only else None
