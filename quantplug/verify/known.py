"""The architecture that config.json names, where we have its table: sizes, and rows in the form that the files have."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quantplug.errors import UnsupportedModelError
from quantplug.mappings.families import find_family
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.source_fit import in_form
from quantplug.mappings.table import Block, Family, Scope, SizeSetting
from quantplug.verify.checkpoint import Checkpoint
from quantplug.verify.checks import Check
from quantplug.verify.report import Finding, error
from quantplug.verify.untrusted import Json, as_count, as_object, as_texts

_DECODER_SIZES = (
    *(
        SizeSetting((name,))
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "intermediate_size")
    ),
    *(SizeSetting((name,), optional=True, nullable=True) for name in ("num_key_value_heads", "head_dim")),
)
_MOST_UNITS = 1_000_000  # layers times experts; more is no model, and would take for ever to list


@dataclass(frozen=True)
class KnownArchitecture:
    """The table of an architecture, and the sizes that a config gives it.

    Attributes:
        name: As config.json names it.
        family: Its rows in the form that the checkpoint has.
    """

    name: str
    family: Family
    dims: ModelDimensions

    @property
    def numbered_mtp(self) -> range:
        """Numbers of the layers of multi-token prediction, where they are counted on after the decoder's."""
        counted_on = any(row.block is Block.MTP for row in self.family.mappings)
        first = self.dims.num_layers
        return range(first, first + (self.dims.mtp_layers if counted_on else 0))

    def carries(self, tensor: str) -> bool:
        """Whether a tensor is none of the table's, and goes into an export as it is."""
        return tensor.startswith(self.family.passthrough) and tensor not in self._rows

    @cached_property
    def _rows(self) -> frozenset[str]:
        return frozenset(name for names, _ in self.family.expected(self.dims) for name in names)


def known_architecture(checkpoint: Checkpoint) -> tuple[KnownArchitecture | None, list[Finding]]:
    """What a checkpoint's config asks for; None where we have no table, or it gives no sizes, which is then found."""
    config = checkpoint.config
    family = table_of(config)
    if family is None:
        return None, []
    if unusable := list(_unusable(config, family)):
        return None, unusable
    try:
        dims = family.dimensions(config)
    except UnsupportedModelError as problem:
        where = _config_path(family)
        return None, [error(Check.ARCHITECTURE, f"{where} {it.parameter}", it.reason) for it in problem.offenders]
    if (dims.num_layers + dims.mtp_layers) * max(1, dims.num_experts) > _MOST_UNITS:
        message = f"more than {_MOST_UNITS} layers or experts"
        return None, [error(Check.ARCHITECTURE, "config.json num_hidden_layers", message)]
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    (name, *_) = as_texts(config.get("architectures"))
    return KnownArchitecture(name, in_form(family, shapes, dims), dims), []


def table_of(config: Json) -> Family | None:
    """The table of the architecture that config.json names; None where we have none."""
    names = as_texts(config.get("architectures"))
    try:
        return find_family(names[0]) if names else None
    except UnsupportedModelError:
        return None


def _config_path(family: Family) -> str:
    """Where the settings of its sizes are."""
    return "config.json" if family.nested is None else f"config.json {family.nested}"


def _unusable(config: Json, family: Family) -> Iterator[Finding]:
    """Settings that no sizes can be read from."""
    settings = config if family.nested is None else as_object(config.get(family.nested))
    where = _config_path(family)
    # What the family says of one of the decoder's sizes goes before.
    for size in {size.names: size for size in (*_DECODER_SIZES, *family.sizes)}.values():
        key = next((name for name in size.names if settings.get(name) is not None), size.names[0])
        count = as_count(settings.get(key))
        may_be_none = size.nullable if key in settings else size.optional
        if (settings.get(key) is None and may_be_none) or (count is not None and count >= size.least):
            continue
        said = f"is {settings[key]!r}" if key in settings else "is not set"
        least = "above zero" if size.least else "of at least zero"
        yield error(Check.ARCHITECTURE, f"{where} {key}", f"{said[:80]}, not a whole number {least}")
    mixture = any(row.scope is Scope.EXPERT for row in family.mappings)
    for key in _LAYER_LISTS if mixture else ():
        if not _is_list_of_layers(settings, key):
            yield error(Check.ARCHITECTURE, f"{where} {key}", "is not a list of layer numbers")
    for key in ("num_hidden_layers", family.mtp_setting):
        if (as_count(settings.get(key)) or 0) > _MOST_UNITS:
            yield error(Check.ARCHITECTURE, f"{where} {key}", f"more than {_MOST_UNITS} layers or experts")


_LAYER_LISTS = ("mlp_only_layers", "moe_layers")


def _is_list_of_layers(settings: Mapping[str, Any], key: str) -> bool:
    layers = settings.get(key)
    return layers is None or (isinstance(layers, list) and all(as_count(layer) is not None for layer in layers))
