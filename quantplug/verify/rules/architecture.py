"""Rules for architectures whose weights we know: the names and shapes that config.json asks for, and no others.

Whole layers and experts that are missing or too many are told by `rules_model.py`, once each, and not again here.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from quantplug.checkpoint.untrusted.json_reader import as_object
from quantplug.mappings.rows import LayerStack
from quantplug.mappings.shapes.expected import Shape, expected_shape, fits
from quantplug.mappings.shapes.kinds import is_recomputed, kind_of
from quantplug.printable import shown
from quantplug.verify.checks import Check
from quantplug.verify.inventory import names
from quantplug.verify.inventory.known import KnownArchitecture
from quantplug.verify.inventory.layouts import KV_SUFFIXES, SCALE_SUFFIXES, WEIGHT_SUFFIXES
from quantplug.verify.inventory.modules import Inventory, Module
from quantplug.verify.report import Finding, error, warning


@dataclass(frozen=True)
class Architecture:
    """What config.json asks for.

    Attributes:
        known: The architecture. Names with one of its `passthrough` beginnings may be there beside.
        modules: All modules that have a weight, each with the suffixes of its tensors, such as `weight` and `bias`, in
            a module's spelling (see `fused.py`).
        copies: Further modules that may be there, and hold the same as others.
    """

    known: KnownArchitecture
    modules: Mapping[str, frozenset[str]]
    copies: Mapping[str, frozenset[str]]


def architecture(inventory: Inventory) -> Iterator[Finding]:
    """Exactly the weights of the architecture, in the shapes that follow from the config's sizes."""
    known = inventory.known
    if known is None or not inventory.modules:
        return
    copies = known.family.duplicates(known.dims)
    modules = _by_module(_required(inventory, known))
    found = Architecture(known, modules, _by_module(copies))
    yield from _missing(inventory, found)
    yield from _extra(inventory, found)
    yield from _misshapen(inventory, found)


def server_settings(inventory: Inventory) -> Iterator[Finding]:
    """Settings that servers ask for and transformers does without are in config.json."""
    known = inventory.known
    if known is None:
        return
    config = inventory.checkpoint.config
    holder = as_object(config.get(known.family.nested)) if known.family.nested else config
    for name, value in known.family.server_settings.items():
        if holder.get(name) != value:
            message = f"is {shown(holder[name]) if name in holder else 'not set'}: servers compute another router"
            yield error(Check.SERVER_SETTINGS, f"config.json {name}", f"{message}; set it to {value}")


def served_names(inventory: Inventory) -> Iterator[Finding]:
    """Tensors have the names that servers look for, where tools write others too."""
    known = inventory.known
    for name, served in ({} if known is None else known.family.served_names).items():
        if name in inventory.checkpoint.tensors:
            yield warning(Check.NAMES, name, f"servers look for {served}: rename the tensor, in the index too")


def _required(inventory: Inventory, known: KnownArchitecture) -> Iterator[str]:
    """Every tensor that has to be there; experts of a layer in one tensor, or else one by one where they may be."""
    table, tensors = known.family.by_megatron(), inventory.checkpoint.tensors
    for stored, key in known.family.expected(known.dims):
        row = table[key.module]
        names = [inventory.fused.inner_name(name) for name in stored]
        one_by_one = row.when_packed(fused_is_read=False)
        # A layer may have its experts in one tensor or each by itself; a part of both is a tensor that is missing.
        apart = one_by_one is not row and tensors.keys().isdisjoint(names)
        yield from one_by_one.hf_names(key, known.dims) if apart else names


def _by_module(tensors: Iterable[str]) -> Mapping[str, frozenset[str]]:
    """Modules with the suffixes of their tensors."""
    found: dict[str, set[str]] = {}
    for tensor in tensors:
        module, suffix = names.split(tensor)
        found.setdefault(module, set()).add(suffix)
    return {module: frozenset(suffixes) for module, suffixes in found.items()}


def _has_weight(module: Module | None) -> bool:
    """A quantized module without its codes is for the rule on coverage."""
    return module is not None and (module.quantized or not module.tensors.keys().isdisjoint(WEIGHT_SUFFIXES))


def _missing(inventory: Inventory, found: Architecture) -> Iterator[Finding]:
    layers = {names.layer(module) for module in inventory.modules}
    lost = _lost_mtp(inventory, found)
    missing: dict[str, list[str]] = {}
    for name, suffixes in sorted(found.modules.items()):
        layer = names.layer(name)
        # A layer of which nothing is there is one finding of the rule on layers, not a dozen here.
        if name in lost or (layer is not None and layer not in layers):
            continue
        module = inventory.modules.get(name)
        absent = {suffix for suffix in suffixes - {"weight"} if module is None or suffix not in module.tensors}
        if "weight" in suffixes and not _has_weight(module) and not _told_elsewhere(inventory, found, name):
            absent.add("weight")
        for suffix in sorted(absent):
            # Put together by kind, so that what a tool forgot in all layers is one line, and not as many as there are
            # layers.
            missing.setdefault(f"{kind_of(name)}.{suffix}", []).append(f"{name}.{suffix}")
    for absent_alike in missing.values():
        message = f"missing: {found.known.name} has it{_others(absent_alike)}"
        yield error(Check.ARCHITECTURE, absent_alike[0], message)
    message = f"missing: {found.known.family.mtp_setting} is {found.known.dims.mtp_layers} in config.json"
    if lost:
        yield error(Check.ARCHITECTURE, min(lost), f"{message}{_others(sorted(lost))}")
    for layer_id in found.known.numbered_mtp:
        if layer_id not in {number for _, number in filter(None, layers)}:
            yield error(Check.ARCHITECTURE, f"model.layers.{layer_id}", message)


def _lost_mtp(inventory: Inventory, found: Architecture) -> frozenset[str]:
    """The modules of multi-token prediction with names of their own, where none of them is there."""
    rows = (row for row in found.known.family.mappings if row.block is LayerStack.MTP_APART)
    tensors = (
        name for row in rows for key in row.keys(found.known.dims) for name in row.hf_names(key, found.known.dims)
    )
    modules = frozenset(names.split(tensor)[0] for tensor in tensors)
    return modules if modules.isdisjoint(inventory.modules) else frozenset()


def _told_elsewhere(inventory: Inventory, found: Architecture, name: str) -> bool:
    """The rules on heads and experts say that it is missing, or it may be."""
    if names.is_head(name):
        return isinstance(inventory.checkpoint.config.get("tie_word_embeddings"), bool)
    expert = names.expert(name)
    if expert is None:
        return False
    siblings = inventory.mixtures.get(expert.experts, {})
    # One expert without a projection is told by the rule on experts; a projection that all lack is told here.
    if siblings:
        return any(expert.projection in projections for projections in siblings.values())
    parent = expert.experts.removesuffix(".experts")
    router, fused = inventory.modules.get(f"{parent}.gate"), parent in inventory.experts_parents
    matrix = router.plain_matrix if router is not None else None
    # The rule on experts speaks wherever there is a router of this many rows.
    return fused or (matrix is not None and matrix.shape[0] == found.known.dims.num_experts)


def _extra(inventory: Inventory, found: Architecture) -> Iterator[Finding]:
    known = {*WEIGHT_SUFFIXES, *SCALE_SUFFIXES, *KV_SUFFIXES}
    if inventory.checkpoint.config.get("attention_bias") is True:
        known.add("bias")
    extra: dict[str, list[str]] = {}
    for module in inventory.modules.values():
        own = found.modules.get(module.name) or found.copies.get(module.name)
        # A vision tower and its like have no rows in the table: they are carried over unseen.
        if own is None and f"{module.name}.".startswith(found.known.family.passthrough):
            continue
        if own is not None:
            strange = module.tensors.keys() - known - own
        else:  # An attention has no weight of its own, but may have the scales of its cache.
            attends = f"{module.name}.k_proj" in found.modules
            strange = module.tensors.keys() - (KV_SUFFIXES if attends else set())
        strange = {part for part in strange if not is_recomputed(f"{module.name}.{part}")}
        if strange and not _beyond(module.name, found) and not module.name.endswith(".experts"):
            extra.setdefault(kind_of(module.name), []).extend(f"{module.name}.{part}" for part in sorted(strange))
    for strangers in extra.values():
        message = f"no weight of {found.known.name}: readers drop it, or stop{_others(strangers)}"
        yield error(Check.ARCHITECTURE, strangers[0].removeprefix("."), message)


def _beyond(name: str, found: Architecture) -> bool:
    """In a layer, or of an expert, past the config's number, which the rules on layers and experts tell."""
    layer, expert = names.layer(name), names.expert(name)
    past_layers = layer is not None and layer[1] >= found.known.numbered_mtp.stop
    return past_layers or (expert is not None and expert.id >= found.known.dims.num_experts)


def _misshapen(inventory: Inventory, found: Architecture) -> Iterator[Finding]:
    wrong: dict[tuple[str, Shape, Shape], list[str]] = {}
    for name, suffixes in sorted({**found.modules, **found.copies}.items()):
        module = inventory.modules.get(name)
        if module is None:
            continue
        for suffix in sorted(suffixes):
            kind, shape = kind_of(f"{name}.{suffix}"), _shape(module, suffix)
            wanted = expected_shape(kind, found.known.dims, found.known.family.shapes)
            if shape is None or wanted is None:
                continue
            # Of a tensor of all experts: with their number in front, and turned where the table says so.
            wanted = module.stored_shape(wanted)
            if not fits(shape, wanted):
                wrong.setdefault((kind, shape, wanted), []).append(f"{name}.{suffix}")
    for (_, shape, wanted), tensors in wrong.items():
        message = f"is {list(shape)}, by config.json {list(wanted)}{_others(tensors)}"
        yield error(Check.ARCHITECTURE, tensors[0], message)


def _shape(module: Module, suffix: str) -> Shape | None:
    """Of a tensor, of the weight as it is unpacked; None when the format is not known."""
    if suffix == "weight" and module.layout is not None and module.codes is not None:
        return module.stored_shape((module.codes.shape[0], module.layout.columns(module.codes)))
    tensor = module.tensors.get(suffix)
    return None if tensor is None or (suffix == "weight" and module.quantized) else tensor.shape


def _others(like: list[str]) -> str:
    return f" (and {len(like) - 1} more like it)" if len(like) > 1 else ""


RULES = (architecture, server_settings, served_names)
