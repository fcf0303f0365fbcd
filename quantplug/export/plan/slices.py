"""The slices of a weight that ranks hold: their shapes, and whether they can be packed one by one.

For every format and layout, packing slices and assembling them gives the bytes of packing the whole. Where that cannot
be, because a block or a head straddles slices, the task says `gather_first`: slices are put together before they are
packed.
"""

from quantplug.export.plan.types import ExportTask, PartOutput
from quantplug.formats import TensorSpec, WeightFormat
from quantplug.mappings.layouts import ModelDimensions, layout_shapes
from quantplug.mappings.rows import WeightMapping


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
    """Whether a head or a block straddles the slices, so that they cannot be packed one by one.

    Args:
        shape: Shape of the whole Megatron tensor.
        slices: How many ranks share it.
        packing: Format of the parts that are packed; None if none is.
    """
    if slices == 1:
        return False
    # For example query groups fewer than ranks, where Megatron cuts through a group, so that a slice has no whole
    # heads.
    if not mapping.layout.cuts_cleanly(slices, dims):
        return True
    wholes = layout_shapes(shape, mapping.layout, dims)
    parts = layout_shapes(slice_shape(shape, slices, mapping), mapping.layout, dims)
    # Where heads are whole, blocks may still be cut: those of 128 rows by slices of 192, those of 16 columns by
    # row-parallel slices of 24. Plain parts have no blocks.
    return packing is not None and any(
        _cuts_a_block(part, whole, packing)
        for name, part, whole in zip(mapping.hf, parts, wholes, strict=True)
        if name not in mapping.high_precision
    )


def _cuts_a_block(part: tuple[int, ...], whole: tuple[int, ...], packing: WeightFormat) -> bool:
    """Whether slices of this shape begin or end amid a block of the whole; along an axis that is not cut, none do."""
    return any(
        # A part that is as large in the slice as in the whole is not cut along that axis; None is an axis that cannot
        # be cut at all.
        size != of_whole and (step is None or size == 0 or size % step != 0)
        for size, of_whole, step in zip(part, whole, packing.cut_steps, strict=True)
    )


def packed_specs(task: ExportTask, part: PartOutput, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
    """The tensors that `pack_rows` makes of rows [rows, columns] of this shape of a part, in its order."""
    return (TensorSpec("weight", shape, part.tensors[0].dtype),) if part.format is None else part.format.outputs(shape)
