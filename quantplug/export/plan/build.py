"""The plan of an export: pure, without tensor data.

Whatever can be wrong by name, shape, calibration or setting is raised here, all of it at once, before anything is
packed or written.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from quantplug.errors import ArgumentError, Offender, UnsupportedQuantizationError
from quantplug.export.plan.dialects.dialect import INPUT_SCALE, Dialect, Spelled
from quantplug.export.plan.dialects.table import DialectName, choose_dialect
from quantplug.export.plan.match import Mapped, match_table, part_shapes
from quantplug.export.plan.modules import excluded_modules, quantized_modules
from quantplug.export.plan.ownership import Assignment, assign, in_order
from quantplug.export.plan.quantizers.check import (
    check_calibrated,
    check_output_layer,
    check_quantizers,
    check_served,
    check_shapes,
)
from quantplug.export.plan.quantizers.fused_linears import (
    check_block_borders,
    check_one_scheme,
    group_names,
    with_shared_amaxes,
)
from quantplug.export.plan.quantizers.kv_cache import KVCache, KVQuantizers, check_kv_cache, check_kv_place
from quantplug.export.plan.slices import must_gather_first
from quantplug.export.plan.types import (
    ON_ONE_RANK,
    Constant,
    ExportPlan,
    ExportTask,
    PartOutput,
    QuantConfig,
    QuantizerState,
    Schemes,
    ShardFile,
    WholeWeight,
)
from quantplug.findings import Findings, Kind
from quantplug.formats import BlockFormat, TensorSpec, WeightFormat
from quantplug.formats.names import KVCacheFormat, Scheme
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions, layout_shapes
from quantplug.mappings.rows import Placement, Role, WeightMapping
from quantplug.mappings.table import Family
from quantplug.selection.advice import LeaveOut, by_rules

MAX_SHARD_SIZE = 5 * 10**9
"""Bytes of one file unless a caller says otherwise: what a killed export has not finished of a file is written anew."""

PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_STRADDLE = Kind(
    UnsupportedQuantizationError,
    "Weights have scales of blocks that calibration has found, and are cut between ranks amid a head or a block.",
    "Export at a smaller (expert) tensor parallel size, which does not cut them so; or export the checkpoint.",
)


@dataclass(frozen=True)
class ExportRequest:
    """What is asked of an export, apart from the weights.

    Attributes:
        tied_embeddings: Whether the config ties lm_head to the embeddings.
        dtype: Type of unquantized tensors on disk; None where each keeps its own.
        router_dtype: Type of the routers on disk; None for `dtype`.
        max_shard_size: Largest size of one file in bytes; a larger weight gets a file of its own.
        reference: Shapes of the source checkpoint's tensors by name, as far as they are known.
        source_types: Dtypes of these tensors, likewise.
        unclaimed: Names of enabled quantizers that belong to no weight or input of a linear, nor to a KV cache.
        attentions: What the quantizers of a live model's attention say of a KV cache; none for another source.
        kv_cache: The format of a KV cache that is asked for by name; None where quantizers say it, or for 16 bits.
        calibrated: Whether calibration is over; before it, no amax is asked for.
        leave_out: How a user leaves weights out, for the advice of errors.
        dialect: The dialect that is asked for; None for the default of the formats.
    """

    tied_embeddings: bool = False
    dtype: torch.dtype | None = torch.bfloat16
    router_dtype: torch.dtype | None = None
    max_shard_size: int = MAX_SHARD_SIZE
    reference: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    source_types: Mapping[str, torch.dtype] = field(default_factory=dict)
    unclaimed: Sequence[str] = ()
    attentions: Sequence[KVQuantizers] = ()
    kv_cache: KVCacheFormat | None = None
    calibrated: bool = True
    leave_out: LeaveOut = by_rules
    dialect: DialectName | None = None


def build_plan(
    weights: Sequence[WholeWeight], family: Family, dims: ModelDimensions, request: ExportRequest
) -> ExportPlan:
    """Plans an export of a model's weights, quantized or not, to Hugging Face tensors.

    Raises:
        ArgumentError: A type or size that cannot be written.
        MappingError: Parameters unknown, missing, or there twice.
        ShapeError: A shape disagrees with the checkpoint, does not divide as its format needs, or has a block where
            servers merge or cut.
        UnsupportedQuantizationError: Quantizers that cannot be written, or weights that no server would load so.
        CalibrationError: Enabled quantizers without amax.
    """
    _check_request(request)
    # Checks only note what they find. It is raised where the next step would rest on what is wrong, so that one run
    # names every offender that can be known by then.
    findings = Findings(ranks=any(weight.replicas != ON_ONE_RANK for weight in weights))
    mapped = match_table(weights, family, dims, request.tied_embeddings, findings)
    shapes = {weight.key: part_shapes(weight, row, family, dims, request.reference, findings) for weight, row in mapped}
    findings.raise_if_any()
    # From here on shapes are known to be right, so that what follows may divide and cut them.
    schemes = check_quantizers(mapped, request.unclaimed, findings)
    check_served(mapped, schemes, dims, request.leave_out, findings)
    latent, calibrated = dims.latent is not None, request.calibrated
    kv_cache = check_kv_cache(request.attentions, request.kv_cache, findings, calibrated=calibrated, latent=latent)
    check_shapes(mapped, shapes, schemes, dims, request.leave_out, findings)
    dialect = choose_dialect(mapped, schemes, request.dialect, findings)
    if not findings.found:
        # After all else: where a setting is refused there may be no scheme, and its absence would be told as a second
        # fault.
        check_kv_place(kv_cache, dialect, schemes, findings)
    if dialect is not None:
        check_output_layer(mapped, schemes, dialect, dims, request.leave_out, findings)
    # Before the groups: experts in one tensor are one scale group, written one by one they are none.
    written = {key: row.as_served() for key, row in _rows_written(mapped, schemes, dialect).items()}
    groups = group_names(mapped, written, dims)
    mapped = with_shared_amaxes(mapped, groups, findings)
    check_one_scheme(mapped, groups, schemes, findings)
    check_block_borders(mapped, written, groups, schemes, dims, findings)
    # A group's amax has replaced only usable ones: where one member has none, or a NaN, this still finds it.
    if request.calibrated:
        check_calibrated(mapped, findings)
    findings.raise_if_any()

    assigned = assign([weight for weight, _ in mapped])
    for weight, row in mapped:
        scheme, slices = schemes.get(weight.key), len(assigned[weight.key].ranks)
        is_given = scheme is not None and weight.weight is not None and weight.weight.search.is_given
        if is_given and must_gather_first(weight.shape, slices, row, _format_of(weight, scheme), dims):
            findings.add_weight(_STRADDLE, weight, f"a head or a block of it straddles {slices} slices")
    findings.raise_if_any()

    # Nothing below refuses anything: it says who writes what, into which file and under which name.
    packing = _Packing(dims, request, schemes, dialect, groups, written, kv_cache)
    tasks = tuple(packing.task(weight, row, shapes[weight.key], assigned[weight.key]) for weight, row in mapped)
    excluded = excluded_modules(tasks, family, dims, globs=dialect.reads_globs) if dialect else ()
    modules = quantized_modules(tasks, dims)
    quant_config = dialect.config(modules, excluded, kv_cache.format if kv_cache else None) if dialect else None
    files = _cut_into_files(in_order(tasks), request.max_shard_size)
    return ExportPlan(tasks, dims, excluded, quant_config, files, _digest(tasks, quant_config, files))


def _check_request(request: ExportRequest) -> None:
    types = {"dtype": request.dtype, "moe_router_dtype": request.router_dtype or request.dtype}
    wrong = {name: dtype for name, dtype in types.items() if dtype is not None and dtype not in PLAIN_DTYPES}
    offenders = [Offender(name, f"is {dtype}") for name, dtype in wrong.items()]
    if request.max_shard_size < 1:
        offenders.append(Offender("max_shard_size", f"is {request.max_shard_size}"))
    if offenders:
        names = ", ".join(map(str, PLAIN_DTYPES))
        raise ArgumentError(
            "Arguments of the export cannot be served.",
            offenders,
            f"Plain tensors are written as {names}; a file has at least a byte.",
        )


def _rows_written(mapped: Mapped, schemes: Schemes, dialect: Dialect | None) -> dict[ParamKey, WeightMapping]:
    """The row by which each weight is written.

    Experts that a plain checkpoint holds in one tensor may have to be written one by one: then all of the model are, as
    soon as one is quantized, as readers take all of them in one of the two ways.
    """
    rows = {weight.key: row for weight, row in mapped}
    if dialect is None:
        return rows
    if not dialect.turns_experts:
        return {key: row.unturned() if key in schemes else row for key, row in rows.items()}
    fused_is_read = {scheme.format for scheme in schemes.values()} <= dialect.fused_is_read
    packed = {key: row.when_packed(fused_is_read=fused_is_read) for key, row in rows.items()}
    # vLLM and SGLang build one fused module for the experts of a layer, and take its tensors by one naming only.
    apart = any(weight.weight is not None and packed[weight.key] is not row for weight, row in mapped)
    return packed if apart else rows


@dataclass(frozen=True)
class _Packing:
    """What is the same for all tasks of a plan.

    Attributes:
        schemes: How each quantized linear is packed.
        dialect: How that is spelled on disk; None for a plan without any.
        groups: The scale group of every weight that is in one.
        written: The row by which each weight is written.
        kv_cache: The KV cache that the checkpoint asks for; None for one in 16 bits.
    """

    dims: ModelDimensions
    request: ExportRequest
    schemes: Schemes
    dialect: Dialect | None
    groups: Mapping[ParamKey, str]
    written: Mapping[ParamKey, WeightMapping]
    kv_cache: KVCache | None

    def task(
        self, weight: WholeWeight, mapping: WeightMapping, shapes: tuple[tuple[int, ...], ...], assigned: Assignment
    ) -> ExportTask:
        scheme = self.schemes.get(weight.key)
        packing = _format_of(weight, scheme)
        stored, mapping = mapping, self.written[weight.key]
        # The shapes are those of the stored row: gate and up in one tensor are one part, written one by one they are
        # two.
        if mapping is not stored:
            shapes = layout_shapes(weight.shape, mapping.layout, self.dims)
        # By the row that is written, which may place no expert where the stored one does.
        placement = mapping.placement(weight.key, self.dims)
        plain = self._plain_dtypes(weight, mapping, len(shapes))
        of_parts = [None if pattern in mapping.high_precision else scheme for pattern in mapping.hf]
        # Written under other names than it is stored by, no part is one that the source holds.
        packed_as = weight.packed_as if mapping.hf == stored.hf else ()
        outputs = tuple(
            replace(
                self._output(weight, name, shape, dtype, of_part, placement), as_stored=_is_stored_so(of_part, held)
            )
            for name, shape, dtype, of_part, held in zip(
                mapping.hf_names(weight.key, self.dims),
                shapes,
                plain,
                of_parts,
                packed_as or (None,) * len(shapes),
                strict=True,
            )
        )
        return ExportTask(
            source=weight,
            mapping=mapping,
            stored=stored,
            ranks=assigned.ranks,
            owner=assigned.owner,
            gather_first=must_gather_first(weight.shape, len(assigned.ranks), mapping, packing, self.dims),
            scheme=scheme,
            format=packing,
            amax=weight.weight.amax if weight.weight and scheme else None,
            # One expert's slice is stored as one: transposed, it is no rows of a tensor of all experts.
            row_step=None if placement else 1 if packing is None else packing.cut_steps[0],
            outputs=outputs,
            # A source may hold a copy for every MTP layer, or none: what is written follows it. Where nothing is known
            # of its tensors, every copy is written.
            duplicates=tuple(
                self._output(weight, name, shapes[0], plain[0], scheme, None)
                for name in mapping.duplicate_names(self.dims)
                if not self.request.reference or name in self.request.reference
            ),
            scale_group=self.groups.get(weight.key) if scheme else None,
        )

    def _plain_dtypes(self, weight: WholeWeight, mapping: WeightMapping, parts: int) -> tuple[torch.dtype, ...]:
        """Types on disk of the parts that stay plain."""
        # Where each tensor keeps its own type, parts of one weight may have several. Written by another row than they
        # are stored by they are other parts, which have the one type that holds all values.
        own = weight.part_dtypes if self.request.dtype is None and mapping.dtype is None else ()
        return own if len(own) == parts else (self._plain_dtype(weight, mapping),) * parts

    def _plain_dtype(self, weight: WholeWeight, mapping: WeightMapping) -> torch.dtype:
        # Servers and transformers hold it in this type, whatever the source has it in.
        if mapping.dtype is not None:
            return mapping.dtype
        # From checkpoint to checkpoint: every other plain tensor keeps its own type, routers and norms too.
        if self.request.dtype is None:
            return weight.dtype
        if mapping.keep_source_dtype:
            # The wider of the two: the decay of a delta net (A_log) that is FP32 in the source must not lose bits, nor
            # one in BF16 be kept from the type that was asked for.
            (name,) = mapping.hf_names(weight.key, self.dims)
            return torch.promote_types(self.request.source_types.get(name, self.request.dtype), self.request.dtype)
        return (self.request.router_dtype if mapping.role.is_of_router else None) or self.request.dtype

    def _output(
        self,
        weight: WholeWeight,
        name: str,
        shape: tuple[int, ...],
        plain: torch.dtype,
        scheme: Scheme | None,
        placement: Placement | None,
    ) -> PartOutput:
        """One part of a weight: its tensors, then those that are made of no row of it."""
        tensors = [self._of_all_experts(TensorSpec(name, shape, plain), placement)]
        constants: list[Constant] = []
        reciprocals: frozenset[str] = frozenset()
        if scheme is not None and self.dialect is not None:
            packed = [self._of_all_experts(tensor, placement) for tensor in scheme.weight.outputs(shape)]
            stored = [self.dialect.stored(scheme, name, tensor) for tensor in packed]
            reciprocals = frozenset(it.spec.name for it in stored if it.reciprocal)
            tensors = [it.spec for it in stored]
            if scheme.has_input_scale:
                scale = self.dialect.stored(scheme, name, INPUT_SCALE)
                tensors.append(scale.spec)
                constants += _input_scale(weight.activation, scheme, scale)
            beside = self.dialect.constants(scheme, name, shape)
            tensors += [it.spec for it in beside]
            constants += beside
        of_cache = list(self._cache_scales(weight.key, name))
        return PartOutput(
            name,
            shape,
            (*tensors, *(it.spec for it in of_cache)),
            _format_of(weight, scheme),
            placement,
            (*constants, *of_cache),
            reciprocals,
        )

    def _cache_scales(self, key: ParamKey, name: str) -> Iterator[Constant]:
        """The scales of a KV cache that stand beside a part of a weight, which makes keys or values."""
        # What passes through, such as a vision model, has keys of no cache.
        if self.kv_cache is None or self.dialect is None or self.written[key].role is not Role.LINEAR:
            return
        for scale, value in self.kv_cache.scales_of(key, name, of_cast=self.dialect.scales_of_cast):
            yield Constant(self.dialect.cache_scale(name.removesuffix(".weight"), scale), (value,))

    def _of_all_experts(self, tensor: TensorSpec, placement: Placement | None) -> TensorSpec:
        """The tensor as it is on disk: of one expert's slice, the tensor of all experts that the slice is part of.

        A scale without axes holds for all experts, and is stored once.
        """
        if placement is None or not tensor.shape:
            return tensor
        return replace(tensor, shape=placement.stored_shape(tensor.shape))


def _format_of(weight: WholeWeight, scheme: Scheme | None) -> BlockFormat | None:
    """How a weight is packed: by the format of its scheme, with scales that are found as its quantizer says."""
    return None if scheme is None or weight.weight is None else scheme.weight.searched(weight.weight.search)


def _is_stored_so(scheme: Scheme | None, held: WeightFormat | None) -> bool:
    """Whether a part is written in the format in which the source holds it, all scales of which are its own.

    A scale of the whole tensor may be one that servers want to be that of other tensors too.
    """
    return scheme is not None and scheme.weight == held and not scheme.weight.encoding.has_tensor_scale


def _input_scale(activation: QuantizerState | None, scheme: Scheme, stored: Spelled) -> Iterator[Constant]:
    """The scale of a linear's input; before calibration there is none, and nothing is written of such a plan."""
    if activation is not None and activation.amax is not None:
        scale = scheme.weight.input_scale(torch.tensor(activation.amax, dtype=torch.float32))
        yield Constant(stored.spec, (float(scale.reciprocal() if stored.reciprocal else scale),))


def _cut_into_files(tasks: Sequence[ExportTask], limit: int) -> tuple[ShardFile, ...]:
    """Fills the files of each owner, or of owners that share a tensor, in order up to `limit` bytes.

    A weight's tensors stay together.
    """
    owners: defaultdict[str, set[int]] = defaultdict(set)
    specs: defaultdict[str, dict[str, TensorSpec]] = defaultdict(dict)
    for task in tasks:
        owners[task.unit].add(task.owner)
        specs[task.unit] |= {spec.name: spec for part in task.all_outputs for spec in part.tensors}
    files: list[tuple[tuple[int, ...], list[str]]] = []
    for group in sorted({tuple(sorted(of_unit)) for of_unit in owners.values()}):
        # As if a file were overfull, so that the first weight of a group begins a new one, also where it has no data: a
        # file has one set of owners.
        size = limit + 1
        for unit, of_unit in owners.items():
            if tuple(sorted(of_unit)) != group:
                continue
            nbytes = sum(spec.nbytes for spec in specs[unit].values())
            if size + nbytes > limit:
                files.append((group, []))
                size = 0
            files[-1][1].extend(specs[unit])
            size += nbytes
    count = len(files)
    return tuple(
        # The names that transformers' save_pretrained gives.
        ShardFile(f"model-{number:05d}-of-{count:05d}.safetensors", group, tuple(names))
        for number, (group, names) in enumerate(files, start=1)
    )


def _digest(tasks: Sequence[ExportTask], quant_config: QuantConfig | None, files: tuple[ShardFile, ...]) -> str:
    """SHA-256, in hex, of all that decides which bytes are written, apart from the weights' own."""
    content = {
        "tensors": [
            # repr gives every bit of a float back: an amax that differs in the last one makes other bytes, and finished
            # files of an earlier run must then not be taken over.
            [
                spec.name,
                spec.shape,
                str(spec.dtype),
                repr(task.amax),
                # The name says how scales are found, which changes bytes and nothing else that stands here.
                None if part.format is None else part.format.name,
                [it.values for it in part.constants],
                part.as_stored,
                task.mapping.offset,
            ]
            for task in tasks
            for part in task.all_outputs
            for spec in part.tensors
        ],
        "config": None if quant_config is None else quant_config.config_json,
        "files": [[file.name, file.owners, file.tensors] for file in files],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
