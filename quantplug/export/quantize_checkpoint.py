"""From a Hugging Face checkpoint straight to a quantized one, for formats that quantize weights alone.

Weights need no data to be calibrated, so no model is built: needs torch, safetensors and NumPy alone. Names, layouts,
plan, packing and files are those of an export from Megatron-Core, and so are the bytes.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from quantplug.checkpoint.duplicates import check_duplicates
from quantplug.checkpoint.encoded.plain import open_plain, refuse_quantized
from quantplug.checkpoint.reader import HFCheckpoint, resolve_source
from quantplug.checkpoint.side_files import choose_side_files
from quantplug.choices import Preset
from quantplug.export.asked_quantization import AskedQuantization
from quantplug.export.files.finish import Beside, ExportResult
from quantplug.export.model_free import ModelByConfig, read_model, require_free, write_or_preview
from quantplug.export.plan.build import MAX_SHARD_SIZE, ExportRequest
from quantplug.export.plan.dialects.table import DialectName, dialect_named
from quantplug.export.plan.types import WholeWeight
from quantplug.export.sources.checkpoint import source_weights
from quantplug.export.sources.checkpoint_rows import CheckpointSource
from quantplug.formats.names import KVCacheFormat, QuantFormat
from quantplug.formats.search.candidates import Scales
from quantplug.mappings.source_fit import fitted
from quantplug.progress import Progress, silent

__all__ = ["QuantFormat", "quantize_checkpoint"]


@torch.no_grad()
def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    format: QuantFormat | str,  # noqa: A002  # as on the command line
    *,
    expert_format: QuantFormat | str | None = None,
    group_size: int | None = None,
    exclude: Sequence[str] = (),
    quantize_mtp: bool = False,
    quantize_lm_head: bool = False,
    preset: Preset | str = Preset.DEFAULT,
    input_scale: float | None = None,
    scales: Scales | str = Scales.MAX,
    kv_cache: KVCacheFormat | str | None = None,
    dialect: DialectName | str | None = None,
    trust_remote_code: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
    revision: str | None = None,
    dry_run: bool = False,
    progress: Progress = silent,
) -> ExportResult:
    """Quantizes the linear weights of a Hugging Face checkpoint; every other tensor keeps its values.

    It keeps its type, too, but for a router's correction bias, which servers hold in FP32.

    Linears that some server cannot read in four bits (MLA's `kv_b_proj`) are among the others in such a format.

    The source is read twice, a few rows at a time: for the amaxes, then to be packed. Memory does not grow with the
    model. All is written into a hidden directory beside `destination`, which one rename makes visible: after an error
    `destination` does not exist.

    Args:
        source: Directory or hub id of a checkpoint in BF16, FP16 or FP32, in FP8, or with experts in MXFP4.
        destination: A directory that is new or empty.
        format: A `QuantFormat` that needs no data: `w4a16_nvfp4`, `w8a16_fp8` (one scale a tensor),
            `fp8_blockwise` (128x128), `fp8_dynamic` (one scale a row), `mxfp8`, `int4` or `mxfp4` (GPT-OSS); or with
            an `input_scale` one that quantizes activations by scales of their own.
        expert_format: The format of routed experts, where it is another one, such as `nvfp4` with an `input_scale`
            beside `mxfp8`. One dialect must have names for both.
        group_size: How many input features share a scale in `format` and `expert_format`, where one leaves the choice:
            128 or 32 of `int4`. None for 128.
        exclude: Modules that stay as they are, by exact name (`model.layers.0.mlp.down_proj`) or as shell patterns
            (`model.layers.0.*`). Embeddings, output layer and routers stay in any case, as servers load them so.
        quantize_mtp: Whether the layers of multi-token prediction are quantized too; they are kept in any case.
        quantize_lm_head: Whether the output layer is quantized too, by the format of all linears.
        preset: Which linears are quantized at all, a `Preset` or its name: `default` (all but those by which an
            architecture loses far more in four bits than by others: inputs of gated attention and of delta nets of
            Qwen3-Next and Qwen3.5), `all` (those too), `experts_only` (routed experts), `mlp_only` (dense MLPs and
            shared experts too) or `omlp_only` (and attention's o_proj).
        input_scale: With `nvfp4` or `fp8`: the scale of all inputs in place of calibrated ones, as 1.0 in ModelOpt's
            recipe `nvfp4_experts_only_input_scale1-kv_fp8_cast`.
        scales: How the scales of NVFP4's blocks are found, a `Scales` or its name: `max` (of the largest element),
            `four_over_six` or `mse` (the one with the least squared error). Servers read all of them alike.
        kv_cache: The format of the KV cache that servers are asked for, a `KVCacheFormat` or its name: `fp8_cast` and
            `nvfp4_cast` need no data. None leaves it in 16 bits.
        dialect: How tensors and config spell the format, where there are several ways: a `DialectName` or its name,
            `modelopt`, `compressed-tensors` or `deepseek`. None takes what most servers read.
        trust_remote_code: Whether code that the source brings is carried over, for readers to run; none is run here.
        max_shard_size: Largest size of one safetensors file in bytes.
        revision: Of a source on the hub: branch, tag or commit; None for the newest of its main branch.
        dry_run: Whether nothing is written, and the result says in its `preview` what would be, and how long it would
            take by a trial of about two seconds. Errors that only a look at all values finds are not found.
        progress: Called as (stage, done, total), in bytes of the source.

    Raises:
        ArgumentError: A format, preset or dialect that is not known, `scales` or a `group_size` that the format has
            not, an `input_scale` that is none or goes with no input, or a `max_shard_size` that cannot be served.
        DestinationError: `destination` is not empty, or another export left its unfinished files beside it.
        SourceError: The source is missing, incomplete, damaged or already quantized, or changes while it is read; or
            tensors that it holds twice differ; or it brings its own code, and that is not trusted.
        UnsupportedModelError: Its architecture is not supported.
        MappingError: Tensors are missing or unknown, or a pattern of `exclude` matches nothing.
        ShapeError: A shape disagrees with the config, or does not divide as the format needs.
        UnsupportedQuantizationError: A format that has calibrated scales, of activations or of the KV cache, or that
            the dialect cannot say; or `exclude` parts what servers load alike, or leaves nothing to quantize.
        WeightError: NaN or Inf in a weight, or a value beside which most others would be packed to zero.
        WriteError: The disk refused a file. What is finished is kept; the same call again goes on from there.
    """
    asked = AskedQuantization.named(
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
    spelling = dialect_named(dialect, "dialect")
    target = Path(destination)
    require_free(target)
    model = read_model(resolve_source(source, revision=revision), trust_remote_code)
    refuse_quantized(model.directory, model.config)
    asked.require_parts(model)
    # Chosen before the work: a tokenizer that cannot be read must not end an export of hours.
    beside = Beside(model.directory, model.config, choose_side_files(model.directory, code=trust_remote_code))
    with open_plain(model.directory, model.config) as checkpoint:
        model = _fitted(model, checkpoint)
        weights = _weights(checkpoint, model)
        # Without a type: plain tensors keep their own. The source is its own reference, whose duplicates are written
        # again.
        request = ExportRequest(
            tied_embeddings=model.tied,
            dtype=None,
            max_shard_size=max_shard_size,
            reference={name: header.shape for name, header in checkpoint.tensors.items()},
            dialect=spelling,
        )
        plan_of, kept = asked.plan_of(weights, model, request)
        return write_or_preview(
            plan_of,
            CheckpointSource(checkpoint, model.dims),
            beside,
            target,
            dtype=None,
            progress=progress,
            dry_run=dry_run,
            kept=kept,
            lost_mtp=model.lost_mtp,
            scales_aside=checkpoint.aside,
        )


def _fitted(model: ModelByConfig, checkpoint: HFCheckpoint) -> ModelByConfig:
    """The model with the table in the form that its checkpoint has, which takes over what ties its embeddings."""
    if model.tied:
        checkpoint.take_for(model.family.tied)
    return replace(model, family=fitted(model.family, checkpoint.tensors, model.dims))


def _weights(checkpoint: HFCheckpoint, model: ModelByConfig) -> tuple[WholeWeight, ...]:
    """Every weight of a checkpoint, in which those that are there twice are the same.

    Raises:
        MappingError: Tensors are missing or unknown.
        SourceError: Tensors that it holds twice differ.
    """
    weights = source_weights(checkpoint.tensors, model.family, model.dims, model.tied, checkpoint.packed_as)
    check_duplicates(checkpoint, model.family.duplicates(model.dims, model.tied), rank=0, ranks=1)
    return weights
