"""From a Hugging Face checkpoint straight to a quantized one, for formats that quantize weights alone.

Weights need no data to be calibrated, so no model is built: needs torch, safetensors and NumPy alone. Names, layouts,
plan, packing and files are those of an export from Megatron-Core, and so are the bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantplug.checkpoint.config_file import architecture_of, read_config_file, refuse_own_code, ties_embeddings
from quantplug.checkpoint.disk_errors import disk_errors
from quantplug.checkpoint.duplicates import check_duplicates
from quantplug.checkpoint.encoded.plain import open_plain, refuse_quantized
from quantplug.checkpoint.lost_mtp import LostMtp, lost_mtp
from quantplug.checkpoint.reader import resolve_source
from quantplug.checkpoint.side_files import choose_side_files
from quantplug.checkpoint.stored_tensors import stored_names
from quantplug.checkpoint.untrusted.model_sizes import read_dimensions
from quantplug.errors import SourceError
from quantplug.export.files.finish import Beside, ExportResult, finish, result_of
from quantplug.export.files.staging import Staging, check_destination
from quantplug.export.files.write_rounds import Reading, write_tensors
from quantplug.export.pipeline.outliers import refuse_outliers
from quantplug.export.pipeline.prescan import digest_of, prescan, require_unchanged, unchanged_rows
from quantplug.export.plan.build import MAX_SHARD_SIZE, ExportRequest, build_plan
from quantplug.export.plan.scheme import quantizer_for
from quantplug.export.plan.types import ExportPlan, WholeWeight
from quantplug.export.sources.checkpoint import source_weights
from quantplug.export.sources.checkpoint_rows import CheckpointSource
from quantplug.formats import WeightFormat
from quantplug.formats.names import KVCacheFormat, QuantFormat, kv_cache_named, scheme_without_data
from quantplug.mappings.families import find_family
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.source_fit import fitted
from quantplug.mappings.table import Family, ParamKey
from quantplug.progress import Progress, silent
from quantplug.selection import Policy, by_exclude, decide, excluding, quantized

__all__ = ["QuantFormat", "quantize_checkpoint"]


@torch.no_grad()
def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    format: QuantFormat | str,  # noqa: A002  # as on the command line
    *,
    exclude: Sequence[str] = (),
    quantize_mtp: bool = False,
    kv_cache: KVCacheFormat | str | None = None,
    trust_remote_code: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Progress = silent,
) -> ExportResult:
    """Quantizes the linear weights of a Hugging Face checkpoint; every other tensor keeps its values and its type.

    Linears that some server cannot read in four bits (MLA's `kv_b_proj`) are among the others in such a format.

    The source is read twice, a few rows at a time: for the amaxes, then to be packed. Memory does not grow with the
    model. All is written into a hidden directory beside `destination`, which one rename makes visible: after an error
    `destination` does not exist.

    Args:
        source: Directory or hub id of a checkpoint in BF16, FP16 or FP32, in FP8 in blocks, or with experts in MXFP4.
        destination: A directory that is new or empty.
        format: A `QuantFormat` that needs no data: `w4a16_nvfp4`, `w8a16_fp8` (one scale a tensor) or `fp8_blockwise`
            (128x128).
        exclude: Modules that stay as they are, by exact name (`model.layers.0.mlp.down_proj`) or as shell patterns
            (`model.layers.0.*`). Embeddings, output layer and routers stay in any case, as servers load them so.
        quantize_mtp: Whether the layers of multi-token prediction are quantized too; they are kept in any case.
        kv_cache: The format of the KV cache that servers are asked for, a `KVCacheFormat` or its name: `fp8_cast` needs
            no data. None leaves it in 16 bits.
        trust_remote_code: Whether code that the source brings is carried over, for readers to run; none is run here.
        max_shard_size: Largest size of one safetensors file in bytes.
        progress: Called as (stage, done, total), in bytes of the source.

    Raises:
        ArgumentError: A format that is not known, of weights or of the KV cache, or a `max_shard_size` that cannot be
            served.
        DestinationError: `destination` is not empty, or another export left its unfinished files beside it.
        SourceError: The source is missing, incomplete, damaged or already quantized, or changes while it is read; or
            tensors that it holds twice differ; or it brings its own code, and that is not trusted.
        UnsupportedModelError: Its architecture is not supported.
        MappingError: Tensors are missing or unknown, or a pattern of `exclude` matches nothing.
        ShapeError: A shape disagrees with the config, or does not divide as the format needs.
        UnsupportedQuantizationError: A format that quantizes activations by calibrated scales; or `exclude` parts what
            servers load alike, or leaves nothing to quantize.
        WeightError: NaN or Inf in a weight, or a value beside which most others would be packed to zero.
        WriteError: The disk refused a file. What is finished is kept; the same call again goes on from there.
    """
    scheme = scheme_without_data(format, "format")
    cache = None if kv_cache is None else kv_cache_named(kv_cache, "kv_cache")
    target = Path(destination)
    with disk_errors(target):
        # Before the source is resolved: a hub model must not be fetched for a directory that cannot be used.
        check_destination(target)
    model = _read_model(resolve_source(source), trust_remote_code)
    # Chosen before the work: a tokenizer that cannot be read must not end an export of hours.
    side_files = choose_side_files(model.directory, code=trust_remote_code)
    with open_plain(model.directory, model.config.get("quantization_config")) as checkpoint:
        if model.tied:
            checkpoint.take_for(model.family.tied)
        model = replace(model, family=fitted(model.family, checkpoint.tensors, model.dims))
        weights = source_weights(checkpoint.tensors, model.family, model.dims, model.tied)
        check_duplicates(checkpoint, model.family.duplicates(model.dims, model.tied), rank=0, ranks=1)
        policy = Policy(scheme.weight_bits, quantize_mtp)
        decisions = decide((weight.key for weight in weights), model.family, policy)
        chosen = frozenset(quantized(excluding(decisions, exclude, model.family, model.dims)))
        # Without a type: plain tensors keep their own. The source is its own reference, whose duplicates are written
        # again.
        request = ExportRequest(
            tied_embeddings=model.tied,
            dtype=None,
            max_shard_size=max_shard_size,
            reference={name: header.shape for name, header in checkpoint.tensors.items()},
            leave_out=by_exclude,
            kv_cache=cache,
        )
        planner = _Planner(model, weights, chosen, scheme.weight, request)
        rows = CheckpointSource(checkpoint, model.dims)
        # Planned twice. The first plan refuses by headers alone what can be refused, before the source is read; the
        # second one has the amaxes that reading gave, in its scales and in its digest.
        found = prescan(planner.plan(None).tasks, rows, progress)
        plan = planner.plan(found.amaxes)
        refuse_outliers(plan.tasks, found.typical, rows)
        reading = Reading(unchanged_rows(rows, found.marks), rows.bucket_bytes)
        staging = Staging(target, plan.digest, digest_of(found.marks), rank=0, world_size=1)
        try:
            # Files that were finished before a change was seen may have been packed while it was made.
            with staging.discarded_on(SourceError):
                write_tensors(plan, reading, staging, rank=0, groups={}, progress=progress)
                require_unchanged(plan.tasks, rows, found.marks)
            finish(plan, Beside(model.directory, model.config, side_files), staging, dtype=None)
        except BaseException:
            # Also on Ctrl-C: finished files stay, for the same command to go on from.
            staging.discard_unless_resumable()
            raise
        finally:
            staging.close()
    return result_of(plan, target, side_files, model.lost_mtp)


@dataclass(frozen=True)
class _Model:
    """What config.json says."""

    directory: Path
    config: Mapping[str, Any]
    family: Family
    dims: ModelDimensions
    lost_mtp: LostMtp | None

    @property
    def tied(self) -> bool:
        return ties_embeddings(self.config)


def _read_model(directory: Path, trust_remote_code: bool) -> _Model:
    config = read_config_file(directory)
    refuse_own_code(directory, trusted=trust_remote_code)
    family = find_family(architecture_of(config, directory))
    refuse_quantized(directory, config.get("quantization_config"))
    dims = read_dimensions(config, family)
    lost = lost_mtp(config, family, dims, stored_names(directory))
    if lost is not None:
        config = lost.without(config)
        dims = family.dimensions(config)
    return _Model(directory, config, family, dims, lost)


@dataclass(frozen=True)
class _Planner:
    """Makes the plan, before the amaxes are known and after."""

    model: _Model
    weights: Sequence[WholeWeight]
    chosen: frozenset[ParamKey]
    packing: WeightFormat
    request: ExportRequest

    def plan(self, amaxes: Mapping[ParamKey, float] | None) -> ExportPlan:
        """The plan; without amaxes all is checked that needs none."""
        # A quantizer as ModelOpt's would be stands for the format, so that the plan is made as for a live model.
        weights = [self._quantized(weight, amaxes) if weight.key in self.chosen else weight for weight in self.weights]
        request = replace(self.request, calibrated=amaxes is not None)
        return build_plan(weights, self.model.family, self.model.dims, request)

    def _quantized(self, weight: WholeWeight, amaxes: Mapping[ParamKey, float] | None) -> WholeWeight:
        # A weight-only format needs no data: max|weight| is all of its calibration.
        amax = None if amaxes is None else amaxes[weight.key]
        return replace(weight, weight=replace(quantizer_for(self.packing, weight.label), amax=amax))
