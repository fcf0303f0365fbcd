"""How often each code and each scale occurs: what tells a searched scale from one by max, and a lost one from both."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod

import torch

from quantplug.verify.inventory.checkpoint import ITEM_BYTES, Checkpoint, TensorInfo
from quantplug.verify.inventory.layouts import Fp8Layout, Int4Layout, Layout, Mxfp4Layout, Nvfp4Layout
from quantplug.verify.inventory.modules import Module
from quantplug.verify.numbers.decode import E2M1_VALUES, E4M3_VALUES, E8M0_VALUES
from quantplug.verify.values import Values

# Codes that are looked at, of all weights together: as many as a reader waits for, and far more than a chart can show.
_SAMPLED_BYTES = 512 * 1024 * 1024
_LEAST_SAMPLED, _MOST_SAMPLED = 4 * 1024, 1024 * 1024  # of one weight
_PIECES = 8  # of a weight, evenly spread, so that no corner of it stands for the whole
_LARGEST_E2M1, _LARGEST_E4M3, _LARGEST_INT4 = 6.0, 448.0, 8.0
_EIGHT_BITS = frozenset({"U8", "F8_E4M3", "F8_E8M0"})


@dataclass
class Histogram:
    """How often a value occurs; `of` is how many values were counted of how many there are."""

    counts: Counter[float] = field(default_factory=Counter)
    counted: int = 0
    of: int = 0

    def add(self, other: "Histogram") -> None:
        self.counts.update(other.counts)
        self.counted += other.counted
        self.of += other.of

    def sorted(self) -> tuple[tuple[float, int], ...]:
        """(value, count), from the smallest value on."""
        return tuple(sorted(self.counts.items()))


@dataclass(frozen=True)
class ScalesFound:
    """The scales of one weight.

    Attributes:
        amax: The largest scale times the largest code; see `QuantizedWeight`.
        spread: By value; None where the weight has one scale alone.
    """

    amax: float
    spread: Histogram | None


def samples_of(weights: int) -> int:
    """Bytes of codes to look at of each of so many weights."""
    return min(_MOST_SAMPLED, max(_LEAST_SAMPLED, _SAMPLED_BYTES // max(1, weights)))


def of_codes(checkpoint: Checkpoint, module: Module, most: int) -> Histogram:
    """The codes of a sound module, by the value that each stands for before it is scaled.

    Args:
        most: Bytes to read, about.

    Raises:
        UnreadableTensorError: The file cannot give them.
    """
    layout = _layout(module)
    info = module.tensors[layout.codes]
    counts = torch.zeros(256, dtype=torch.int64)
    for rows in _sampled(checkpoint, info, most):
        counts += torch.bincount(rows.view(torch.uint8).flatten().int(), minlength=256)
    a_byte = 1 if isinstance(layout, Fp8Layout) else 2
    found = Histogram(counted=int(counts.sum()) * a_byte, of=info.nbytes * a_byte)
    for byte, count in enumerate(counts.tolist()):
        if not count:
            continue
        for value in _values(layout, byte):
            # NaN is no value that a chart has a place for, and a finding of the judge's. -0 and 0 are one value here.
            if not math.isnan(value):
                found.counts[value + 0.0] += count
    return found


def of_scales(checkpoint: Checkpoint, module: Module, values: Values) -> ScalesFound:
    """All scales of a sound module.

    Args:
        values: What the judge has kept of them; what it has not is read.

    Raises:
        UnreadableTensorError: The file cannot give them.
    """
    layout = _layout(module)
    info = module.tensors[_scales(layout)]
    largest, spread = 0.0, Histogram(of=prod(info.shape))
    for of_rows, counted in _counted(checkpoint, info, layout, values):
        largest = max(largest, of_rows)
        for value, count in counted:
            spread.counts[value] += count
            spread.counted += count
    if isinstance(layout, Nvfp4Layout):
        tensor_scale = _scalar(checkpoint, module.tensors[layout.tensor_scale].name, values)
        # compressed-tensors stores what ModelOpt's is the reciprocal of.
        largest *= (1 / tensor_scale if tensor_scale else math.inf) if layout.reciprocal else tensor_scale
    return ScalesFound(largest * _largest_code(layout), spread if spread.of > 1 else None)


def _layout(module: Module) -> Layout:
    assert module.layout is not None, "only sound modules are asked, and these have one"
    return module.layout


def _scales(layout: Layout) -> str:
    """Suffix of the scales of blocks, groups or rows, or of the one scale."""
    return layout.scale if isinstance(layout, Fp8Layout | Mxfp4Layout) else "weight_scale"


def _largest_code(layout: Layout) -> float:
    match layout:
        case Fp8Layout():
            return _LARGEST_E4M3
        case Int4Layout():
            return _LARGEST_INT4
        case Nvfp4Layout() | Mxfp4Layout():
            return _LARGEST_E2M1


def _values(layout: Layout, byte: int) -> tuple[float, ...]:
    """What a byte of codes stands for: one E4M3 value, or two of four bits."""
    match layout:
        case Fp8Layout():
            return (E4M3_VALUES[byte].item(),)
        case Int4Layout():
            return ((byte & 15) - 8.0, (byte >> 4) - 8.0)
        case Nvfp4Layout() | Mxfp4Layout():
            return (E2M1_VALUES[byte & 15].item(), E2M1_VALUES[byte >> 4].item())


def _scalar(checkpoint: Checkpoint, name: str, values: Values) -> float:
    return values.scalars[name] if name in values.scalars else float(checkpoint.read(name).reshape(()))


def _counted(
    checkpoint: Checkpoint, info: TensorInfo, layout: Layout, values: Values
) -> Iterator[tuple[float, Iterable[tuple[float, int]]]]:
    """Of each part of a tensor the largest scale, and (scale, how often) of all."""
    if info.dtype in _EIGHT_BITS and info.name in values.scales:
        yield _of_bytes(info, layout, values.scales[info.name])
    elif info.name in values.scalars:
        yield _of_rows(info, layout, torch.tensor(values.scalars[info.name], dtype=torch.float64))
    else:
        yield from (_of_rows(info, layout, rows) for _, rows in checkpoint.chunks(info.name))


def _of_rows(info: TensorInfo, layout: Layout, rows: torch.Tensor) -> tuple[float, Iterable[tuple[float, int]]]:
    """The largest scale, and (scale, how often): each value of eight bits; of others the quarter of an octave."""
    if info.dtype in _EIGHT_BITS:
        return _of_bytes(info, layout, torch.bincount(rows.view(torch.uint8).flatten(), minlength=256))
    scales = rows.double().flatten()
    scales = scales[(scales > 0) & scales.isfinite()]
    kinds, counts = ((scales.log2() * 4).floor() / 4).exp2().unique(return_counts=True)
    return (scales.max().item() if len(scales) else 0.0), zip(kinds.tolist(), counts.tolist(), strict=True)


def _of_bytes(info: TensorInfo, layout: Layout, counts: torch.Tensor) -> tuple[float, Iterable[tuple[float, int]]]:
    """As `_of_rows`, of how often each byte occurs."""
    exponents = isinstance(layout, Mxfp4Layout) or (isinstance(layout, Fp8Layout) and layout.exponents)
    values = E8M0_VALUES if exponents or info.dtype == "F8_E8M0" else E4M3_VALUES
    # NaN is no value that a chart has a place for, and a finding of the judge's.
    present = (counts.bool() & values.isfinite()).nonzero().flatten()
    kinds = values[present]
    return (kinds.max().item() if len(kinds) else 0.0), zip(kinds.tolist(), counts[present].tolist(), strict=True)


def _sampled(checkpoint: Checkpoint, info: TensorInfo, most: int) -> Iterator[torch.Tensor]:
    """Rows of a tensor, evenly spread over it, `most` bytes in all or one row of each piece."""
    rows, row_bytes = info.shape[0], prod(info.shape[1:]) * ITEM_BYTES[info.dtype]
    if info.nbytes <= most:
        yield from (part for _, part in checkpoint.chunks(info.name))
        return
    pieces = min(_PIECES, rows)
    step = max(1, most // pieces // max(1, row_bytes))
    for piece in range(pieces):
        first = piece * rows // pieces
        yield checkpoint.rows(info.name, first, min(first + step, rows))
