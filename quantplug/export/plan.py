"""The plan of an export: pure, without tensor data.

Whatever can be wrong by name, shape, calibration or setting is raised here, all of it at once, before anything is
packed or written.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from quantplug.export.base import ExportPlan, ExportTask, PartOutput, QuantConfig, WeightRef
from quantplug.export.coverage import match_table, part_shapes
from quantplug.export.dialects import INPUT_SCALE, Dialect, dialect_for
from quantplug.export.findings import Findings
from quantplug.export.quantizers import check_calibrated, check_quantizers
from quantplug.export.scheme import Scheme
from quantplug.formats import TensorSpec
from quantplug.mappings.base import Family, Role, WeightMapping
from quantplug.mappings.layouts import ModelDimensions

MAX_SHARD_SIZE = 5 * 10**9


@dataclass(frozen=True)
class ExportRequest:
    """What is asked of an export, apart from the weights.

    Attributes:
        tied_embeddings: Whether the config ties lm_head to the embeddings.
        dtype: Type of unquantized tensors on disk.
        router_dtype: Type of the routers on disk; None for `dtype`.
        max_shard_size: Largest size of one file in bytes; a larger tensor gets a file of its own.
        reference: Shapes of the source checkpoint's tensors by name, as far as they are known.
        unclaimed: Names of enabled quantizers that belong to no weight or input of a linear.
        calibrated: Whether calibration is over; before it, no amax is asked for.
        rank: Global rank, for messages.
    """

    tied_embeddings: bool = False
    dtype: torch.dtype = torch.bfloat16
    router_dtype: torch.dtype | None = None
    max_shard_size: int = MAX_SHARD_SIZE
    reference: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    unclaimed: Sequence[str] = ()
    calibrated: bool = True
    rank: int = 0


def build_plan(refs: Iterable[WeightRef], family: Family, dims: ModelDimensions, request: ExportRequest) -> ExportPlan:
    """Plans an export of a model's weights, quantized or not, to Hugging Face tensors.

    Raises:
        MappingError: Parameters unknown, missing, or there twice.
        ShapeError: A shape disagrees with the checkpoint, or does not divide as its format needs.
        UnsupportedQuantizationError: Quantizers that cannot be written.
        CalibrationError: Enabled quantizers without amax.
    """
    findings = Findings(request.rank)
    mapped = match_table(refs, family, dims, request.tied_embeddings, findings)
    shapes = {ref.key: part_shapes(ref, mapping, dims, request.reference, findings) for ref, mapping in mapped}
    findings.raise_if_any()
    scheme = check_quantizers(mapped, shapes, request.unclaimed, findings)
    if request.calibrated:
        check_calibrated(mapped, findings)
    findings.raise_if_any()

    dialect = dialect_for(scheme) if scheme else None
    tasks = tuple(_task(ref, mapping, shapes[ref.key], scheme, dialect, request) for ref, mapping in mapped)
    excluded = _excluded_modules(tasks, family) if dialect else ()
    quant_config = dialect.config(excluded) if dialect else None
    specs = [spec for task in tasks for part in task.outputs for spec in part.tensors]
    shards = _cut_into_shards(specs, request.max_shard_size)
    return ExportPlan(tasks, dims, excluded, quant_config, shards, _digest(tasks, quant_config, shards))


def _task(
    ref: WeightRef,
    mapping: WeightMapping,
    shapes: tuple[tuple[int, ...], ...],
    scheme: Scheme | None,
    dialect: Dialect | None,
    request: ExportRequest,
) -> ExportTask:
    names = mapping.hf_names(ref.key)
    dtype = request.router_dtype if mapping.role is Role.ROUTER and request.router_dtype else request.dtype
    if ref.weight is None or scheme is None or dialect is None:
        outputs = tuple(
            PartOutput(name, shape, (TensorSpec(name, shape, dtype),))
            for name, shape in zip(names, shapes, strict=True)
        )
        return ExportTask(ref, mapping, None, None, None, dtype, outputs)
    outputs = tuple(
        PartOutput(name, shape, _packed_specs(name, shape, scheme, dialect))
        for name, shape in zip(names, shapes, strict=True)
    )
    input_amax = ref.activation.amax if ref.activation else None
    return ExportTask(ref, mapping, scheme.weight, ref.weight.amax, input_amax, dtype, outputs)


def _packed_specs(name: str, shape: tuple[int, ...], scheme: Scheme, dialect: Dialect) -> tuple[TensorSpec, ...]:
    tensors = scheme.weight.outputs(shape)
    if scheme.activations:
        tensors = (*tensors, INPUT_SCALE)
    return tuple(dialect.spec(name.removesuffix(".weight"), tensor) for tensor in tensors)


def _excluded_modules(tasks: Sequence[ExportTask], family: Family) -> tuple[str, ...]:
    """Exact names of the modules with a matrix product that stay unquantized.

    A tied lm_head has no tensor of its own, but servers build the module and look it up.
    """
    names = [
        part.name
        for task in tasks
        if task.format is None and task.mapping.role is not Role.OTHER
        for part in task.outputs
    ]
    return tuple(sorted({name.removesuffix(".weight") for name in (*names, *family.tied)}))


def _cut_into_shards(specs: Sequence[TensorSpec], limit: int) -> tuple[tuple[str, ...], ...]:
    """Fills files in order up to `limit` bytes each."""
    shards: list[list[str]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(spec.name)
        size += spec.nbytes
    return tuple(tuple(shard) for shard in shards)


def _digest(tasks: Sequence[ExportTask], quant_config: QuantConfig | None, shards: tuple[tuple[str, ...], ...]) -> str:
    content = {
        "tensors": [
            [spec.name, spec.shape, str(spec.dtype), repr(task.amax), repr(task.input_amax)]
            for task in tasks
            for part in task.outputs
            for spec in part.tensors
        ],
        "config": None if quant_config is None else quant_config.config_json,
        "shards": shards,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
