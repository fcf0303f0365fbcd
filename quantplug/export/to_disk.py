"""From a live Megatron-Core model to a Hugging Face checkpoint, quantized or not: one call a stage."""

from collections.abc import Collection
from pathlib import Path

import torch

from quantplug.checkpoint.disk_errors import disk_errors
from quantplug.checkpoint.side_files import choose_side_files
from quantplug.errors import RankLostError, SourceError
from quantplug.export.files.finish import Beside, ExportResult, finish, result_of, sizes_on_disk
from quantplug.export.files.shared_directory import require_shared
from quantplug.export.files.staging import Staging, check_destination
from quantplug.export.files.write_rounds import Reading, write_tensors
from quantplug.export.live_plan import plan_export
from quantplug.export.pipeline.amaxes import WeightAmax, amaxes_of_wholes, weight_amax_policy
from quantplug.export.pipeline.outliers import refuse_outliers
from quantplug.export.pipeline.prescan import digest_of, prescan, refuse_diverged, require_unchanged, unchanged_rows
from quantplug.export.plan.build import MAX_SHARD_SIZE
from quantplug.export.plan.dialects.table import DialectName
from quantplug.export.plan.types import ExportPlan
from quantplug.export.sources.live import Model
from quantplug.megatron.agreement import all_or_none, gather_objects
from quantplug.megatron.parallel import current_topology, process_groups
from quantplug.progress import Progress, silent

__all__ = ["ExportResult", "export_mcore_gpt_to_hf"]


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
    amax: WeightAmax | str = WeightAmax.CALIBRATED,
    unchecked_settings: Collection[str] = (),
    vocab_size: int | None = None,
    drop_mtp: bool = False,
    dialect: DialectName | str | None = None,
    progress: Progress = silent,
) -> ExportResult:
    """Writes a Megatron-Core model as a Hugging Face checkpoint, quantized as its quantizers say.

    The whole export is planned, then packed one weight at a time into a hidden directory beside `export_dir`, which one
    rename makes visible: after an error `export_dir` does not exist. The model itself is not changed.

    Args:
        model: A `GPTModel` or `HybridModel`, bare or wrapped (Float16Module, DDP), or the list of its virtual stages.
        pretrained_model_name_or_path: Directory or hub id of the Hugging Face model it was built from. Its config says
            names and sizes; its tokenizer and generation files are copied.
        export_dir: A directory that is new or empty.
        dtype: Type of tensors that are not quantized.
        moe_router_dtype: Type of the routers, None for `dtype`.
        trust_remote_code: Whether transformers may run code from the source to read its config; the code is then
            copied, too.
        max_shard_size: Largest size of one safetensors file in bytes.
        amax: What becomes of weights that are larger than their quantizers' amaxes: `calibrated`, an error; `refresh`,
            the amaxes of all weights are taken from the weights as they are, over all slices, those of inputs stay;
            `clip`, they are clipped, as in training with fake quantization.
        unchecked_settings: Settings that are not held against the config, by the names that errors give them: those in
            which the model differs on purpose, and those of config.json that are not converted to Megatron.
        vocab_size: Number of tokens that the model was trained with: so many rows of the embedding and the output layer
            are written, and config.json says it. None for that of the config; a model with more rows than padding
            explains is then refused.
        drop_mtp: Whether layers of multi-token prediction are left out; config.json then counts none.
        dialect: How tensors and config spell the formats, where there are several ways: a `DialectName` or its name,
            `modelopt`, `compressed-tensors` or `deepseek`. None takes what most servers read.
        progress: Called as (stage, done, total), in bytes of the weights that this rank has.

    Raises:
        ArgumentError: A `dtype`, `max_shard_size`, `dialect` or `amax` that cannot be served.
        DestinationError: `export_dir` is not empty, is not the same directory on all ranks, or is on a file system
            without file locks; or another export left its unfinished files beside it.
        SourceError: The source has no usable config, its tokenizer or another file to copy cannot be read, or tensors
            that are carried over from it have changed meanwhile.
        UnsupportedModelError: Its architecture is not supported.
        TopologyError: Megatron's parallel groups are not initialized.
        WriteError: The disk refused a file. What is finished is kept; the same call again goes on from there.
        RankLostError: Another rank ended.
        MappingError: Rules of the quantizer config match nothing, or the model is not the one the config describes.
        ShapeError: The model is not the one that the config describes, or does not divide as its format needs.
        UnsupportedQuantizationError: Quantizers that cannot be written, or not in the dialect.
        CalibrationError: Enabled quantizers without a usable amax, or weights that have grown beyond it.
        WeightError: NaN or Inf in a weight, a value beside which most others would be packed to zero, or copies on
            several ranks that differ.
    """
    destination, policy = Path(export_dir), weight_amax_policy(amax)
    topology = current_topology()
    # What costs nothing comes first: a directory that cannot be used is refused before the model is looked at.
    all_or_none(lambda: _check_destination(destination))
    require_shared(destination, topology.rank)
    planned = plan_export(
        model,
        pretrained_model_name_or_path,
        dtype=dtype,
        moe_router_dtype=moe_router_dtype,
        trust_remote_code=trust_remote_code,
        max_shard_size=max_shard_size,
        unchecked_settings=unchecked_settings,
        vocab_size=vocab_size,
        drop_mtp=drop_mtp,
        dialect=dialect,
    )
    plan, weights, source, rank = planned.plan, planned.weights, planned.source, topology.rank
    side_files = all_or_none(lambda: choose_side_files(source.directory, code=trust_remote_code))
    # One look at all weights, before a byte is written. It needs no other rank, so that they all look at once.
    found = all_or_none(lambda: prescan(plan.tasks, weights, progress, policy=policy))
    # Every rank compares the marks of all, and so raises what the others raise.
    refuse_diverged(gather_objects(found.marks))
    groups = process_groups()
    # Each rank has seen its slices; a scale is one of the whole weight, and of its scale group.
    if policy is WeightAmax.REFRESH:
        plan = plan.with_amaxes(amaxes_of_wholes(plan.tasks, found.amaxes, groups))
    all_or_none(lambda: refuse_outliers(plan.tasks, found.typical, weights))
    beside = Beside(source.directory, source.raw, side_files)
    reading = Reading(unchanged_rows(weights, found.marks), weights.bucket_bytes)
    sizes = all_or_none(lambda: sizes_on_disk(plan, beside, dtype))
    staging = Staging(destination, plan.digest, digest_of(found.marks), rank, topology.world_size)
    try:
        # Files that were finished before a change was seen may have been packed while it was made.
        with staging.discarded_on(SourceError):
            write_tensors(plan, reading, staging, rank, groups, progress, sizes)
            all_or_none(lambda: require_unchanged(plan.tasks, weights, found.marks))
        all_or_none(lambda: _finish_by_first_rank(plan, beside, staging, dtype, rank))
    except RankLostError:
        raise  # Others may still write.
    except BaseException:
        # Errors of the export itself have ended all ranks together, so that nobody writes there any more.
        staging.discard_unless_resumable()
        raise
    finally:
        staging.close()
    return result_of(plan, destination, side_files, source.lost_mtp)


def _check_destination(destination: Path) -> None:
    with disk_errors(destination):
        check_destination(destination)


def _finish_by_first_rank(
    plan: ExportPlan, beside: Beside, staging: Staging, dtype: torch.dtype | None, rank: int
) -> None:
    # All ranks have agreed that what is theirs is on disk. What there is once, and the rename, rank 0 does for all; the
    # others wait for its verdict.
    if rank == 0:
        finish(plan, beside, staging, dtype)
