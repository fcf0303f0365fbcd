"""Linears that servers fuse into one: what they share, and where their blocks of scales must end.

They share one amax, and so one `weight_scale_2` and one `input_scale`. The parts of one Megatron weight (q, k and v;
gate and up) do anyway; several Megatron weights, such as the two down projections of multi-latent attention, do where a
row's `scale_group` names them.

The last blocks of a weight by itself may be partial. Where linears are put below one another to become one, a block in
the middle would belong to two of them, and the merged table of scales has no row for that: vLLM 0.33 asks that of a
merged linear all sizes but the last are multiples of the block's rows (`validate_fp8_block_shape` in
quantization/utils/fp8_utils.py). So it is of one tensor that servers take for several, as Mamba's `in_proj`
(`MambaMixer2` in layers/mamba/mamba_mixer2.py). The width of routed experts must be one in any case (`Fp8MoEMethod` in
quantization/fp8.py).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from quantplug.errors import ShapeError, UnsupportedQuantizationError
from quantplug.export.plan.match import Mapped
from quantplug.export.plan.types import QuantizerState, Schemes, WholeWeight
from quantplug.findings import Findings, Kind
from quantplug.formats import WeightFormat
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions, layout_shapes
from quantplug.mappings.rows import WeightMapping
from quantplug.mappings.segments import SegmentedAlike

_PARTIAL = Kind(
    UnsupportedQuantizationError,
    "Only some weights of a group are quantized, and servers fuse the group into one linear.",
    "Enable or disable the weight quantizers of the whole group together.",
)
_UNLIKE = Kind(
    UnsupportedQuantizationError,
    "Linears that servers fuse, or load alike, are quantized in several formats.",
    "Quantize all of them in one format: the linears of a group, or fc1 and fc2 of all experts of a layer.",
)
_BORDER = Kind(
    ShapeError,
    "Blocks of scales do not end where servers merge linears, or share out experts.",
    "Choose a format whose block size divides them, or disable the quantizers of all linears that are named here.",
)


def group_names(
    mapped: Mapped, written: Mapping[ParamKey, WeightMapping], dims: ModelDimensions
) -> dict[ParamKey, str]:
    """The scale group of every weight that has one, by the row that it is written by."""
    named = ((whole.key, written[whole.key].group(whole.key, dims)) for whole, _ in mapped)
    return {key: group for key, group in named if group is not None}


def with_shared_amaxes(mapped: Mapped, groups: Mapping[ParamKey, str], findings: Findings) -> Mapped:
    """The weights with the largest amax of their group; a group quantized in part goes into `findings`."""
    # Of fused linears vLLM and SGLang take the largest weight_scale_2, without scaling the blocks of the others anew,
    # and TensorRT-LLM asserts that they are equal. With one amax for all of them every reader is right.
    members: defaultdict[str, list[WholeWeight]] = defaultdict(list)
    for whole, _ in mapped:
        if whole.key in groups:
            members[groups[whole.key]].append(whole)
    weights = {group: _largest([whole.weight for whole in wholes]) for group, wholes in members.items()}
    activations = {group: _largest([whole.activation for whole in wholes]) for group, wholes in members.items()}
    for group, wholes in members.items():
        plain = [whole for whole in wholes if whole.weight is None]
        for whole in plain if len(plain) < len(wholes) else ():
            findings.add_weight(_PARTIAL, whole, f"unquantized, others of {group} are")
    return [
        (
            replace(
                whole,
                weight=_with_amax(whole.weight, weights.get(groups.get(whole.key, ""))),
                activation=_with_amax(whole.activation, activations.get(groups.get(whole.key, ""))),
            ),
            mapping,
        )
        for whole, mapping in mapped
    ]


def check_one_scheme(mapped: Mapped, groups: Mapping[ParamKey, str], schemes: Schemes, findings: Findings) -> None:
    """Groups whose members, and layers whose experts, are quantized in several ways go into `findings`.

    vLLM 0.33 and SGLang 0.5.23 take the first key that they find of a layer's experts for all of them, fc1 and fc2
    (`_resolve_quant_algo` in their modelopt quantization), and stop at linears of several formats that they fuse.
    """
    members: defaultdict[str, list[WholeWeight]] = defaultdict(list)
    for whole, _ in mapped:
        if whole.key not in schemes:
            continue
        if whole.key.expert is not None:
            members[f"the experts of {whole.key.stack} layer {whole.key.layer}"].append(whole)
        elif whole.key in groups:
            members[groups[whole.key]].append(whole)
    for group, wholes in members.items():
        counts = Counter(schemes[whole.key] for whole in wholes)
        (usual, _), *others = counts.most_common()
        # Those that are most are what was meant, so that the fewest names are told.
        for whole in wholes if others else ():
            if schemes[whole.key] != usual:
                findings.add_weight(
                    _UNLIKE, whole, f"is {schemes[whole.key].label}, others of {group} are {usual.label}"
                )


def _largest(states: Sequence[QuantizerState | None]) -> float | None:
    """The largest amax that can be used; what cannot be used is found by the check of the calibration."""
    amaxes = [state.amax for state in states if state is not None and state.amax is not None]
    return max((amax for amax in amaxes if math.isfinite(amax)), default=None)


def _with_amax(state: QuantizerState | None, largest: float | None) -> QuantizerState | None:
    # What is missing, NaN or negative stays so, for the check of the calibration to name the very quantizer.
    usable = state is not None and state.amax is not None and math.isfinite(state.amax) and state.amax >= 0
    return replace(state, amax=largest) if state is not None and usable and largest is not None else state


@dataclass(frozen=True)
class _Part:
    """A packed part of a weight, by its name on disk, its shape [out, in] and its format."""

    whole: WholeWeight
    name: str
    shape: tuple[int, ...]
    packing: WeightFormat

    @property
    def step(self) -> int | None:
        """Rows of a block; None where rows cannot be cut at all."""
        rows, _ = self.packing.cut_steps
        return rows


def check_block_borders(
    mapped: Mapped,
    written: Mapping[ParamKey, WeightMapping],
    groups: Mapping[ParamKey, str],
    schemes: Schemes,
    dims: ModelDimensions,
    findings: Findings,
) -> None:
    """Quantized weights whose blocks a server would cut go into `findings`, with all that they are merged with.

    Args:
        written: The row by which each weight is written.
        groups: Names of the linears that servers make of several weights, by weight.
    """
    for merged in _merged_linears(mapped, written, groups, schemes, dims):
        # The last one may end inside a block: nothing lies below it.
        *inner, _ = merged
        cut = [part for part in inner if part.step is not None and part.shape[0] % part.step]
        # Each weight once, though several of its parts are merged.
        for whole in {part.whole.key: part.whole for part in merged}.values() if cut else ():
            findings.add_weight(_BORDER, whole, _merged_reason(cut[0], merged))
    for whole, _ in mapped:
        if whole.key in schemes and whole.key.expert is not None:
            _check_width(whole, written[whole.key], schemes[whole.key].weight, dims, findings)


def _merged_linears(
    mapped: Mapped,
    written: Mapping[ParamKey, WeightMapping],
    groups: Mapping[ParamKey, str],
    schemes: Schemes,
    dims: ModelDimensions,
) -> Iterator[Sequence[_Part]]:
    """The packed parts of each linear that a server makes, in the order in which it puts them below one another.

    They are the parts of one Megatron weight (q, k and v; gate and up), but where its row says otherwise, and those of
    a group of weights, whose order is that of the table. Experts have a rule of their own, which holds for all parts.
    """
    linears: defaultdict[tuple[ParamKey | str, str | None], list[_Part]] = defaultdict(list)
    for whole, _ in mapped:
        row = written[whole.key]
        if whole.key not in schemes or whole.key.expert is not None:
            continue
        shapes = layout_shapes(whole.shape, row.layout, dims)
        for pattern, name, shape in zip(row.hf, row.hf_names(whole.key, dims), shapes, strict=True):
            if pattern not in row.high_precision:
                merged = next((linear.name for linear in row.merged if pattern in linear.parts), None)
                # Parts of a scale group come together over several weights; where a row says that a server makes two
                # modules of one weight, each has parts of its own.
                linears[groups.get(whole.key, whole.key), merged] += [
                    _Part(whole, name, segment, schemes[whole.key].weight) for segment in _segments(row, shape, dims)
                ]
    return iter(linears.values())


def _segments(row: WeightMapping, shape: tuple[int, ...], dims: ModelDimensions) -> Iterator[tuple[int, ...]]:
    """The shapes of what servers take a tensor for: several linears, where it is in segments, or one."""
    if not isinstance(row.layout, SegmentedAlike):
        yield shape
        return
    for rows in row.layout.sizes(dims):
        yield rows, *shape[1:]


def _merged_reason(cut: _Part, merged: Sequence[_Part]) -> str:
    names = [_short(part) for part in merged if part is not cut]
    others = "its other parts" if set(names) == {_short(cut)} else ", ".join(names)
    return (
        f"{cut.packing.name}: out_features {cut.shape[0]} of {_short(cut)} end inside a block of {cut.step} rows, "
        f"and servers merge it with {others}"
    )


def _short(part: _Part) -> str:
    return part.name.removesuffix(".weight").rpartition(".")[2]


def _check_width(
    whole: WholeWeight, row: WeightMapping, packing: WeightFormat, dims: ModelDimensions, findings: Findings
) -> None:
    """An expert's width lies along the axis that its layout shards."""
    axis = row.layout.shard_axis
    step = None if axis is None else packing.cut_steps[axis]
    if axis is None or step is None:
        return
    for shape in layout_shapes(whole.shape, row.layout, dims):
        # Tensor parallel servers cut an expert along its width, and merge gate and up there: unlike other linears the
        # last block must be whole as well.
        if shape[axis] % step:
            reason = f"{packing.name}: the width {shape[axis]} of an expert ends inside a block of {step}"
            findings.add_weight(_BORDER, whole, reason)
            return
