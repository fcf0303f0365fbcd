"""What exports share that build no model: the model by its config alone, plans of weight-only formats, one process.

They need torch, safetensors and NumPy alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantplug.checkpoint.config.file import (
    architecture_of,
    counting_no_mtp,
    read_config_file,
    refuse_own_code,
    ties_embeddings,
    with_settings,
)
from quantplug.checkpoint.config.lost_mtp import LostMtp, lost_mtp
from quantplug.checkpoint.disk_errors import disk_errors
from quantplug.checkpoint.reader import NONE_ASIDE, ScalesAside
from quantplug.checkpoint.stored_tensors import stored_names
from quantplug.checkpoint.untrusted.model_sizes import read_dimensions
from quantplug.errors import ArgumentError, Offender, SourceError
from quantplug.export.asked_formats import Formats
from quantplug.export.files.finish import Beside, ExportResult, finish, result_of, sizes_on_disk
from quantplug.export.files.outcome import Reasons
from quantplug.export.files.preview import preview_of
from quantplug.export.files.staging import Staging, check_destination
from quantplug.export.files.write_rounds import Reading, write_tensors
from quantplug.export.pipeline.amaxes import WeightAmax
from quantplug.export.pipeline.outliers import refuse_outliers
from quantplug.export.pipeline.prescan import digest_of, prescan, require_unchanged, unchanged_rows
from quantplug.export.plan.build import ExportRequest, build_plan
from quantplug.export.plan.quantizers.scheme import quantizers_for
from quantplug.export.plan.source import Source
from quantplug.export.plan.types import ExportPlan, Schemes, WholeWeight
from quantplug.formats.names import Scheme
from quantplug.formats.search.candidates import Scales
from quantplug.mappings.families import find_family
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import Family
from quantplug.progress import Progress
from quantplug.selection.exclude import excluding
from quantplug.selection.policy import Policy, quantized


def require_free(destination: Path) -> None:
    """Refuses a destination that cannot be used, before anything is fetched or read for it.

    Raises:
        DestinationError: It is not empty, or is a file.
    """
    with disk_errors(destination):
        check_destination(destination)


@dataclass(frozen=True)
class ModelByConfig:
    """What config.json says of a model.

    Attributes:
        config: config.json as it stands in the file.
        lost_mtp: That it counted layers which are nowhere: `config` and `dims` count none any more.
    """

    directory: Path
    config: Mapping[str, Any]
    family: Family
    dims: ModelDimensions
    lost_mtp: LostMtp | None = None

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return ties_embeddings(self.config)

    def without_mtp(self) -> "ModelByConfig":
        """The same model without layers of multi-token prediction."""
        family, config = self.family.without_mtp(), counting_no_mtp(self.config, self.family)
        return replace(self, config=config, family=family, dims=read_dimensions(config, family))

    def with_vocabulary(self, tokens: int) -> "ModelByConfig":
        """The same model with another number of tokens.

        Raises:
            ArgumentError: It is none.
        """
        if tokens < 1:
            raise ArgumentError(
                "A vocabulary has at least a token.",
                [Offender("vocab_size", f"is {tokens}")],
                "Pass the number of tokens that the model was trained with; None for that of the config.",
            )
        config = with_settings(self.config, {"vocab_size": tokens}, self.family.nested)
        return replace(self, config=config, dims=read_dimensions(config, self.family))


def read_model(directory: Path, trust_remote_code: bool, *, model_has_mtp: bool = False) -> ModelByConfig:
    """The model that a Hugging Face directory is of.

    Args:
        model_has_mtp: Whether layers of multi-token prediction come from elsewhere, so that it is no matter whether the
            directory holds those that its config counts.

    Raises:
        SourceError: There is no usable config.json, or it brings its own code and that is not trusted.
        UnsupportedModelError: Its architecture is not supported.
    """
    config = read_config_file(directory)
    # Before its code: to trust that would not help.
    family = find_family(architecture_of(config, directory))
    refuse_own_code(directory, trusted=trust_remote_code)
    dims = read_dimensions(config, family)
    lost = None if model_has_mtp else lost_mtp(config, family, dims, stored_names(directory))
    if lost is not None:
        config = counting_no_mtp(config, family)
        dims = family.dimensions(config)
    return ModelByConfig(directory, config, family, dims, lost)


@dataclass(frozen=True)
class Chosen:
    """What is packed, by the one policy and what a user leaves out.

    Attributes:
        schemes: How each weight that is packed is.
        kept: Why other weights of matrix products are not.
    """

    schemes: Schemes
    kept: Reasons


def chosen_weights(
    weights: Sequence[WholeWeight],
    model: ModelByConfig,
    formats: Formats,
    policy: Policy,
    exclude: Sequence[str],
) -> Chosen:
    """The weights that are packed, each with its scheme, and those that are not, with the reason.

    Args:
        policy: What is asked for; the bits are those of each weight's own scheme.

    Raises:
        MappingError: A pattern of `exclude` matches nothing.
        UnsupportedQuantizationError: `exclude` parts what servers load alike, or leaves nothing to quantize.
    """
    decisions = formats.decide((weight.key for weight in weights), model.family, policy)
    decisions = excluding(decisions, exclude, model.family, model.dims)
    kept = {key: decision.kept for key, decision in decisions.items() if decision.kept is not None}
    return Chosen({key: formats.of(key) for key in quantized(decisions)}, kept)


Amaxes = Mapping[ParamKey, float]
PlanOf = Callable[[Amaxes | None], ExportPlan]
"""Makes the plan, before the amaxes of the weights are known and after."""


@dataclass(frozen=True)
class WeightOnlyPlan:
    """Makes the plan of a format of which weights alone are calibrated; a `PlanOf`.

    Attributes:
        chosen: The weights that are packed, and how.
        input_scale: The scale of all their inputs, of which nothing was calibrated; None where inputs have none.
        scales: How the scales of their blocks are found, of those that can be searched for.
    """

    weights: Sequence[WholeWeight]
    model: ModelByConfig
    chosen: Schemes
    request: ExportRequest
    input_scale: float | None = None
    scales: Scales = Scales.MAX

    def __call__(self, amaxes: Amaxes | None) -> ExportPlan:
        """The plan; without amaxes all is checked that needs none."""
        # A quantizer as ModelOpt's would be stands for the format, so that the plan is made as for a live model.
        weights = [
            self._quantized(weight, self.chosen[weight.key], amaxes) if weight.key in self.chosen else weight
            for weight in self.weights
        ]
        request = replace(self.request, calibrated=amaxes is not None)
        return build_plan(weights, self.model.family, self.model.dims, request)

    def _quantized(self, weight: WholeWeight, scheme: Scheme, amaxes: Amaxes | None) -> WholeWeight:
        # Without data max|weight| is all of the calibration.
        amax = None if amaxes is None else amaxes[weight.key]
        scales = self.scales if scheme.weight.encoding.can_search else Scales.MAX
        quantizer, activation = quantizers_for(scheme, weight.label, scales)
        if activation is not None and scheme.has_input_scale and self.input_scale is not None:
            # The amax that ModelOpt's `constant_amax` would pin: 2688 for NVFP4 and a scale of 1.0.
            activation = replace(activation, amax=self.input_scale * scheme.weight.encoding.largest)
        return replace(weight, weight=replace(quantizer, amax=amax), activation=activation)


def write_or_preview(
    plan_of: PlanOf,
    rows: Source,
    beside: Beside,
    destination: Path,
    dtype: torch.dtype | None,
    progress: Progress,
    policy: WeightAmax = WeightAmax.CALIBRATED,
    *,
    dry_run: bool,
    kept: Reasons,
    lost_mtp: LostMtp | None,
    scales_aside: ScalesAside = NONE_ASIDE,
) -> ExportResult:
    """Looks at all weights once, then packs and writes them, in one process; what has been finished before is kept.

    Args:
        plan_of: Called twice. The first plan refuses by names and shapes alone what can be refused, before the weights
            are read; the second one has the amaxes that reading gave, in its scales and in its digest.
        dtype: Type of plain tensors; None where they keep their own.
        policy: What becomes of weights that have grown since they were calibrated.
        dry_run: Whether nothing is written, and the first plan is all that is made.
        kept: Why weights stay plain that a choice keeps so, for the result.
        lost_mtp: For the result, likewise.
        scales_aside: The same.

    Returns:
        What was written; or what would be, with a preview of it.

    Raises:
        QuantplugError: As the entries say.
    """
    plan, preview = plan_of(None), None
    if dry_run:
        nbytes = sum(sizes_on_disk(plan, beside, dtype).values())
        preview = preview_of(plan, rows, destination, nbytes, kept, policy)
    else:
        plan = _write(plan, plan_of, rows, beside, destination, dtype, progress, policy)
    return replace(result_of(plan, destination, beside.side_files, lost_mtp, scales_aside, kept), preview=preview)


def _write(
    plan: ExportPlan,
    plan_of: PlanOf,
    rows: Source,
    beside: Beside,
    destination: Path,
    dtype: torch.dtype | None,
    progress: Progress,
    policy: WeightAmax,
) -> ExportPlan:
    """The plan with the amaxes that were found, once it is carried out."""
    found = prescan(plan.tasks, rows, progress, policy=policy)
    plan = plan_of(found.amaxes)
    refuse_outliers(plan.tasks, found.typical, rows)
    reading = Reading(unchanged_rows(rows, found.marks), rows.bucket_bytes)
    staging = Staging(destination, plan.digest, digest_of(found.marks), rank=0, world_size=1)
    try:
        # Files that were finished before a change was seen may have been packed while it was made.
        with staging.discarded_on(SourceError):
            write_tensors(plan, reading, staging, 0, {}, progress, sizes_on_disk(plan, beside, dtype))
            require_unchanged(plan.tasks, rows, found.marks)
        finish(plan, beside, staging, dtype)
    except BaseException:
        # Also on Ctrl-C: finished files stay, for the same command to go on from.
        staging.discard_unless_resumable()
        raise
    finally:
        staging.close()
    return plan
