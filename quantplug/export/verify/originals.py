"""The weights of a source in FP32, a few rows [out, in] at a time: floating-point tensors, and GPT-OSS's own MXFP4."""

from dataclasses import dataclass

import torch

from quantplug.export.verify import decode, names
from quantplug.export.verify.checkpoint import ITEM_BYTES, Checkpoint, TensorInfo, rows_at_a_time
from quantplug.export.verify.layouts import is_plain
from quantplug.export.verify.matrices import Matrix
from quantplug.export.verify.untrusted import Json, as_object

_MXFP4_BYTES = decode.MXFP4_BLOCK // 2


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
        """FP32 rows [first, last) of one weight."""
        module, suffix = names.split(self.info.name)
        return Matrix(self.source, module, expert, self.transposed).rows(suffix, first, last).float()

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


Original = PlainOriginal | Mxfp4Original


def claims_mxfp4(config: Json) -> bool:
    return as_object(config.get("quantization_config")).get("quant_method") == "mxfp4"


def is_mxfp4(info: TensorInfo) -> bool:
    """A tensor of the experts' MXFP4, by its name."""
    return info.stored != info.name and names.split(info.name)[1] in ("blocks", "scales")


def original_of(source: Checkpoint, info: TensorInfo, transposed: bool | None) -> Original | None:
    """How to read a weight of the source; None for one that cannot be read.

    Args:
        transposed: Whether the tensor is [experts, in, out] in floating point; None where it does not hold all experts.
    """
    if not is_mxfp4(info):
        return PlainOriginal(source, info, bool(transposed)) if is_plain(info) else None
    scales = source.tensors.get(f"{names.split(info.name)[0]}.scales")
    shapes_fit = len(info.shape) == 4 and info.shape[-1] == _MXFP4_BYTES
    if scales is None or not shapes_fit or scales.shape != info.shape[:-1] or {info.dtype, scales.dtype} != {"U8"}:
        return None
    return Mxfp4Original(source, info)
