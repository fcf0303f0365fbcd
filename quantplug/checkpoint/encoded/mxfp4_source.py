"""A checkpoint whose experts are in MXFP4, as GPT-OSS is published, read as if it were the plain one.

`X_blocks` [experts, out, in / 32, 16] and `X_scales` [experts, out, in / 32] stand for `X`, which transformers saves as
[experts, in, out]: the other way round. Only the blocks of what is asked for are read and decoded.
"""

from pathlib import Path

import torch

from quantplug.checkpoint.reader import HFCheckpoint, TensorHeader, damaged
from quantplug.errors import Offender
from quantplug.formats import MXFP4, EncodedRows, PackedWeight
from quantplug.formats.constants import MX_BLOCK

METHOD = "mxfp4"

_BLOCKS = "_blocks"
_SCALES = "_scales"


class MXFP4Checkpoint(HFCheckpoint):
    """A directory of safetensors with MXFP4 experts, which it gives as BF16 under their plain names.

    Raises:
        SourceError: As `HFCheckpoint`; or blocks are without scales, or do not have the shapes that belong together.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        stored = self.tensors
        # Biases and norms of the same layers are stored plainly and keep their names.
        bases = {name.removesuffix(_BLOCKS) for name in stored if name.endswith(_BLOCKS)}
        offenders = [
            Offender(base + _BLOCKS, problem)
            for base in sorted(bases)
            if (problem := _problem(stored[base + _BLOCKS], stored.get(base + _SCALES)))
        ]
        if offenders:
            raise damaged(offenders)
        self._packed = {base: (stored[base + _BLOCKS], stored[base + _SCALES]) for base in bases}
        packed_names = {base + suffix for base in bases for suffix in (_BLOCKS, _SCALES)}
        plain = {name: header for name, header in stored.items() if name not in packed_names}
        self.packed_as = dict.fromkeys(bases, MXFP4)
        self.tensors = plain | {base: _plain_header(blocks) for base, (blocks, _) in self._packed.items()}

    def _files_of(self, name: str) -> tuple[str, ...]:
        packed = self._packed.get(name)
        return super()._files_of(name) if packed is None else tuple(header.file for header in packed)

    def read_packed(self, name: str, rows: slice, expert: int | None) -> EncodedRows:
        assert expert is not None, "all experts of a layer are one tensor"
        blocks, scales = self._packed[name]
        codes = self._read(f"{name}{_BLOCKS}", blocks.file, (expert, rows)).flatten(-2)
        exponents = self._read(f"{name}{_SCALES}", scales.file, (expert, rows))
        return EncodedRows(MXFP4, PackedWeight({"weight": codes, "weight_scale": exponents}))

    def read(self, name: str, index: tuple[int | slice, ...] = ()) -> torch.Tensor:
        if name not in self._packed:
            return super().read(name, index)
        # The plain tensor is [experts, in, out], the stored one [experts, out, in / 32, 16]: the caller's columns are
        # inputs here, and blocks run along them.
        expert, columns, rows = (*index, slice(None), slice(None), slice(None))[:3]
        assert isinstance(columns, slice)
        assert isinstance(rows, slice)
        first, last, _ = columns.indices(self.tensors[name].shape[1])
        # Whole blocks of 32 inputs around what is asked for; the values beyond it are cut off once they are decoded.
        covering = slice(first // MX_BLOCK, -(-last // MX_BLOCK))
        blocks, scales = self._packed[name]
        values = unpack_blocks(
            self._read(f"{name}{_BLOCKS}", blocks.file, (expert, rows, covering)),
            self._read(f"{name}{_SCALES}", scales.file, (expert, rows, covering)),
        )
        start = first - covering.start * MX_BLOCK
        # [out, in] to [in, out], as a view: nothing is copied.
        return values[..., start : start + last - first].mT


def unpack_blocks(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The BF16 values [..., K] of blocks uint8 [..., K / 32, 16] and scales uint8 [..., K / 32].

    Exact: a code has one bit of mantissa, and its exponent is one of BF16's; only 4 and 6 times the largest scale
    overflow, to Inf. A scale of 255 is NaN.
    """
    codes = blocks.flatten(-2)
    rows = PackedWeight(
        {
            "weight": codes.reshape(-1, codes.shape[-1]).contiguous(),
            "weight_scale": scales.reshape(-1, scales.shape[-1]).contiguous(),
        }
    )
    return MXFP4.unpack(rows).to(torch.bfloat16).view(*codes.shape[:-1], -1)


def _problem(blocks: TensorHeader, scales: TensorHeader | None) -> str | None:
    if scales is None:
        return f"is without its {_SCALES}"
    # Two codes a byte: 16 bytes are a block of 32.
    if len(blocks.shape) != 4 or blocks.shape[3] * 2 != MX_BLOCK or blocks.shape[:3] != scales.shape:
        return f"has shape {list(blocks.shape)}, its {_SCALES} {list(scales.shape)}"
    if {blocks.dtype, scales.dtype} != {torch.uint8}:
        return f"is {blocks.dtype}, its {_SCALES} {scales.dtype}, not both {torch.uint8}"
    return None


def _plain_header(blocks: TensorHeader) -> TensorHeader:
    """The header of the BF16 tensor [experts, in, out] that blocks of [experts, out, in / 32, 16] stand for."""
    experts, rows, groups, _ = blocks.shape
    return TensorHeader((experts, groups * MX_BLOCK, rows), torch.bfloat16, blocks.file)
