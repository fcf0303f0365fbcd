"""What an export's files show beside the verdict: which weights are quantized, how, and which are not and why."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from quantplug.choices import DialectName
from quantplug.html_report.histograms import Histogram, of_codes, of_scales, samples_of
from quantplug.mappings.shapes.kinds import kind_of
from quantplug.mappings.table import Role
from quantplug.selection.policy import Policy
from quantplug.verify.inventory import names
from quantplug.verify.inventory.checkpoint import UnreadableTensorError
from quantplug.verify.inventory.layouts import is_plain
from quantplug.verify.inventory.modules import Inventory, Module
from quantplug.verify.inventory.spellings import code_bits
from quantplug.verify.values import Values


@dataclass(frozen=True)
class QuantizedWeight:
    """One quantized weight; or all experts of a layer, where they lie in one tensor.

    Attributes:
        module: Its name on disk without the suffix.
        layer: Number of the decoder's layer; None outside of it.
        expert: Number of the routed expert; None for any other module.
        shape: [out, in], unpacked.
        amax: The largest magnitude that its scales let codes stand for: the largest scale times the largest code. Of a
            weight packed by max calibration this is max |w|, up to the rounding of its scale. None where unreadable.
        nbytes: Of all its tensors.
    """

    module: str
    kind: str
    layer: int | None
    expert: int | None
    format: str
    shape: tuple[int, int]
    amax: float | None
    nbytes: int


@dataclass(frozen=True)
class KeptKind:
    """Tensors of one kind that are stored plain, and why."""

    kind: str
    why: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class Survey:
    """All of it; histograms by (format, kind of module), of codes and of the scales of blocks, groups or rows."""

    weights: tuple[QuantizedWeight, ...]
    kept: tuple[KeptKind, ...]
    codes: dict[tuple[str, str], Histogram]
    scales: dict[tuple[str, str], Histogram]


def survey(inventory: Inventory, values: Values) -> Survey:
    """Counts all scales, and reads an even sample of codes (`samples_of`), of a checkpoint.

    A tensor that cannot be read is left out: that it cannot be is the judge's to say.
    """
    codes: dict[tuple[str, str], Histogram] = defaultdict(Histogram)
    scales: dict[tuple[str, str], Histogram] = defaultdict(Histogram)
    sound = [module for module in inventory.quantized if module.sound]
    weights = []
    for module in sound:
        group = (_format(module), _kind(module))
        try:
            found = of_scales(inventory.checkpoint, module, values)
            codes[group].add(of_codes(inventory.checkpoint, module, samples_of(len(sound))))
        except UnreadableTensorError:
            found = None
        if found is not None and found.spread is not None:
            scales[group].add(found.spread)
        weights.append(_weight(module, None if found is None else found.amax))
    return Survey(tuple(weights), tuple(_kept(inventory)), dict(codes), dict(scales))


def _format(module: Module) -> str:
    return module.layout.name if module.layout is not None else ""


def _kind(module: Module) -> str:
    return kind_of(module.name)


def _weight(module: Module, amax: float | None) -> QuantizedWeight:
    layer, expert = names.layer(module.name), names.expert(module.name)
    columns = module.layout.columns(module.codes) if module.layout is not None and module.codes is not None else 0
    return QuantizedWeight(
        module=module.name,
        kind=_kind(module),
        layer=None if layer is None else layer[1],
        expert=None if expert is None else expert.id,
        format=_format(module),
        shape=(module.codes.shape[0] if module.codes is not None else 0, columns),
        amax=amax,
        nbytes=sum(info.nbytes for info in module.tensors.values()),
    )


def _kept(inventory: Inventory) -> Iterator[KeptKind]:
    reasons = _reasons(inventory)
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for module in inventory.modules.values():
        for info in module.tensors.values():
            if not module.quantized and is_plain(info):
                why = reasons.get(info.name) or _by_name(inventory, module)
                found[kind_of(info.name), why].append(info.nbytes)
    for (kind, why), sizes in sorted(found.items()):
        yield KeptKind(kind, why, len(sizes), sum(sizes))


def _reasons(inventory: Inventory) -> dict[str, str]:
    """Of tensors of a known architecture, why the policy of our own exports keeps them from the checkpoint's formats.

    What is asked of the policy beside formats leaves no mark in the files: it is taken for the default.
    """
    if inventory.known is None:
        return {}
    family, dims = inventory.known.family, inventory.known.dims
    # Of formats side by side that of the fewest bits, as only the rows that it leaves out are asked about.
    policy = Policy(
        weight_bits=min((code_bits(it.layout) for it in inventory.quantized if it.layout is not None), default=16),
        of_gpt_oss=inventory.scheme.method == DialectName.MXFP4,
    )
    return {
        tensor: kept.words
        for row in family.mappings
        for part, kept in enumerate([policy.why_part_kept(row, part) for part in range(len(row.hf))])
        if kept is not None
        for key in row.keys(dims)
        for tensor in (row.hf_names(key, dims)[part],)
        if tensor in inventory.checkpoint.tensors
    }


def _by_name(inventory: Inventory, module: Module) -> str:
    """Why a tensor is plain that no row of a table keeps: what a server could not quantize at all comes first."""
    if inventory.known is not None and inventory.known.carries(f"{module.name}.weight"):
        return Role.PASSTHROUGH_WEIGHT.value
    if module.plain_matrix is None:
        return Role.OTHER.value
    if names.is_embedding(module.name):
        return Role.EMBEDDING.value
    if names.is_head(module.name):
        return Role.OUTPUT_LAYER.value
    return "excluded by the config" if module.excluded else "the config promises no format for it"
