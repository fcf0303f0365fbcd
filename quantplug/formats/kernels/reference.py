"""The kernels in plain PyTorch, on any device and for any encoding: what the others must equal in every bit.

The weight is worked on a few rows at a time, so that its FP32 form is never held whole.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from quantplug.formats.encoding import Block, Encoding
from quantplug.formats.kernels.chunks import CHUNK_ELEMENTS, fp32_row_chunks
from quantplug.formats.kernels.protocol import Encoded, Loops
from quantplug.formats.search.candidates import BY_MAX
from quantplug.formats.search.reference import found_scales

# Integers as wide as an element, whatever its type: sums of bits are exact, where sums of floats depend on their order.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def amax(weight: torch.Tensor) -> torch.Tensor:
    largest = torch.zeros((), device=weight.device)
    for chunk in fp32_row_chunks(weight):
        # In place: a list of small results would settle between the chunks, and the heap grow to an FP32 copy.
        torch.maximum(largest, chunk.abs().amax(), out=largest)
    return largest


def bit_sums(weight: torch.Tensor) -> tuple[int, int]:
    rows = weight.detach().view(_INTEGERS[weight.dtype.itemsize]).reshape(weight.shape[0], -1)
    by_row, by_column = (rows.new_zeros(size, dtype=torch.int64) for size in rows.shape)
    # A few rows at a time: a sum of 16-bit integers makes a 64-bit copy of all of them.
    step = max(1, CHUNK_ELEMENTS // rows.shape[1])
    for chunk, of_rows in zip(rows.split(step), by_row.split(step), strict=True):
        wide = chunk.long()
        of_rows.copy_(wide.sum(dim=1))
        by_column += wide.sum(dim=0)
    return _weighted(by_row), _weighted(by_column)


def pack(encoding: Encoding, weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    for weight, of_weight in zip(weights, encoded.of_each(), strict=True):
        _pack_one(encoding, weight, of_weight)


def unpack(encoding: Encoding, encoded: Encoded, values: torch.Tensor) -> None:
    for of_weight, of_values in zip(encoded.of_each(), values, strict=True):
        _unpack_one(encoding, of_weight, of_values)


def loops_for(encoding: Encoding) -> Loops:
    """These kernels for one encoding, for the tables of sets that have no loops of their own for it."""
    return Loops(partial(pack, encoding), partial(unpack, encoding))


def _pack_one(encoding: Encoding, weight: torch.Tensor, encoded: Encoded) -> None:
    encode, block_rows = encoding.code.encode, encoding.block.rows or 1
    for rows, values in _numbered(fp32_row_chunks(weight, row_multiple=block_rows)):
        if encoded.blocks is None:
            # By a scalar tensor on the weight's device: by a Python number CUDA would multiply with the reciprocal.
            encoded.codes[rows] = encode(values / encoded.tensor_scales)
            continue
        # [blocks below each other, rows of one, blocks side by side, columns of one]: axes 1 and 3 are within a block.
        blocks = _in_blocks(values, encoding.block)
        scales = encoded.block_scales[_in_steps(rows, block_rows)]
        if not encoding.search.is_given:
            scales.copy_(_scales(encoding, blocks, encoded))
        # Divided by the scale as the reader will see it, after its rounding to the type that it is stored in.
        quotients = blocks / _multipliers(encoding, scales, encoded)
        encoded.codes[rows] = encode(_in_rows(quotients, values.shape))


def _unpack_one(encoding: Encoding, encoded: Encoded, values: torch.Tensor) -> None:
    block_rows = encoding.block.rows or 1
    for rows in _row_slices(values, row_multiple=block_rows):
        decoded = encoding.code.decode(encoded.codes[rows])
        if encoded.blocks is None:
            torch.mul(decoded, encoded.tensor_scales, out=values[rows])
            continue
        scales = encoded.block_scales[_in_steps(rows, block_rows)]
        blocks = _in_blocks(decoded, encoding.block) * _multipliers(encoding, scales, encoded)
        values[rows] = _in_rows(blocks, decoded.shape)


def _scales(encoding: Encoding, blocks: torch.Tensor, encoded: Encoded) -> torch.Tensor:
    if encoding.search == BY_MAX:
        return encoding.scale.from_amax(blocks.abs().amax((1, 3)), _largest(encoding, encoded))
    return found_scales(encoding, blocks, encoded.tensor_scales, encoded.importance)


def _largest(encoding: Encoding, encoded: Encoded) -> torch.Tensor:
    """The FP32 scalar by which a block's amax is divided to give its scale.

    It is the largest code, times the scale of the tensor where there is one, which is a part of every value already.
    """
    largest = torch.full((), encoding.code.largest, device=encoded.codes.device)
    return largest if encoded.whole is None else largest * encoded.whole


def _multipliers(encoding: Encoding, scales: torch.Tensor, encoded: Encoded) -> torch.Tensor:
    """The FP32 factors of the values of codes, one a block and shaped to broadcast over it: [n, 1, m, 1]."""
    multipliers = encoding.scale.decode(scales)
    # The two scales are multiplied before any code is: FP32 products in another order differ in their last bits.
    if encoded.whole is not None:
        multipliers = multipliers * encoded.whole
    return multipliers[:, None, :, None]


def _weighted(sums: torch.Tensor) -> int:
    """The sum of int64 sums, number i taken 2i + 1 times, modulo 2^64: int64 wraps on every device."""
    places = torch.arange(1, sums.numel() + 1, device=sums.device) * 2 - 1
    return int((sums * places).sum()) % 2**64


def _numbered(chunks: Iterator[torch.Tensor]) -> Iterator[tuple[slice, torch.Tensor]]:
    """Each chunk with the rows that it is."""
    start = 0
    for chunk in chunks:
        yield slice(start, start + chunk.shape[0]), chunk
        start += chunk.shape[0]


def _row_slices(values: torch.Tensor, row_multiple: int = 1) -> Iterator[slice]:
    """The rows in order, a few at a time: as many as `fp32_row_chunks` gives."""
    rows, row_elements = values.shape
    step = max(CHUNK_ELEMENTS // (row_elements * row_multiple), 1) * row_multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _in_steps(rows: slice, step: int) -> slice:
    """The blocks, `step` rows each, that rows from the beginning of a block are in; the last may be partial."""
    return slice(rows.start // step, -(-rows.stop // step))


def _in_blocks(rows: torch.Tensor, block: Block) -> torch.Tensor:
    """[n, in] as [blocks, rows of one, blocks side by side, columns of one]; partial blocks are filled up with zeros.

    A zero changes no amax, and what is made of it is cut off again.
    """
    count, columns = rows.shape
    height, width = block.rows or 1, block.columns or columns
    missing = (-count % height, -columns % width)
    # The fill lies at the right and the lower edge, so no value changes its block.
    if any(missing):
        rows = torch.nn.functional.pad(rows, (0, missing[1], 0, missing[0]))
    return rows.view(rows.shape[0] // height, height, rows.shape[1] // width, width)


def _in_rows(blocks: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Undoes `_in_blocks`."""
    below, height, beside, width = blocks.shape
    return blocks.view(below * height, beside * width)[: shape[0], : shape[1]]
