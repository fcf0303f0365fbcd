"""From a live Megatron-Core model to a Hugging Face checkpoint, quantized or not: one call a stage."""

from dataclasses import dataclass
from pathlib import Path

import torch

from quantplug.atomic import staged_directory
from quantplug.errors import Offender, TopologyError
from quantplug.export.base import ExportPlan, Progress
from quantplug.export.hf_config import copy_side_files, write_configs
from quantplug.export.hf_source import resolve_source
from quantplug.export.importer import import_mcore_gpt_from_hf
from quantplug.export.pack import pack_task, scan_weights
from quantplug.export.plan import MAX_SHARD_SIZE, ExportRequest, build_plan
from quantplug.export.source import Model, live_weights
from quantplug.export.source_config import read_source_config, reference_shapes
from quantplug.export.writer import SafetensorsSink, check_destination
from quantplug.mappings.families import find_family
from quantplug.megatron.parallel import current_topology
from quantplug.plugins.rules import check_rules
from quantplug.topology import ParallelTopology

__all__ = ["ExportResult", "export_mcore_gpt_to_hf", "import_mcore_gpt_from_hf", "plan_export"]


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    Attributes:
        algorithm: Short name of the quantization, None for an export without one.
        tensors: Number of tensors on disk.
        nbytes: Their size.
        shards: Number of safetensors files.
    """

    directory: Path
    algorithm: str | None
    tensors: int
    nbytes: int
    shards: int


def silent(stage: str, done: int, total: int) -> None:
    """The progress callback of a caller who wants none."""


def plan_export(
    model: Model,
    pretrained_model_name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    moe_router_dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
    calibrated: bool = True,
) -> ExportPlan:
    """Everything an export would write, or the error it would raise, without touching data or disk.

    Takes the arguments of `export_mcore_gpt_to_hf`.

    Args:
        calibrated: Whether calibration is over. False plans a model whose quantizers are placed but hold no amax yet:
            what cannot be exported is refused before calibration is paid for.
    """
    source = read_source_config(resolve_source(pretrained_model_name_or_path, weights=False), trust_remote_code)
    topology = current_topology()
    _refuse_parallel(topology)
    family = find_family(source.architecture)
    refs, unclaimed = live_weights(model)
    check_rules(model, topology.rank)
    request = ExportRequest(
        tied_embeddings=bool(source.values.get("tie_word_embeddings", False)),
        dtype=dtype,
        router_dtype=moe_router_dtype,
        max_shard_size=max_shard_size,
        reference=reference_shapes(source.directory),
        unclaimed=unclaimed,
        calibrated=calibrated,
        rank=topology.rank,
    )
    return build_plan(refs, family, family.dimensions(source.values), request)


@torch.no_grad()
def export_mcore_gpt_to_hf(
    model: Model,
    pretrained_model_name_or_path: str | Path,
    *,
    export_dir: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    moe_router_dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Progress = silent,
) -> ExportResult:
    """Writes a Megatron-Core GPTModel as a Hugging Face checkpoint, quantized as its quantizers say.

    The whole export is planned, then packed one weight at a time into a hidden directory beside `export_dir`, which one
    rename makes visible: after an error `export_dir` does not exist. The model itself is not changed.

    Args:
        model: A `GPTModel`, one wrapped in Float16Module or DDP, or the list of its virtual pipeline stages.
        pretrained_model_name_or_path: Directory or hub id of the Hugging Face model it was built from. Its config says
            names and sizes; its tokenizer and generation files are copied.
        export_dir: A directory that is new or empty.
        dtype: Type of tensors that are not quantized.
        moe_router_dtype: Type of the routers, None for `dtype`.
        trust_remote_code: Whether transformers may run code from the source to read its config.
        max_shard_size: Largest size of one safetensors file in bytes.
        progress: Called as (stage, done, total).

    Raises:
        DestinationError: `export_dir` is not empty.
        SourceError: The source has no usable config.
        UnsupportedModelError: Its architecture is not supported.
        TopologyError: The model is split over ranks.
        MappingError: Rules of the quantizer config match nothing, or the model is not the one the config describes.
        ShapeError: The model is not the one that the config describes, or does not divide as its format needs.
        UnsupportedQuantizationError: Quantizers that cannot be written.
        CalibrationError: Enabled quantizers without a usable amax.
        WeightError: NaN or Inf in a weight.
    """
    destination = Path(export_dir)
    check_destination(destination, current_topology().rank)
    plan = plan_export(
        model,
        pretrained_model_name_or_path,
        dtype=dtype,
        moe_router_dtype=moe_router_dtype,
        trust_remote_code=trust_remote_code,
        max_shard_size=max_shard_size,
    )
    scan_weights(plan, current_topology().rank, progress)
    source = resolve_source(pretrained_model_name_or_path, weights=False)
    with staged_directory(destination) as staging:
        sink = SafetensorsSink(staging, plan.shards, plan.expected())
        for done, task in enumerate(plan.tasks, start=1):
            for name, tensor in pack_task(task, plan.dims):
                sink.write(name, tensor)
            progress("Packing and writing", done, len(plan.tasks))
        sink.close()
        copy_side_files(source, staging)
        write_configs(source, staging, dtype, plan.quant_config)
    return _result(destination, plan)


def _result(directory: Path, plan: ExportPlan) -> ExportResult:
    expected = plan.expected().values()
    algorithm = plan.quant_config.algorithm if plan.quant_config else None
    return ExportResult(directory, algorithm, len(expected), sum(spec.nbytes for spec in expected), len(plan.shards))


def _refuse_parallel(topology: ParallelTopology) -> None:
    if topology.world_size == 1:
        return
    sizes = {"world size": topology.world_size, "tp": topology.tp, "pp": topology.pp}
    sizes |= {"ep": topology.ep, "etp": topology.etp}
    raise TopologyError(
        "This version exports from one rank.",
        [Offender(name, f"is {size}", rank=topology.rank) for name, size in sizes.items() if size > 1],
        "Save a Megatron checkpoint, load it on one rank (torchrun --nproc_per_node 1) and export there.",
    )
