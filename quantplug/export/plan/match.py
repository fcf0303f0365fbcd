"""Which row of the table each weight stands in, and which weights are unknown, missing, there twice or mis-shaped."""

from collections.abc import Iterable, Mapping

from quantplug.errors import MappingError, ShapeError
from quantplug.export.plan.types import WholeWeight
from quantplug.findings import Findings, Kind, nearest
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions, layout_shapes
from quantplug.mappings.rows import WeightMapping
from quantplug.mappings.shapes.expected import expected_shape, fits
from quantplug.mappings.shapes.kinds import kind_of
from quantplug.mappings.table import Family

_SAME_MODEL = (
    "Check that the Hugging Face config is that of this model, and that the model holds all layers and experts."
)
_UNKNOWN = Kind(MappingError, "The model has parameters that the table of its architecture does not know.", _SAME_MODEL)
_MISSING = Kind(MappingError, "Parameters that the Hugging Face config promises are not in the model.", _SAME_MODEL)
_TWICE = Kind(MappingError, "Parameters stand twice in the model.", "Pass each model chunk once.")
_SHAPE = Kind(ShapeError, "Shapes in the model do not agree with the Hugging Face checkpoint.", _SAME_MODEL)

Slot = tuple[tuple[str, ...], int | None]
"""What one parameter stands for: its Hugging Face names, and which expert of them."""

Mapped = list[tuple[WholeWeight, WeightMapping]]


def match_table(
    weights: Iterable[WholeWeight], family: Family, dims: ModelDimensions, tied: bool, findings: Findings
) -> Mapped:
    """Every weight with its row, in writing order; what does not fit goes into `findings`."""
    table = family.by_megatron()
    # By what a parameter stands for, not by its name: TE and local layer specs spell the same one differently.
    found: dict[Slot, tuple[WholeWeight, WeightMapping]] = {}
    expected = dict(_expected(family, dims, tied))
    extra: dict[int, int] = {}
    for weight in weights:
        mapping = table.get(weight.key.module)
        # A layer has dozens of weights, and is one thing that is there too much.
        if weight.key.layer is not None and weight.key.is_mtp and weight.key.layer >= dims.mtp_layers:
            extra.setdefault(weight.key.layer, weight.rank)
            continue
        if mapping is None:
            hint = nearest(weight.key.module, table)
            findings.add_weight(_UNKNOWN, weight, f"not in the table of {family.name}{hint}")
            continue
        names = mapping.hf_names(weight.key, dims)
        slot = (names, weight.key.expert)
        if slot in found:
            findings.add_weight(_TWICE, weight, f"stands for {', '.join(names)} a second time")
        elif slot not in expected:
            findings.add_weight(_UNKNOWN, weight, f"a model of this config has no {', '.join(names)}")
        found[slot] = (weight, mapping.of_norm(weight.zero_centred, usual=family.zero_centred))
    has_rows = any(row.block.is_mtp for row in family.mappings)
    for layer, rank in sorted(extra.items()):
        reason = f"a model of this config has {dims.mtp_layers or 'none'}"
        findings.add(_extra_mtp(family, has_rows), f"mtp.layers.{layer}", reason, rank=rank)
    for slot, key in expected.items():
        if slot not in found:
            findings.add(_MISSING, key.name, f"needed for {', '.join(slot[0])}", key.expert)
    # Where every MTP layer is missing it is most often one setting, and the remedy above would send the user looking
    # for lost layers.
    mtp = [slot for slot, key in expected.items() if table[key.module].block.is_mtp]
    if mtp and found.keys().isdisjoint(mtp):
        findings.add(_no_mtp(family.mtp_setting), family.mtp_setting, f"asks for {dims.mtp_layers}")
    return [found[slot] for slot in expected if slot in found]


def _no_mtp(setting: str) -> Kind:
    return Kind(
        MappingError,
        "The config promises layers of multi-token prediction, and the model has none.",
        f"Build the model with them (mtp_num_layers), or set {setting} to 0 in config.json, or pass drop_mtp=True, "
        "which writes it so.",
    )


def _extra_mtp(family: Family, has_rows: bool) -> Kind:
    counted = (
        f"Set {family.mtp_setting} in config.json to as many as the model has, or export" if has_rows else "Export"
    )
    return Kind(
        MappingError,
        "The model has layers of multi-token prediction that its config does not count.",
        f"{counted} without any: drop_mtp=True (--drop-mtp).",
    )


def _expected(family: Family, dims: ModelDimensions, tied: bool) -> list[tuple[Slot, ParamKey]]:
    """Every part group of a whole model: outside the layers first, then layer after layer, MTP last."""
    keys = [(names, key) for names, key in family.expected(dims) if not (tied and set(names) & set(family.tied))]
    slots = [((names, key.expert), key) for names, key in keys]
    return sorted(slots, key=lambda item: _place(item[1]))


def _place(key: ParamKey) -> tuple[str, int]:
    # Sorts as text: what is outside the layers, then `decoder`, then `mtp`.
    return ("", -1) if key.layer is None else (key.stack, key.layer)


def part_shapes(
    weight: WholeWeight,
    mapping: WeightMapping,
    family: Family,
    dims: ModelDimensions,
    reference: Mapping[str, tuple[int, ...]],
    findings: Findings,
) -> tuple[tuple[int, ...], ...]:
    """Shapes of the Hugging Face parts of a weight, of one expert's alone: its layout run on a tensor without data.

    Args:
        reference: Shapes in the source checkpoint by name, as far as they are known.
    """
    problem = mapping.layout.problem(weight.shape, dims)
    if problem is not None:
        findings.add_weight(_SHAPE, weight, problem)
        return ()
    shapes = layout_shapes(weight.shape, mapping.layout, dims)
    placement = mapping.placement(weight.key, dims)
    for name, shape in zip(mapping.hf_names(weight.key, dims), shapes, strict=True):
        # Of what Megatron's model has not, the config says nothing that we read.
        expected = None if mapping.role.is_passthrough else expected_shape(kind_of(name), dims, family.shapes)
        stored = placement.stored_shape(shape) if placement else shape
        if expected is not None and not fits(shape, expected):
            said = ", ".join("any" if size is None else str(size) for size in expected)
            reason = f"gives {name} of shape {list(shape)}, the config says [{said}]"
            findings.add_weight(_SHAPE, weight, reason)
        elif reference.get(name, stored) != stored:
            reason = f"gives {name} of shape {list(stored)}, the checkpoint has {list(reference[name])}"
            findings.add_weight(_SHAPE, weight, reason)
    return shapes
