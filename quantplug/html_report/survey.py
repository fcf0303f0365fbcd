"""What an export's files show beside the verdict: which weights are quantized, how, and which are not and why."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from quantplug.html_report.histograms import Histogram, of_codes, of_scales, samples_of
from quantplug.mappings.shapes.kinds import kind_of
from quantplug.mappings.table import Role
from quantplug.verify import names
from quantplug.verify.checkpoint import Checkpoint, UnreadableTensorError
from quantplug.verify.known import KnownArchitecture
from quantplug.verify.layouts import is_plain
from quantplug.verify.modules import Inventory, Module
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
    roles = _roles(inventory.known, inventory.checkpoint)
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for module in inventory.modules.values():
        for info in module.tensors.values():
            if not module.quantized and is_plain(info):
                found[kind_of(info.name), _why(inventory, module, roles.get(info.name))].append(info.nbytes)
    for (kind, why), sizes in sorted(found.items()):
        yield KeptKind(kind, why, len(sizes), sum(sizes))


def _roles(known: KnownArchitecture | None, checkpoint: Checkpoint) -> dict[str, Role]:
    """What each tensor of a known architecture is to the model."""
    if known is None:
        return {}
    dims = known.dims
    expected = ((row.role, row.hf_names(key, dims)) for row in known.family.mappings for key in row.keys(dims))
    return {tensor: role for role, tensors in expected for tensor in tensors if tensor in checkpoint.tensors}


def _why(inventory: Inventory, module: Module, role: Role | None) -> str:
    """The first that holds: what a server could not quantize at all is told before what somebody chose."""
    if role is not None and role is not Role.LINEAR:
        return role.value
    if inventory.known is not None and inventory.known.carries(f"{module.name}.weight"):
        return "carried over from the source as it is"
    if module.plain_matrix is None:
        return "no matrix product"
    if names.is_embedding(module.name):
        return "embedding"
    if names.is_head(module.name):
        return "head"
    return "excluded by the config" if module.excluded else "the config promises no format for it"
