"""Which linears are quantized: all that servers load so, but for those that the caller excludes."""

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from quantplug.errors import MappingError, UnsupportedQuantizationError
from quantplug.export.plan.types import WholeWeight
from quantplug.findings import Findings, Kind, nearest
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import Family, ParamKey, Role, WeightMapping

_UNMATCHED = Kind(
    MappingError,
    "Patterns of exclude match no linear of the model.",
    "Use names of modules as the checkpoint spells them, such as model.layers.0.mlp.down_proj, or model.layers.0.*.",
)
_PARTIAL = Kind(
    UnsupportedQuantizationError,
    "Only some linears are excluded of those that servers fuse into one, or load alike.",
    "Exclude all of them, or none.",
)
_NOTHING = Kind(
    UnsupportedQuantizationError, "No linear is left to quantize.", "Exclude fewer modules; a plain copy needs no tool."
)


def chosen_weights(
    weights: Sequence[WholeWeight],
    family: Family,
    dims: ModelDimensions,
    exclude: Sequence[str],
    *,
    bits: int = 4,
    quantize_mtp: bool = False,
) -> frozenset[ParamKey]:
    """The weights to quantize: linears, but not those that a server cannot read in so few bits.

    Args:
        exclude: Exact names or shell patterns of modules as the checkpoint spells them.
        bits: Of the format.
        quantize_mtp: Whether linears of multi-token prediction are quantized too.

    Raises:
        MappingError: A pattern matches no module with a matrix product.
        UnsupportedQuantizationError: A pattern parts q, k and v, gate and up or experts of a layer; or nothing is left.
    """
    table, findings = family.by_megatron(), Findings()
    seen: set[str] = {name.removesuffix(".weight") for name in family.tied}
    chosen: dict[ParamKey, bool] = {}
    for weight in weights:
        mapping = table[weight.key.module]
        if not mapping.role.multiplies:
            continue
        parts = list(_spellings(mapping, weight.key, dims))
        matches = [any(_matches(pattern, names) for pattern in exclude) for names in parts]
        seen.update(*parts)
        is_kept = mapping.min_bits > bits or (mapping.block.is_mtp and not quantize_mtp)
        if mapping.role is Role.LINEAR and not is_kept:
            packed = [part for part, name in enumerate(mapping.hf) if name not in mapping.high_precision]
            chosen[weight.key] = not all(matches[part] for part in packed)
            _check_parts([parts[part] for part in packed], [matches[part] for part in packed], weight.key, findings)
    for pattern in dict.fromkeys(exclude):
        if not _matches(pattern, seen):
            findings.add(_UNMATCHED, pattern, f"matches nothing{nearest(pattern, seen)}")
    _check_alike(chosen, table, dims, findings)
    if not any(chosen.values()):
        findings.add(_NOTHING, "exclude", f"matches all {len(chosen)} weights")
    findings.raise_if_any()
    return frozenset(key for key, quantized in chosen.items() if quantized)


def _spellings(mapping: WeightMapping, key: ParamKey, dims: ModelDimensions) -> Iterator[tuple[str, ...]]:
    """Of every part the names that it may be excluded by: its module's; for experts in one tensor also the tensor's."""
    for name in mapping.hf_names(key, dims):
        fused = mapping.placement(key, dims) is not None
        yield (name, name.rpartition(".")[0]) if fused else (name.removesuffix(".weight"),)


def _matches(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _check_parts(parts: Sequence[tuple[str, ...]], matches: Sequence[bool], key: ParamKey, findings: Findings) -> None:
    if any(matches) and not all(matches):
        excluded = next(names[0] for names, found in zip(parts, matches, strict=True) if found)
        for names, found in zip(parts, matches, strict=True):
            if not found:
                findings.add(_PARTIAL, names[0], f"is not excluded, {excluded} is", key.expert)


def _check_alike(
    chosen: dict[ParamKey, bool], table: dict[str, WeightMapping], dims: ModelDimensions, findings: Findings
) -> None:
    """Experts of one layer, and weights of one scale group, are excluded together."""
    groups: dict[str, list[ParamKey]] = {}
    for key in chosen:
        scale_group = table[key.module].group(key, dims)
        for group in (f"experts of {key.stack} layer {key.layer}" if key.expert is not None else None, scale_group):
            if group is not None:
                groups.setdefault(group, []).append(key)
    for group, keys in groups.items():
        left = [key for key in keys if chosen[key]]
        for key in left if len(left) < len(keys) else ():
            names = " and ".join(table[key.module].hf_names(key, dims))
            findings.add(_PARTIAL, names, f"not excluded, others of {group} are", key.expert)
