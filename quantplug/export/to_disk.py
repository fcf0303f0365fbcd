"""From a live Megatron-Core model to a Hugging Face checkpoint, quantized or not: one call a stage."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from quantplug.checkpoint.disk_errors import disk_errors
from quantplug.checkpoint.reader import resolve_source
from quantplug.checkpoint.source_config import SourceConfig, read_source_config
from quantplug.checkpoint.stored_tensors import stored_tensors
from quantplug.errors import RankLostError
from quantplug.export.files.finish import ExportResult, finish, result_of
from quantplug.export.files.shared_directory import require_shared
from quantplug.export.files.staging import Staging, check_destination
from quantplug.export.pipeline.prescan import digest_of, refuse_diverged, scan_weights
from quantplug.export.pipeline.write_rounds import write_tensors
from quantplug.export.plan.build import MAX_SHARD_SIZE, ExportRequest, build_plan
from quantplug.export.plan.types import ExportPlan, Held, Progress, WeightRef, WholeWeight, silent
from quantplug.export.sources.live import Model, live_weights
from quantplug.export.sources.passthrough import carried_refs, has_beside, open_for_carrying
from quantplug.export.sources.rank_inventory import RankSurvey, gather_surveys, whole_weights
from quantplug.findings import Findings
from quantplug.import_hf.to_model import import_mcore_gpt_from_hf
from quantplug.mappings.families import find_family
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.source_fit import fitted
from quantplug.mappings.table import Family
from quantplug.megatron.agreement import all_or_none, gather_objects, require_same
from quantplug.megatron.parallel import current_topology, group_ranks
from quantplug.plugins.rules import judge_rules, refuse_unmatched
from quantplug.topology import ParallelTopology

__all__ = ["ExportResult", "export_mcore_gpt_to_hf", "import_mcore_gpt_from_hf", "plan_export"]


@dataclass(frozen=True)
class PlannedExport:
    """A plan, and what this rank needs to carry out its part of it.

    Attributes:
        source: Directory of the Hugging Face checkpoint that config and tokenizer come from.
        family: The architecture's table.
        held: The weights that this rank holds.
    """

    plan: ExportPlan
    source: Path
    family: Family
    held: Held


Requantize = Callable[[Sequence[WholeWeight], Family], Sequence[WholeWeight]]
"""Gives weights other quantizers than the model's own; called on all ranks with the same weights."""


def plan_export(
    model: Model,
    pretrained_model_name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    moe_router_dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
    calibrated: bool = True,
    carry: bool = True,
    requantize: Requantize | None = None,
) -> PlannedExport:
    """Everything an export would write, or the error it would raise, without touching data or disk. A collective.

    Takes the arguments of `export_mcore_gpt_to_hf`.

    Args:
        calibrated: Whether calibration is over. False plans a model whose quantizers are placed but hold no amax yet:
            what cannot be exported is refused before calibration is paid for.
        carry: Whether tensors of the source that Megatron's model does not hold are planned too.
        requantize: Quantizers to plan with in place of the model's own, which are not looked at then.
    """
    topology = current_topology()
    source = all_or_none(lambda: _read_source(pretrained_model_name_or_path, trust_remote_code))
    family, dims, carried = all_or_none(lambda: _fit(source, topology, carry=carry))
    weights = all_or_none(lambda: live_weights(model))
    refs = (*weights.refs, *carried)
    surveys = gather_surveys(RankSurvey(topology.rank, group_ranks(), refs, weights.unclaimed, judge_rules(model)))

    # From here on every rank works on the same data, and so comes to the same plan or the same error.
    if requantize is None:
        refuse_unmatched(rule for survey in surveys for rule in survey.rules)
    findings = Findings()
    wholes: Sequence[WholeWeight] = whole_weights(surveys, findings)
    findings.raise_if_any()
    unclaimed = tuple(dict.fromkeys(name for survey in surveys for name in survey.unclaimed))
    if requantize is not None:
        wholes, unclaimed = requantize(wholes, family), ()
    stored = all_or_none(lambda: stored_tensors(source.directory))
    request = ExportRequest(
        tied_embeddings=bool(source.values.get("tie_word_embeddings", False)),
        dtype=dtype,
        router_dtype=moe_router_dtype,
        max_shard_size=max_shard_size,
        reference={name: tensor.shape for name, tensor in stored.items()},
        source_types={name: tensor.dtype for name, tensor in stored.items()},
        unclaimed=unclaimed,
        calibrated=calibrated,
    )
    plan = all_or_none(lambda: build_plan(wholes, family, dims, request))
    require_same(plan.digest, "plan", "Call with the same arguments and the same source checkpoint on all ranks.")
    return PlannedExport(plan, source.directory, family, {ref.key: ref for ref in refs})


@torch.no_grad()
def export_mcore_gpt_to_hf(
    model: Model,
    pretrained_model_name_or_path: str | Path,
    export_dir: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    moe_router_dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Progress = silent,
) -> ExportResult:
    """Writes a Megatron-Core model as a Hugging Face checkpoint, quantized as its quantizers say.

    The whole export is planned, then packed one weight at a time into a hidden directory beside `export_dir`, which one
    rename makes visible: after an error `export_dir` does not exist. The model itself is not changed.

    Args:
        model: A `GPTModel` or `MambaModel`, bare or wrapped (Float16Module, DDP), or the list of its virtual stages.
        pretrained_model_name_or_path: Directory or hub id of the Hugging Face model it was built from. Its config says
            names and sizes; its tokenizer and generation files are copied.
        export_dir: A directory that is new or empty.
        dtype: Type of tensors that are not quantized.
        moe_router_dtype: Type of the routers, None for `dtype`.
        trust_remote_code: Whether transformers may run code from the source to read its config.
        max_shard_size: Largest size of one safetensors file in bytes.
        progress: Called as (stage, done, total).

    Raises:
        ArgumentError: A `dtype` or `max_shard_size` that cannot be written.
        DestinationError: `export_dir` is not empty, is not the same directory on all ranks, or is on a file system
            without file locks; or another export left its unfinished files beside it.
        SourceError: The source has no usable config.
        UnsupportedModelError: Its architecture is not supported.
        TopologyError: Megatron's parallel groups are not initialized.
        WriteError: The disk refused a file. What is finished is kept; the same call again goes on from there.
        RankLostError: Another rank ended.
        MappingError: Rules of the quantizer config match nothing, or the model is not the one the config describes.
        ShapeError: The model is not the one that the config describes, or does not divide as its format needs.
        UnsupportedQuantizationError: Quantizers that cannot be written.
        CalibrationError: Enabled quantizers without a usable amax.
        WeightError: NaN or Inf in a weight, or copies on several ranks that differ.
    """
    destination = Path(export_dir)
    topology = current_topology()
    all_or_none(lambda: _check_destination(destination, topology.rank))
    require_shared(destination, topology.rank)
    planned = plan_export(
        model,
        pretrained_model_name_or_path,
        dtype=dtype,
        moe_router_dtype=moe_router_dtype,
        trust_remote_code=trust_remote_code,
        max_shard_size=max_shard_size,
    )
    plan, rank = planned.plan, topology.rank
    marks = all_or_none(lambda: scan_weights(plan.tasks, planned.held, rank, progress))
    refuse_diverged(gather_objects(marks))
    staging = Staging(destination, plan.digest, digest_of(marks), rank, topology.world_size)
    try:
        write_tensors(plan, planned.held, staging, rank, progress)
        all_or_none(lambda: finish(plan, planned.source, staging, dtype) if rank == 0 else None)
    except RankLostError:
        raise  # Others may still write.
    except BaseException:
        staging.discard_unless_resumable()
        raise
    finally:
        staging.close()
    return result_of(plan, destination)


def _read_source(name_or_path: str | Path, trust_remote_code: bool) -> SourceConfig:
    config = read_source_config(resolve_source(name_or_path, weights=False), trust_remote_code)
    family = find_family(config.architecture)
    if not has_beside(config, family, family.dimensions(config.values)):
        return config
    return replace(config, directory=resolve_source(name_or_path))


def _fit(
    source: SourceConfig, topology: ParallelTopology, *, carry: bool
) -> tuple[Family, ModelDimensions, tuple[WeightRef, ...]]:
    """The table for this source, and what this rank brings of it to the export."""
    family = find_family(source.architecture)
    dims = family.dimensions(source.values)
    if carry and has_beside(source, family, dims):
        checkpoint = open_for_carrying(source.directory, family)
        family = fitted(family, checkpoint.tensors, dims)
        return family, dims, tuple(carried_refs(checkpoint, family, topology.rank, topology.world_size))
    return fitted(replace(family, carried=()), stored_tensors(source.directory), dims), dims, ()


def _check_destination(destination: Path, rank: int) -> None:
    with disk_errors(destination, rank):
        check_destination(destination, rank)
