"""The plan of an import: pure, from names, shapes and dtypes alone. What can be wrong is found before data moves."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from quantplug.checkpoint.check_tensors import check_tensors
from quantplug.checkpoint.reader import TensorHeader
from quantplug.errors import MappingError, ShapeError
from quantplug.findings import Findings, Kind, nearest
from quantplug.mappings.layouts import ModelDimensions, VocabularyRows, layout_shapes
from quantplug.mappings.rows import Placement, WeightMapping
from quantplug.mappings.table import Family
from quantplug.megatron.parameters import MegatronParameter

_SAME_MODEL = "Build the model from the config.json of this checkpoint, and pass every model chunk."
_UNKNOWN_PARAMETER = Kind(MappingError, "The model has parameters that the source's architecture has not.", _SAME_MODEL)
_UNUSED_TENSOR = Kind(MappingError, "The source has tensors that no parameter of the model stands for.", _SAME_MODEL)
_SHAPE = Kind(ShapeError, "Shapes in the model do not agree with the source.", _SAME_MODEL)


@dataclass(frozen=True)
class ImportTask:
    """One parameter and where its data comes from.

    Attributes:
        sources: Names of the tensors in the checkpoint, in the order of the layout's parts.
        cuts_cleanly: Whether this rank's slice is merged from slices of them; if not, it is cut from the merged whole.
        placement: Where the data lies in tensors that hold all experts of a layer.
    """

    parameter: MegatronParameter
    mapping: WeightMapping
    sources: tuple[str, ...]
    cuts_cleanly: bool
    placement: Placement | None = None


def plan_import(
    parameters: Iterable[MegatronParameter],
    tensors: Mapping[str, TensorHeader],
    family: Family,
    dims: ModelDimensions,
    tied: bool,
    findings: Findings,
) -> tuple[ImportTask, ...]:
    """Matches every parameter of this rank with tensors of the checkpoint; what does not fit goes into `findings`.

    No collective and no data: the same plan comes out for the same shapes.

    Args:
        parameters: What this rank holds of the model.
        tensors: The checkpoint's tensors by name.
        family: The table of the architecture.
        dims: Sizes of the model, from its config.
        tied: Whether the output layer shares the data of the embedding: its own tensor may then be absent.
        findings: Where everything goes that does not fit; the caller raises it, together with what else is found.

    Returns:
        A task for each parameter that the table knows.
    """
    # The table names every kind of layer of a family; only the config says which layer is of which kind.
    expected = {(names, key.expert): key for names, key in family.expected(dims)}
    aliases = family.tied if tied else {}
    table = family.by_megatron()
    check_tensors(family, dims, tied, tensors, findings)
    tasks = []
    for parameter in parameters:
        key = parameter.key
        mapping = table.get(key.module)
        if mapping is None:
            reason = f"not in the table of {family.name}{nearest(key.module, table)}"
            findings.add(_UNKNOWN_PARAMETER, key.name, reason, key.expert)
            continue
        if (mapping.hf_names(key, dims), key.expert) not in expected:
            reason = f"a model of this config has no {', '.join(mapping.hf_names(key, dims))}"
            findings.add(_UNKNOWN_PARAMETER, key.name, reason, key.expert)
            continue
        # The output layer of a tied model has no tensor of its own on disk: it is filled from the embedding's.
        sources = tuple(aliases.get(name, name) for name in mapping.hf_names(key, dims))
        slices = parameter.shard.count if parameter.shard else 1
        # Where a slice of the merged tensor is merged from slices of its parts, a rank reads only those. Otherwise, as
        # with fewer query groups than ranks, it reads the parts whole and cuts what they make.
        cleanly = mapping.layout.cuts_cleanly(slices, dims)
        mapping = mapping.of_norm(parameter.zero_centred, usual=family.zero_centred)
        task = ImportTask(parameter, mapping, sources, cleanly, mapping.placement(key, dims))
        _check_shapes(task, tensors, dims, findings)
        tasks.append(task)
    return tuple(tasks)


def add_unused(
    used: Iterable[str], tensors: Mapping[str, TensorHeader], family: Family, dims: ModelDimensions, findings: Findings
) -> None:
    """Finds tensors of the architecture that no rank holds a parameter for.

    Args:
        used: Sources of the tasks of all ranks, and names that are tied to one of them.
    """
    # Tensors that no row of the table knows are found elsewhere (`check_tensors`); these are known, and nobody holds
    # them: a chunk or a layer is missing from the model.
    unused = tensors.keys() - set(used)
    for names, key in family.expected(dims):
        for name in names:
            if name in unused:
                findings.add(_UNUSED_TENSOR, name, f"{key.name} is on no rank", key.expert)


def whole_shape(parameter: MegatronParameter) -> tuple[int, ...]:
    """Shape of the whole parameter, of which this rank's tensor is one of `shard.count` equal slices."""
    shape = list(parameter.tensor.shape)
    if parameter.shard is not None:
        shape[parameter.shard.dim] *= parameter.shard.count
    return tuple(shape)


def _check_shapes(
    task: ImportTask, tensors: Mapping[str, TensorHeader], dims: ModelDimensions, findings: Findings
) -> None:
    parameter, layout = task.parameter, task.mapping.layout
    key, shape = parameter.key, whole_shape(parameter)
    # A shape that the layout cannot take apart has no parts whose shapes could be compared.
    problem = layout.problem(shape, dims)
    if problem is not None:
        findings.add(_SHAPE, key.name, problem, key.expert)
        return
    for name, part in zip(task.sources, layout_shapes(shape, task.mapping.layout, dims), strict=True):
        stored = task.placement.stored_shape(part) if task.placement else part
        if name in tensors and tensors[name].shape != stored:
            reason = f"needs {name} of shape {list(stored)}, the source has {list(tensors[name].shape)}"
            findings.add(_SHAPE, key.name, reason, key.expert)


Index = tuple[int | slice, ...]


def part_index(task: ImportTask, stored: tuple[int, ...]) -> Index:
    """What this rank reads of a stored tensor: its expert, and its slice along the sharded axis.

    Args:
        stored: Shape of the tensor in the checkpoint.

    Returns:
        An index for every axis of it: an integer for that of experts, slices for all others.
    """
    axis, rank = task.mapping.layout.shard_axis, len(stored)
    index: list[int | slice] = [slice(None)] * rank
    if task.placement is not None:
        # Tensors of all experts have them on the first axis: [experts, ...]. An integer takes that axis away.
        index[0] = task.placement.expert
        axis = None if axis is None else task.placement.stored_axis(axis, rank - 1)
    if axis is not None:
        index[axis] = slice(*_bounds(task, stored[axis]))
    return tuple(index)


def _bounds(task: ImportTask, size: int) -> tuple[int, int]:
    """Where what this rank reads of `size` entries along the sharded axis starts and ends."""
    shard = task.parameter.shard
    if shard is None or not task.cuts_cleanly:
        return 0, size
    # Ranks hold equal numbers of *padded* rows of a vocabulary; the last ones may hold padding alone.
    if isinstance(task.mapping.layout, VocabularyRows):
        rows = task.parameter.tensor.shape[shard.dim]
    else:
        rows = size // shard.count
    return min(shard.index * rows, size), min((shard.index + 1) * rows, size)
