"""The offline checker: judges any quantized checkpoint directory by its files, with torch and safetensors alone.

`docs/verify.md` lists every check and what breaks at serving without it.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from quantplug.errors import ArgumentError
from quantplug.mappings.serving_tp import of_checkpoint
from quantplug.verify import values
from quantplug.verify.inventory import names, tied_head
from quantplug.verify.inventory.checkpoint import Checkpoint, of_source, open_checkpoint
from quantplug.verify.inventory.fused import FusedExperts, fused_experts, with_inner_names
from quantplug.verify.inventory.known import known_architecture, table_of, with_names_of
from quantplug.verify.inventory.modules import Inventory, take_inventory
from quantplug.verify.inventory.scheme import read_scheme
from quantplug.verify.journal import Journal
from quantplug.verify.report import Finding, KindError, Severity, Size, TensorError, VerifyReport
from quantplug.verify.rules import RULES, settings, side_files
from quantplug.verify.rules.input_ranges import input_ranges
from quantplug.verify.rules.model import quantized_linears
from quantplug.verify.source import compare
from quantplug.verify.source.folds import folded
from quantplug.verify.source.input_moments import InputMoments
from quantplug.verify.source.originals import Originals

__all__ = ["Finding", "KindError", "OnProgress", "Severity", "Size", "TensorError", "VerifyReport", "verify_checkpoint"]

OnProgress = Callable[[int, int], None]


def verify_checkpoint(
    directory: str | Path,
    source: str | Path | None = None,
    on_progress: OnProgress | None = None,
    *,
    resume: str | Path | None = None,
    moments: str | Path | None = None,
) -> VerifyReport:
    """Judges a checkpoint directory, of whichever tool, and with the original at hand the error of every tensor.

    Reads one chunk of a tensor at a time; memory does not grow with the model.

    Args:
        directory: Holds config.json and the safetensors files.
        source: The BF16, FP16 or FP32 checkpoint it was quantized from; or one in FP8, or GPT-OSS's own in MXFP4.
        on_progress: Called with (bytes read so far, bytes to read in all).
        resume: A file in which progress is kept, outside of both directories. Where the same call was interrupted it
            goes on from there, if no file of either directory has changed since; at the end it is removed.
        moments: With a source: a file that `write_input_moments` wrote of the exported model. Errors are then those of
            outputs, too, and what clips where inputs are small, or is made up for, is not taken for wrong.

    Returns:
        All findings at once; whatever is wrong inside the directories is a finding, never an exception.

    Raises:
        SourceError: One of the two is not a directory, or `moments` is no file of moments.
        ArgumentError: Progress cannot be kept in `resume`, or `moments` come without a source.
    """
    return judge(directory, source, on_progress, resume=resume, moments=moments).report


@dataclass(frozen=True)
class Judgement:
    """A verdict, and what it was found by, for those who show more of it.

    Attributes:
        values: What was left behind when all values were read.
    """

    report: VerifyReport
    inventory: Inventory
    values: values.Values


def judge(
    directory: str | Path,
    source: str | Path | None = None,
    on_progress: OnProgress | None = None,
    *,
    resume: str | Path | None = None,
    moments: str | Path | None = None,
) -> Judgement:
    """As `verify_checkpoint`."""
    inputs = None if moments is None else InputMoments.open(Path(moments))
    if inputs is not None and source is None:
        raise ArgumentError("Moments of inputs weigh errors, which are measured against a source.", remedy="Give it.")
    inventory, findings = _opened(Path(directory))
    export, fused = inventory.checkpoint, inventory.fused
    original, source_findings = open_checkpoint(Path(source), is_source=True) if source is not None else (None, [])
    findings += source_findings
    source_experts = fused
    if original is not None:
        # The source may be published in another form than the export has, and then has a table of its own.
        known_source, _ = known_architecture(original)
        source_experts = fused_experts(known_source.family) if known_source else fused
        original, _ = with_inner_names(original, source_experts)
        if known_source:
            original = with_names_of(export, original, known_source.family)
        original = tied_head.with_embedding(original, known_source.family.tied if known_source else {})
    checkpoints = [export] if original is None else [export, original]
    beside = [] if inputs is None else [inputs.file]
    with nullcontext() if resume is None else Journal(Path(resume), checkpoints, beside) as journal:
        errors, read = _judge(inventory, original, source_experts, inputs, findings, on_progress, journal)
    findings += export.changed()
    findings += [finding for file in beside for finding in file.changed()]
    findings += map(of_source, original.changed() if original is not None else ())
    # Rules speak in a module's spelling; a user looks for the name that is on disk.
    findings = [replace(finding, subject=fused.stored_name(finding.subject)) for finding in findings]
    report = VerifyReport(
        directory=str(directory),
        source=None if source is None else str(source),
        quantization=inventory.scheme.label,
        tensors=len(export.tensors),
        findings=tuple(sorted(findings, key=_order)),
        errors_by_tensor=tuple(errors),
        sizes=tuple(compare.sizes(export, original)),
        serving_tp=of_checkpoint(
            quantized_linears(inventory), None if inventory.known is None else inventory.known.dims
        ),
    )
    return Judgement(report, inventory, read)


def _opened(directory: Path) -> tuple[Inventory, list[Finding]]:
    """A checkpoint as the rules see it, and what is wrong with its files, configs and names.

    Raises:
        SourceError: It is not a directory.
    """
    export, findings = open_checkpoint(directory)
    scheme, scheme_findings = read_scheme(export)
    known, size_findings = known_architecture(export)
    fused = fused_experts(known.family if known else table_of(export.config))
    export, name_findings = with_inner_names(export, fused)
    findings += [*scheme_findings, *size_findings, *name_findings]
    return take_inventory(export, scheme, fused, known), findings


def _judge(
    inventory: Inventory,
    original: Checkpoint | None,
    source_experts: FusedExperts,
    moments: InputMoments | None,
    findings: list[Finding],
    on_progress: OnProgress | None,
    journal: Journal | None,
) -> tuple[list[TensorError], values.Values]:
    """Appends the findings of all rules and gives the measured errors, and what reading all values left behind."""
    for rule in RULES:
        findings.extend(rule(inventory))
    to_read = values.bytes_to_read(inventory) + (compare.bytes_to_read(original) if original is not None else 0)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, to_read)

    read, value_findings = values.read_values(inventory, on_bytes, journal)
    findings += [*value_findings, *values.shared_scales(inventory, read), *values.stored_shapes(inventory)]
    findings += input_ranges(inventory, read)
    export = inventory.checkpoint
    findings += tied_head.lost_head(export.config, export, "the export")
    if original is None:
        return [], read
    findings += [*settings.settings(export, original), *side_files.side_files(export.directory, original.directory)]
    # Without a head readers compute with the embedding. Whether that is right, the source's head tells.
    if not any(names.last(module) == "lm_head" for module in inventory.modules):
        findings += tied_head.lost_head(export.config, original, "the source")
    if not original.tensors:  # Which is one finding, and not one more for each tensor of the export.
        return [], read
    # What is wrong with the scheme is no finding of the export's: weights that cannot be read so are named one by one.
    unfolded, fold_findings = folded(inventory, original, source_experts)
    findings += fold_findings
    originals = Originals(unfolded, read_scheme(original)[0])
    findings += [] if moments is None else moments.missing(inventory)
    errors, compare_findings = compare.compare(inventory, originals, source_experts, moments, on_bytes, journal)
    findings.extend(compare_findings)
    return errors, read


def _order(finding: Finding) -> tuple[int, str]:
    return list(Severity).index(finding.severity), finding.check
