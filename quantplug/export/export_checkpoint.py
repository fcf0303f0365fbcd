"""From a training checkpoint of Megatron-Core straight to a Hugging Face checkpoint, without building a model.

Needs torch, safetensors and NumPy alone. Names, layouts, plan, packing and files are those of an export of the model
that would be loaded from it, and so are the bytes. Nothing that the checkpoint brings is run: its pickles are read as
plain data.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Self

import torch

from quantplug.checkpoint.config.file import in_megatrons_words
from quantplug.checkpoint.side_files import choose_side_files
from quantplug.checkpoint.torch_dist.aside import Aside
from quantplug.checkpoint.torch_dist.reader import TorchDistReader
from quantplug.choices import EXPORT_FORMATS, PLAIN, Preset
from quantplug.errors import ArgumentError, Offender
from quantplug.export.asked_quantization import AskedQuantization
from quantplug.export.files.finish import Beside, ExportResult
from quantplug.export.files.outcome import Reasons
from quantplug.export.model_free import (
    Amaxes,
    ModelByConfig,
    PlanOf,
    read_model,
    require_free,
    write_or_preview,
)
from quantplug.export.pipeline.amaxes import WeightAmax, amaxes_of_wholes, weight_amax_policy
from quantplug.export.plan.build import MAX_SHARD_SIZE, ExportRequest, build_plan
from quantplug.export.plan.dialects.table import DialectName, dialect_named
from quantplug.export.plan.types import ExportPlan, WholeWeight
from quantplug.export.sources.checkpoint_rows import CheckpointSource
from quantplug.export.sources.hf_directory import (
    FittedTable,
    against,
    fit_table,
    known_tensors,
    resolve_directory,
)
from quantplug.export.sources.passthrough import has_passthrough
from quantplug.export.sources.trained.checkpoint import TrainedCheckpoint
from quantplug.export.sources.trained.norms import with_norms
from quantplug.export.sources.trained.rows import TorchDistSource
from quantplug.export.sources.trained.weights import CheckpointWeights, checkpoint_weights
from quantplug.formats.names import KVCacheFormat, QuantFormat, scales_named
from quantplug.formats.search.candidates import Scales
from quantplug.mappings.keys import ParamKey
from quantplug.progress import Progress, silent
from quantplug.selection.policy import preset_named


@dataclass(frozen=True)
class CheckpointExport(ExportResult):
    """What an export of a training checkpoint wrote.

    Attributes:
        checkpoint: The directory of the iteration that was read.
        aside: What the checkpoint holds beside the model, such as the states of its optimizer.
    """

    checkpoint: Path = Path()
    aside: tuple[Aside, ...] = ()

    @classmethod
    def of(cls, written: ExportResult, checkpoint: Path, aside: tuple[Aside, ...]) -> Self:
        """What was written, and what it was written of."""
        return cls(
            **{each.name: getattr(written, each.name) for each in fields(written)}, checkpoint=checkpoint, aside=aside
        )

    def said(self) -> Iterator[str]:
        """Lines that tell a user what became of the checkpoint, beside its weights."""
        yield f"Read {self.checkpoint}"
        yield from (f"Left aside: {aside}" for aside in self.aside)
        yield from super().said()


@torch.no_grad()
def export_checkpoint(
    checkpoint: str | Path,
    destination: str | Path,
    pretrained_model_name_or_path: str | Path,
    format: QuantFormat | str | None = None,  # noqa: A002  # as on the command line
    *,
    expert_format: QuantFormat | str | None = None,
    group_size: int | None = None,
    iteration: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    moe_router_dtype: torch.dtype | None = None,
    vocab_size: int | None = None,
    exclude: Sequence[str] = (),
    quantize_mtp: bool = False,
    quantize_lm_head: bool = False,
    drop_mtp: bool = False,
    preset: Preset | str = Preset.DEFAULT,
    input_scale: float | None = None,
    scales: Scales | str = Scales.MAX,
    kv_cache: KVCacheFormat | str | None = None,
    dialect: DialectName | str | None = None,
    amax: WeightAmax | str = WeightAmax.CALIBRATED,
    trust_remote_code: bool = False,
    unchecked_settings: Collection[str] = (),
    max_shard_size: int = MAX_SHARD_SIZE,
    revision: str | None = None,
    dry_run: bool = False,
    progress: Progress = silent,
) -> CheckpointExport:
    """Writes a Megatron-Core `torch_dist` checkpoint as a Hugging Face checkpoint, without a model, a GPU or data.

    The checkpoint is read twice, a few rows at a time: to be looked at, then to be packed. Memory does not grow with
    the model. All is written into a hidden directory beside `destination`, which one rename makes visible: after an
    error `destination` does not exist. What the same call left when it was killed is kept.

    Args:
        checkpoint: What Megatron-LM or Megatron-Bridge saved to, one iteration in it, or what
            `dist_checkpointing.save` or `save_checkpoint` wrote, at any parallel layout.
        destination: A directory that is new or empty.
        pretrained_model_name_or_path: Directory or hub id of the Hugging Face model that this is a model of. Its config
            says names and sizes; its tokenizer and generation files are copied.
        format: A `QuantFormat` that needs no data: `w4a16_nvfp4`, `w8a16_fp8`, `fp8_blockwise`, `fp8_dynamic`,
            `mxfp8` or `int4`; or `plain`. None writes a quantized model as its quantizers say, by the amaxes in the
            checkpoint, and another one plain.
        expert_format: With a `format`: that of routed experts, where it is another one, as in `quantize_checkpoint`.
        group_size: With a `format`: how many input features share a scale, as in `quantize_checkpoint`.
        iteration: Which iteration of those that were saved; None for the newest.
        dtype: Type of tensors that are not quantized.
        moe_router_dtype: Type of the routers, None for `dtype`.
        vocab_size: Number of tokens that the model was trained with, where it is not that of the config; config.json
            will then say it.
        exclude: With a `format`: modules that stay in high precision, by exact name in Hugging Face or as shell
            patterns (`model.layers.0.*`).
        quantize_mtp: With a `format`: whether the layers of multi-token prediction are quantized too.
        quantize_lm_head: With a `format`: whether the output layer is quantized too.
        drop_mtp: Whether the layers of multi-token prediction are left out; config.json then counts none.
        preset: With a `format`: which linears are quantized at all, as in `quantize_checkpoint`.
        input_scale: With a `format` that quantizes inputs by scales of their own, `nvfp4` or `fp8`: the scale of all
            of them.
        scales: With a `format`: how the scales of NVFP4's blocks are found, as in `quantize_checkpoint`.
        kv_cache: With a `format`: in which format servers keep keys and values, `fp8_cast` or `nvfp4_cast`; None for
            16 bits. Without a `format` the quantizers in the checkpoint say it.
        dialect: How tensors and config spell the formats, as in `quantize_checkpoint`.
        amax: Of a model that was quantized before: what becomes of weights that are larger than their quantizers'
            amaxes, as in `export_mcore_gpt_to_hf`.
        trust_remote_code: Whether code that the Hugging Face directory brings is carried over; none is run here.
        unchecked_settings: Settings in which the config may differ from those that the trainer noted in the
            checkpoint, by the names that errors give them.
        max_shard_size: Largest size of one safetensors file in bytes.
        revision: Of a Hugging Face model on the hub: branch, tag or commit; None for the newest of its main branch.
        dry_run: Whether nothing is written, and the result says in its `preview` what would be, as in
            `quantize_checkpoint`.
        progress: Called as (stage, done, total), in bytes of the checkpoint.

    Raises:
        ArgumentError: A format, `group_size`, `dialect`, `dtype`, `vocab_size`, `max_shard_size` or `amax` that is not
            served; `scales` that the format has not; an `input_scale` that goes with no input; or `group_size`,
            `expert_format`, `exclude`, `quantize_mtp`, `quantize_lm_head`, `preset`, `input_scale` or `kv_cache`
            without a format that quantizes.
        CheckpointError: There is no such checkpoint or iteration; or it is damaged, or of a format that is not read; or
            it was trained with other settings than the config says.
        DestinationError: `destination` is not empty, or another export left its unfinished files beside it.
        SourceError: The Hugging Face directory has no usable config, or its files to be copied cannot be read; or the
            checkpoint changes while it is read.
        UnsupportedModelError: Its architecture is not supported.
        MappingError: The checkpoint is not the model that the config describes, or a pattern of `exclude` matches
            nothing.
        ShapeError: A shape disagrees with the config, or does not divide as the format needs.
        UnsupportedQuantizationError: A format, or quantizers in the checkpoint, that cannot be written.
        CalibrationError: Quantizers without a usable amax, or weights that have grown beyond it.
        WeightError: NaN or Inf in a weight, or a value beside which most others would be packed to zero.
        WriteError: The disk refused a file. What is finished is kept; the same call again goes on from there.
    """
    policy, spelling = weight_amax_policy(amax), dialect_named(dialect, "dialect")
    asked = _asked(
        format,
        expert_format=expert_format,
        group_size=group_size,
        exclude=exclude,
        quantize_mtp=quantize_mtp,
        quantize_lm_head=quantize_lm_head,
        preset=preset,
        input_scale=input_scale,
        scales=scales,
        kv_cache=kv_cache,
    )
    target, grown = Path(destination), vocab_size is not None
    require_free(target)
    trained = TrainedCheckpoint.open(checkpoint, iteration, drop_mtp=drop_mtp)
    model, table = _read_hf(
        pretrained_model_name_or_path,
        revision,
        trust_remote_code=trust_remote_code,
        has_mtp=trained.has_mtp,
        drop_mtp=drop_mtp,
        vocab_size=vocab_size,
    )
    if asked is not None:
        asked.require_parts(model)
    # Chosen before the work: a tokenizer that cannot be read must not end an export of hours.
    beside = Beside(model.directory, model.config, choose_side_files(model.directory, code=trust_remote_code))
    trained.require_settings(_settings_of(model), unchecked_settings)
    with TorchDistReader(trained.index) as reader:
        held = _held(reader, trained, model, table, grown=grown)
        request = ExportRequest(
            tied_embeddings=model.tied,
            dtype=dtype,
            router_dtype=moe_router_dtype,
            max_shard_size=max_shard_size,
            dialect=spelling,
        )
        request = _against_what_lies_beside(request, model, grown=grown)
        plan_of, kept = _plan_of(asked, held, model, request, policy, as_saved=format is None)
        written = write_or_preview(
            plan_of,
            held.rows,
            beside,
            target,
            dtype,
            progress,
            policy,
            dry_run=dry_run,
            kept=kept,
            lost_mtp=model.lost_mtp,
        )
    return CheckpointExport.of(written, trained.directory, held.found.aside)


def _asked(
    format: QuantFormat | str | None,  # noqa: A002
    *,
    expert_format: QuantFormat | str | None,
    group_size: int | None,
    exclude: Sequence[str],
    quantize_mtp: bool,
    quantize_lm_head: bool,
    preset: Preset | str,
    input_scale: float | None,
    scales: Scales | str,
    kv_cache: KVCacheFormat | str | None,
) -> AskedQuantization | None:
    """What the arguments ask for; None where the checkpoint says what is quantized, or nothing is.

    Raises:
        ArgumentError: As `AskedQuantization.named`; or there is a choice and no format.
        UnsupportedQuantizationError: A format that needs data.
    """
    if format is not None and format != PLAIN:
        return AskedQuantization.named(
            format,
            expert_format=expert_format,
            group_size=group_size,
            exclude=exclude,
            quantize_mtp=quantize_mtp,
            quantize_lm_head=quantize_lm_head,
            preset=preset,
            input_scale=input_scale,
            scales=scales,
            kv_cache=kv_cache,
        )
    _refuse_choices(
        expert_format=expert_format,
        group_size=group_size,
        exclude=exclude,
        quantize_mtp=quantize_mtp,
        quantize_lm_head=quantize_lm_head,
        preset=preset_named(preset, "preset") is not Preset.DEFAULT,
        input_scale=input_scale is not None,
        kv_cache=kv_cache,
    )
    scales_named(scales, "scales", None)
    return None


def _refuse_choices(**given: object) -> None:
    """Refuses choices of what is quantized where the checkpoint says it, or nothing is."""
    offenders = [Offender(name, "is given without a format") for name, value in given.items() if value]
    if offenders:
        raise ArgumentError(
            "What is quantized can be chosen only with a format.",
            offenders,
            f"Name one of {', '.join(EXPORT_FORMATS[:-1])}; else quantizers in the checkpoint say what is quantized.",
        )


def _settings_of(model: ModelByConfig) -> Mapping[str, object]:
    """What its config means, by the names of Megatron-Core."""
    by_config = in_megatrons_words(model.config, model.family, model.directory)
    # What norms multiply with is written, whichever way they were trained.
    return {**by_config.model, **by_config.transformer}


def _read_hf(
    name_or_path: str | Path,
    revision: str | None,
    *,
    trust_remote_code: bool,
    has_mtp: bool,
    drop_mtp: bool,
    vocab_size: int | None,
) -> tuple[ModelByConfig, FittedTable]:
    """The model by its config and by what differs from that, with the table fitted to what lies beside the config."""

    def read(directory: Path) -> ModelByConfig:
        model = read_model(directory, trust_remote_code, model_has_mtp=has_mtp)
        model = model.without_mtp() if drop_mtp else model
        return model if vocab_size is None else model.with_vocabulary(vocab_size)

    def needs_weights(directory: Path) -> bool:
        model = read(directory)
        return has_passthrough(directory, model.config, model.family, model.dims)

    model = read(resolve_directory(name_or_path, needs_weights, revision))
    table = fit_table(model.directory, model.config, model.family, model.dims)
    return replace(model, family=table.family), table


@dataclass(frozen=True)
class _Held:
    """What a training checkpoint holds of a model, with what passes through beside it.

    Attributes:
        found: Of the checkpoint alone.
        weights: All that is to be written, with what quantizers say.
        rows: Where rows of these are.
    """

    found: CheckpointWeights
    weights: tuple[WholeWeight, ...]
    rows: TorchDistSource

    @property
    def without_quantizers(self) -> tuple[WholeWeight, ...]:
        """All weights, as a model has them that was never quantized."""
        return tuple(replace(weight, weight=None, activation=None) for weight in self.weights)


def _held(
    reader: TorchDistReader, trained: TrainedCheckpoint, model: ModelByConfig, table: FittedTable, *, grown: bool
) -> _Held:
    found = checkpoint_weights(reader, model.family, model.dims, trained.padded_to, grown=grown)
    weights = (*with_norms(found.weights, trained.is_zero_centred), *_beside(table))
    beside = None if table.beside is None else CheckpointSource(table.beside, model.dims)
    return _Held(found, weights, TorchDistSource(reader, found.segments, model.dims, beside, found.group_amaxes))


def _beside(table: FittedTable) -> tuple[WholeWeight, ...]:
    """What passes through, one weight for each tensor."""
    if table.beside is None:
        return ()
    rows = [row.megatron[0] for row in table.family.mappings if row.role.is_passthrough]
    headers = ((name, table.beside.tensors[name]) for name in rows)
    return tuple(WholeWeight(ParamKey(name), header.shape, header.dtype) for name, header in headers)


def _against_what_lies_beside(request: ExportRequest, model: ModelByConfig, *, grown: bool) -> ExportRequest:
    """The request, to be held against the tensors beside the config, where there are any."""
    stored = known_tensors(model.directory, model.family, tied=model.tied, rank=0, ranks=1)
    return against(stored, request, model.family, model.dims, grown=grown)


def _plan_of(
    asked: AskedQuantization | None,
    held: _Held,
    model: ModelByConfig,
    request: ExportRequest,
    policy: WeightAmax,
    *,
    as_saved: bool,
) -> tuple[PlanOf, Reasons]:
    """What makes the plan, and why each weight that a format leaves plain stays so.

    Args:
        asked: None for a plan of what quantizers in the checkpoint say, or of nothing that is quantized.
        as_saved: Whether it is that of quantizers.
    """
    if asked is not None:
        return asked.plan_of(held.without_quantizers, model, request)
    if not as_saved:
        return _AsSaved(held.without_quantizers, model, request, policy), {}
    request = replace(request, unclaimed=held.found.unclaimed, attentions=held.found.attentions)
    return _AsSaved(held.weights, model, request, policy), {}


@dataclass(frozen=True)
class _AsSaved:
    """Makes the plan that the quantizers in the checkpoint ask for, or a plain one where there are none."""

    weights: Sequence[WholeWeight]
    model: ModelByConfig
    request: ExportRequest
    policy: WeightAmax

    def __call__(self, amaxes: Amaxes | None) -> ExportPlan:
        plan = build_plan(self.weights, self.model.family, self.model.dims, self.request)
        if amaxes is None or self.policy is not WeightAmax.REFRESH:
            return plan
        return plan.with_amaxes(amaxes_of_wholes(plan.tasks, amaxes, groups={}))
