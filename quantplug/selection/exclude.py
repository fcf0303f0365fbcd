"""What a user leaves out of what the policy quantizes, without parting what servers load together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from quantplug.errors import MappingError, UnsupportedQuantizationError
from quantplug.findings import Findings, Kind, nearest
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import Family
from quantplug.selection.advice import by_exclude
from quantplug.selection.patterns import packed_parts, spellings
from quantplug.selection.policy import Decisions, Kept, Reason, quantized, refuse_nothing
from quantplug.selection.together import Rows, fused_with

_UNMATCHED = Kind(
    MappingError,
    "Patterns of exclude match no linear of the model.",
    "Use names of modules as the checkpoint spells them, such as model.layers.0.mlp.down_proj, or model.layers.0.*.",
)
_NOTHING = Kind(
    UnsupportedQuantizationError, "No linear is left to quantize.", "Exclude fewer modules; a plain copy needs no tool."
)


def excluding(decisions: Decisions, exclude: Sequence[str], family: Family, dims: ModelDimensions) -> Decisions:
    """The decisions, less what a user leaves out.

    Args:
        exclude: Exact names or shell patterns of modules as the checkpoint spells them.

    Raises:
        MappingError: A pattern matches no module with a matrix product.
        UnsupportedQuantizationError: A pattern parts q, k and v, gate and up or experts of a layer, and what to exclude
            with them; or nothing is left, or was chosen in the first place.
    """
    refuse_nothing(decisions)
    findings, rows = Findings(), quantized(decisions)
    spelled = {key: list(spellings(decision.row, key, dims)) for key, decision in decisions.items()}
    # A tied output layer has no tensor and no decision, but a config may name it, and to exclude it is no mistake.
    known = {name.removesuffix(".weight") for name in family.tied}
    known.update(name for parts in spelled.values() for names in parts for name in names)
    # Against all modules with a matrix product, quantized or not: to exclude a router, which is plain anyway, is no
    # mistake either. A pattern that matches nothing is a typing error that would quantize what was to be spared.
    for pattern in dict.fromkeys(exclude):
        if not _matches(pattern, known):
            findings.add(_UNMATCHED, pattern, f"matches nothing{nearest(pattern, known)}")
    found = {key: [any(_matches(pattern, names) for pattern in exclude) for names in spelled[key]] for key in rows}
    # By any of its parts; that all of them are meant is for the next check.
    touched = {key for key, row in rows.items() if any(found[key][part] for part in packed_parts(row))}
    _refuse_parted(touched, rows, found, dims, findings)
    if rows.keys() <= touched:
        findings.add(_NOTHING, "exclude", f"matches all {len(rows)} weights")
    findings.raise_if_any()
    left_out = Kept(Reason.EXCLUDED, "excluded")
    return {key: replace(it, kept=left_out) if key in touched else it for key, it in decisions.items()}


def _refuse_parted(
    touched: set[ParamKey],
    rows: Rows,
    found: Mapping[ParamKey, Sequence[bool]],
    dims: ModelDimensions,
    findings: Findings,
) -> None:
    """Refuses what is excluded in part: some linears of one weight, or some weights of those that are loaded alike."""
    # All that would have to go with what the patterns hit; what of it they do not hit is named, with the patterns that
    # would.
    together = fused_with(touched, rows, dims)
    parted: list[tuple[ParamKey, str, str]] = []
    for key in sorted(together):
        row, names = rows[key], rows[key].hf_names(key, dims)
        missing = [names[part] for part in packed_parts(row) if not found[key][part]]
        excluded = [names[part] for part in packed_parts(row) if found[key][part]]
        reason = (
            f"is not excluded, {excluded[0]} is" if excluded else "is not excluded, others that servers load alike are"
        )
        # Users write modules in `exclude`, and are told modules.
        parted += [(key, name, reason.replace(".weight", "")) for name in missing]
    if not parted:
        return
    kind = Kind(
        UnsupportedQuantizationError,
        "Only some linears are excluded of those that servers fuse into one, or load alike.",
        f"Exclude none of them, or all. {by_exclude(touched, rows, dims)}",
    )
    for key, name, reason in parted:
        findings.add(kind, name.removesuffix(".weight"), reason, key.expert)


def _matches(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)
