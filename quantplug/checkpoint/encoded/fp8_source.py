"""A checkpoint whose linears are FP8 in blocks, as DeepSeek-V3 and Qwen3 FP8 are published, read as plain BF16.

`X.weight` F8_E4M3 [out, in] and `X.weight_scale_inv` [ceil(out / rows), ceil(in / columns)], which despite its name
multiplies (config.json of deepseek-ai/DeepSeek-V3, `weight_block_size`). Experts in one tensor, `X` [experts, ., .],
have `X_scale_inv`, a table of blocks for each (as vLLM, SGLang and transformers read Qwen3-VL-MoE FP8). Only what is
asked for is read and decoded.
"""

from pathlib import Path

import torch

from quantplug.checkpoint.reader import HFCheckpoint, TensorHeader, damaged
from quantplug.errors import Offender

METHOD = "fp8"

_SCALES = "_scale_inv"
# The last is a power of two alone, 2^(code - 127) (OCP Microscaling Formats v1.0, 5.4.1).
_SCALE_TYPES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)

BlockSize = tuple[int, int]


class FP8Checkpoint(HFCheckpoint):
    """A directory of safetensors with FP8 weights, which it gives as BF16; other tensors are as they are.

    Args:
        block_size: Rows and columns that share a scale.

    Raises:
        SourceError: As `HFCheckpoint`; or an FP8 weight is without scales, or scales do not go with their weight.
    """

    def __init__(self, directory: Path, block_size: BlockSize) -> None:
        super().__init__(directory)
        stored, self._block_size = self.tensors, block_size
        # By type, not by name: the norms, embeddings and routers beside them are BF16 or FP32.
        packed = [name for name, header in stored.items() if header.dtype is torch.float8_e4m3fn]
        scales = {name: name + _SCALES for name in packed}
        offenders = [
            Offender(name, problem)
            for name in sorted(packed)
            if (problem := _problem(stored[name], stored.get(scales[name]), block_size))
        ]
        if offenders:
            raise damaged(offenders)
        self._scales = {name: (scale, stored[scale].file) for name, scale in scales.items()}
        # To a reader the scales are no tensors: they are part of how a weight is written.
        plain = {name: header for name, header in stored.items() if name not in scales.values()}
        decoded = {name: TensorHeader(stored[name].shape, torch.bfloat16, stored[name].file) for name in packed}
        self.tensors = plain | decoded

    def _files_of(self, name: str) -> tuple[str, ...]:
        files = super()._files_of(name)
        # The scales may lie in another file than the codes.
        return (*files, self._scales[name][1]) if name in self._scales else files

    def read(self, name: str, index: tuple[int | slice, ...] = ()) -> torch.Tensor:
        codes = super().read(name, index)
        if name not in self._scales:
            return codes
        shape = self.tensors[name].shape
        # An index may leave out last axes; from here on there is one for each.
        parts = (*index, *(slice(None) for _ in shape))[: len(shape)]
        experts, bounds = parts[:-2], [_bounds(*part) for part in zip(parts[-2:], shape[-2:], strict=True)]
        # Whole blocks around what is asked for: a slice may begin or end inside of one.
        covering = tuple(
            slice(start // block, -(-stop // block))
            for (start, stop), block in zip(bounds, self._block_size, strict=True)
        )
        scales = self._read(*self._scales[name], (*experts, *covering)).float()
        for axis, ((start, stop), block) in enumerate(zip(bounds, self._block_size, strict=True), start=-2):
            # For each row (then column) that is read, the place of its block among the scales that are read. Counted
            # from the end, as an integer index has taken the axis of experts away.
            of_entry = torch.arange(start, stop) // block - start // block
            scales = scales.index_select(axis, of_entry)
        # Multiplied in FP32 and rounded once, as DeepSeek's own `weight_dequant` does (deepseek-ai/DeepSeek-V3,
        # inference/kernel.py).
        return (codes.float() * scales).bfloat16()


def _bounds(part: int | slice, size: int) -> tuple[int, int]:
    assert isinstance(part, slice)
    start, stop, _ = part.indices(size)
    return start, max(start, stop)


def _problem(weight: TensorHeader, scales: TensorHeader | None, block_size: BlockSize) -> str | None:
    if scales is None:
        return f"is FP8 without its *{_SCALES}"
    experts, matrix = weight.shape[:-2], weight.shape[-2:]
    # The last block of an axis may be partial, and has a scale all the same.
    blocks = tuple(-(-size // block) for size, block in zip(matrix, block_size, strict=False))
    if len(weight.shape) not in (2, 3) or scales.shape != (*experts, *blocks):
        return f"has shape {list(weight.shape)}, its *{_SCALES} {list(scales.shape)} for blocks of {list(block_size)}"
    if scales.dtype not in _SCALE_TYPES:
        return f"has *{_SCALES} in {scales.dtype}, not {' or '.join(map(str, _SCALE_TYPES))}"
    return None
