"""Packing a weight's slices where they are, and putting packed slices together where they are written.

For every format and layout, packing slices and joining them gives the bytes of packing the whole. Where that cannot be,
because a block or a head straddles slices, the task says `gather_first` and slices are joined before they are packed.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch

from quantplug.export.base import ExportTask, PartOutput
from quantplug.export.dialects import INPUT_SCALE
from quantplug.formats import TensorSpec, WeightFormat
from quantplug.mappings.base import WeightMapping
from quantplug.mappings.layouts import ModelDimensions


def slice_shape(shape: tuple[int, ...], slices: int, mapping: WeightMapping) -> tuple[int, ...]:
    """Shape of each rank's slice of a Megatron tensor that `slices` ranks share."""
    if slices == 1:
        return shape
    axis = mapping.layout.shard_axis
    assert axis is not None, f"{mapping.megatron[0]} is sharded, its layout is not"
    return divided(shape, axis, slices)


def divided(shape: tuple[int, ...], axis: int, slices: int) -> tuple[int, ...]:
    """A shape with one of its axes cut into equal slices."""
    return tuple(size // slices if dim == axis else size for dim, size in enumerate(shape))


def must_gather_first(
    shape: tuple[int, ...], slices: int, mapping: WeightMapping, packing: WeightFormat | None, dims: ModelDimensions
) -> bool:
    """Whether a head or a block straddles the slices, so that they cannot be packed one by one."""
    if slices == 1:
        return False
    if not mapping.layout.cuts_cleanly(slices, dims):
        return True
    parts = _part_shapes(slice_shape(shape, slices, mapping), mapping, dims)
    return packing is not None and any(packing.problem(part) is not None for part in parts)


def travel_specs(task: ExportTask, dims: ModelDimensions) -> tuple[TensorSpec, ...]:
    """What `pack_slice` gives for each slice of a task."""
    shape = slice_shape(task.source.shape, len(task.ranks), task.mapping)
    if task.gather_first:
        return (TensorSpec("slice", shape, task.source.dtype),)
    parts = _part_shapes(shape, task.mapping, dims)
    if task.format is None:
        return tuple(TensorSpec("weight", part, task.dtype) for part in parts)
    return tuple(spec for part in parts for spec in task.format.outputs(part))


def pack_slice(task: ExportTask, weight: torch.Tensor, dims: ModelDimensions) -> list[torch.Tensor]:
    """What one rank delivers of a weight: its slice, packed if it can be; on the weight's device."""
    return [weight] if task.gather_first else _pack_parts(task, weight, dims)


def join_slices(
    task: ExportTask, slices: Sequence[Sequence[torch.Tensor]], dims: ModelDimensions
) -> Iterator[tuple[str, torch.Tensor]]:
    """The output tensors of one weight, where its slices are, from what `pack_slice` gave on each of its ranks."""
    if task.gather_first:
        whole = task.mapping.layout.join(tuple(piece for (piece,) in slices), dims)
        tensors = iter(_pack_parts(task, whole, dims))
    else:
        axis = task.mapping.layout.shard_axis
        tensors = iter([_concatenate(pieces, axis) for pieces in zip(*slices, strict=True)])
    for output in task.outputs:
        named = list(_named(output, tensors, _input_scale(task)))
        yield from named
        for copy in task.copies:
            yield from ((spec.name, tensor) for spec, (_, tensor) in zip(copy.tensors, named, strict=True))


def _part_shapes(shape: tuple[int, ...], mapping: WeightMapping, dims: ModelDimensions) -> tuple[tuple[int, ...], ...]:
    parts = mapping.layout.split(torch.empty(shape, device="meta"), dims)
    return tuple(tuple(part.shape) for part in parts)


def _pack_parts(task: ExportTask, weight: torch.Tensor, dims: ModelDimensions) -> list[torch.Tensor]:
    parts = task.mapping.layout.split(weight, dims)
    if task.format is None:
        return [part.to(task.dtype) for part in parts]
    amax = torch.tensor(task.amax, dtype=torch.float32, device=weight.device)
    return [tensor for part in parts for tensor in task.format.pack(part, amax).tensors.values()]


def _concatenate(pieces: Sequence[torch.Tensor], axis: int | None) -> torch.Tensor:
    """Slices end to end; what has no axes (a scale of the whole weight) is the same on every rank."""
    first = pieces[0]
    if len(pieces) == 1 or first.ndim == 0:
        return first
    assert axis is not None
    # As bytes: not every device concatenates FP8.
    if first.dtype.itemsize == 1:
        return torch.cat([piece.view(torch.uint8) for piece in pieces], dim=axis).view(first.dtype)
    return torch.cat(list(pieces), dim=axis)


def _input_scale(task: ExportTask) -> torch.Tensor | None:
    if task.format is None or task.input_amax is None:
        return None
    return task.format.input_scale(torch.tensor(task.input_amax, dtype=torch.float32))


def _named(
    output: PartOutput, tensors: Iterator[torch.Tensor], input_scale: torch.Tensor | None
) -> Iterator[tuple[str, torch.Tensor]]:
    *packed, last = output.tensors
    specs = packed if last.name.endswith(INPUT_SCALE.name) else output.tensors
    for spec, tensor in zip(specs, islice(tensors, len(specs)), strict=True):
        if spec.shape and tensor.ndim and tensor.shape[0] > spec.shape[0]:
            tensor = tensor[: spec.shape[0]]  # Megatron's padding rows of the vocabulary.
        yield spec.name, tensor.reshape(spec.shape).contiguous()
    if len(specs) < len(output.tensors):
        assert input_scale is not None
        yield last.name, input_scale
