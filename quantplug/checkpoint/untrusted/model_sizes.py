"""The sizes of a model by its config, before anything is made of them: whole numbers, and not endless."""

from collections.abc import Iterator, Mapping
from typing import Any

from quantplug.checkpoint.untrusted.json_reader import Json, as_count, as_object
from quantplug.errors import Offender, SourceError, UnsupportedModelError
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.rows import Scope
from quantplug.mappings.table import Family, SizeSetting

_DECODER_SIZES = (
    *(
        SizeSetting((name,))
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "intermediate_size")
    ),
    *(SizeSetting((name,), optional=True, nullable=True) for name in ("num_key_value_heads", "head_dim")),
)
_LAYER_LISTS = ("mlp_only_layers", "moe_layers")
_MOST_UNITS = 1_000_000  # Layers times experts: more is no model, and would take for ever to list.
_MOST_SIZE = 2**26  # Of any axis; the largest vocabulary that is known has 2^18 entries, and no layer is wider.


def read_dimensions(config: Mapping[str, Any], family: Family) -> ModelDimensions:
    """The sizes that a config gives a model.

    Raises:
        SourceError: Settings that are no sizes, or too large for any model; names each by its path in config.json.
        UnsupportedModelError: The family reads no sizes from them.
    """
    unusable = list(_unusable(config, family))
    if unusable:
        raise _no_sizes(family, unusable)
    where = _prefix(family)
    try:
        dims = family.dimensions(config)
    except UnsupportedModelError as error:
        renamed = [Offender(where + it.parameter, it.reason, it.expert, it.rank) for it in error.offenders]
        raise UnsupportedModelError(error.problem, renamed, error.remedy) from error
    if (dims.num_layers + dims.mtp_layers) * max(1, dims.num_experts) > _MOST_UNITS:
        raise _no_sizes(family, [Offender(f"{where}num_hidden_layers", f"more than {_MOST_UNITS} layers or experts")])
    return dims


def _no_sizes(family: Family, offenders: list[Offender]) -> SourceError:
    return SourceError(
        f"The config does not say the sizes of a {family.name} model.",
        offenders,
        "Use the config.json that was saved with the model.",
    )


def _prefix(family: Family) -> str:
    """Where the settings of its sizes are."""
    return "" if family.nested is None else f"{family.nested} "


def _unusable(config: Json, family: Family) -> Iterator[Offender]:
    """Settings that no sizes can be read from."""
    settings = config if family.nested is None else as_object(config.get(family.nested))
    where = _prefix(family)
    # What the family says of one of the decoder's sizes goes before.
    for size in {size.names: size for size in (*_DECODER_SIZES, *family.sizes)}.values():
        key = next((name for name in size.names if settings.get(name) is not None), size.names[0])
        reason = _size_problem(settings, key, size)
        if reason is not None:
            yield Offender(where + key, reason)
    mixture = any(row.scope is Scope.EXPERT for row in family.mappings)
    for key in _LAYER_LISTS if mixture else ():
        if not _is_list_of_layers(settings, key):
            yield Offender(where + key, "is not a list of layer numbers")
    for key in ("num_hidden_layers", family.mtp_setting):
        if (as_count(settings.get(key)) or 0) > _MOST_UNITS:
            yield Offender(where + key, f"more than {_MOST_UNITS} layers or experts")


def _size_problem(settings: Json, key: str, size: SizeSetting) -> str | None:
    count = as_count(settings.get(key))
    if settings.get(key) is None and (size.nullable if key in settings else size.optional):
        return None
    if count is None or count < size.least:
        said = f"is {settings[key]!r}" if key in settings else "is not set"
        return f"{said[:80]}, not a whole number {'above zero' if size.least else 'of at least zero'}"
    return f"is {count}: no model has more than {_MOST_SIZE} of anything" if count > _MOST_SIZE else None


def _is_list_of_layers(settings: Mapping[str, Any], key: str) -> bool:
    layers = settings.get(key)
    return layers is None or (isinstance(layers, list) and all(as_count(layer) is not None for layer in layers))
