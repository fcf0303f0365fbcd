"""The weights of a training checkpoint as an export knows them: by the table of the architecture, from its index."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from quantplug.checkpoint.torch_dist.aside import Aside, left_aside
from quantplug.checkpoint.torch_dist.files import damaged
from quantplug.checkpoint.torch_dist.index import require_covered
from quantplug.checkpoint.torch_dist.keys import FoundParameter, find_parameters, naming_of, of_checkpoint, unknown_keys
from quantplug.checkpoint.torch_dist.noted.vocabulary import is_padding
from quantplug.checkpoint.torch_dist.quantizers import SavedQuantizer, SavedQuantizers, Settings, is_quantized
from quantplug.checkpoint.torch_dist.reader import Segment, TorchDistReader
from quantplug.checkpoint.untrusted.pickles import said
from quantplug.errors import CheckpointError, MappingError, Offender, ShapeError
from quantplug.export.plan.build import PLAIN_DTYPES
from quantplug.export.plan.quantizers.kv_cache import KVQuantizers
from quantplug.export.plan.types import QuantizerState, WholeWeight
from quantplug.export.sources.quantizer_state import CHANGES_INPUTS, QuantizerSettings, wrong_blocks
from quantplug.findings import Findings, Kind, nearest
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import Family

_LINEAR_OF_KEYS = ".linear_qkv.weight"

_SAME_MODEL = "Pass the Hugging Face directory of this very model: --hf, whose config.json says its sizes."
_UNKNOWN = Kind(
    MappingError, "The checkpoint has tensors that the table of its architecture does not know.", _SAME_MODEL
)
_STACK = Kind(ShapeError, "The checkpoint has another number of layers or experts than the config.", _SAME_MODEL)
_VOCABULARY = Kind(
    ShapeError,
    "The checkpoint's vocabulary is not that of the config: rows of it would be lost.",
    "Pass vocab_size (--vocab-size): the number of tokens that the model was trained with, which config.json will then "
    "say; or the config's own, if all rows beyond it are padding.",
)
_PARTS = Kind(ShapeError, "Parts of a tensor in the checkpoint do not fit together.", _SAME_MODEL)
_DTYPES = Kind(
    CheckpointError,
    "Tensors of the checkpoint are of types that are not written.",
    f"Save the checkpoint with weights in one of {', '.join(map(str, PLAIN_DTYPES))}.",
)


@dataclass(frozen=True)
class CheckpointWeights:
    """What a training checkpoint holds of a model.

    Attributes:
        weights: Every weight that it has, with what its quantizers say.
        segments: Where each of them is.
        unclaimed: Names of enabled quantizers that belong to no weight or input of a linear.
        attentions: What the quantizers of its attention layers say of a KV cache.
        aside: What is there beside the model.
        group_amaxes: Where the amaxes of single groups are, of weights whose quantizers hold such.
    """

    weights: tuple[WholeWeight, ...]
    segments: Mapping[ParamKey, tuple[Segment, ...]]
    unclaimed: tuple[str, ...]
    attentions: tuple[KVQuantizers, ...]
    aside: tuple[Aside, ...]
    group_amaxes: Mapping[ParamKey, tuple[Segment, ...]] = field(default_factory=dict)


def checkpoint_weights(
    reader: TorchDistReader, family: Family, dims: ModelDimensions, padded_to: int | None, *, grown: bool = False
) -> CheckpointWeights:
    """Every weight of a model of these sizes that a checkpoint has. What it lacks, the plan says.

    Args:
        padded_to: Multiple to which its vocabulary is padded, where that is known.
        grown: Whether a caller has said how many tokens there are, so that all rows beyond them are padding.

    Raises:
        CheckpointError: Chunks do not make up a tensor, settings of quantizers cannot be read or are missing, or a
            tensor is of a type that is not written.
        MappingError: A tensor is no part of the model, of its quantizers or of what trainers keep beside it.
        ShapeError: Layers or experts are stacked in another number than the config says, or an embedding has more rows
            than padding explains.
        UnsupportedQuantizationError: Weights that AWQ, SmoothQuant or a rotation has changed.
    """
    index = reader.index
    naming = naming_of(family, dims, index.tensors)
    found = tuple(find_parameters(family, naming, index.tensors))
    used = {segment.key for parameter in found for segment in parameter.segments}
    findings = Findings(ranks=False)
    for key in unknown_keys(index.tensors, used):
        findings.add(_UNKNOWN, key, f"is no tensor of {family.name}{nearest(key, used)}")
    for key, problem in _stack_problems(found, reader).items():
        findings.add(_STACK, key, problem)
    findings.raise_if_any()
    require_covered(index, [*used, *(key for key in index.tensors if "_quantizer." in key)])
    quantizers = SavedQuantizers(reader, naming) if is_quantized(index) else None
    if quantizers is not None:
        _refuse_changed_inputs(quantizers)
    rows = family.by_megatron()
    for parameter in found:
        if rows[parameter.key.module].role.is_of_vocabulary:
            stored = reader.shape(parameter.segments[0])[0]
            if not grown and not is_padding(stored, dims.vocab_size, tp=1, unit=padded_to):
                reason = f"has {stored} rows, the config counts {dims.vocab_size}, and padding explains fewer"
                findings.add(_VOCABULARY, parameter.key.name, reason)
    weights = tuple(
        _weight(parameter, reader, quantizers if rows[parameter.key.module].role.multiplies else None, findings)
        for parameter in found
    )
    findings.raise_if_any()
    if quantizers is not None:
        quantizers.require_settings()
    attentions = tuple(_attentions(found, quantizers)) if quantizers else ()
    return CheckpointWeights(
        weights,
        {parameter.key: parameter.segments for parameter in found},
        tuple(_unclaimed(quantizers)) if quantizers else (),
        attentions,
        left_aside(index),
        quantizers.group_amaxes if quantizers else {},
    )


def _stack_problems(found: Sequence[FoundParameter], reader: TorchDistReader) -> dict[str, str]:
    """Tensors of all layers, or all experts, whose number is another than that of the config."""
    problems = {}
    for segment in (segment for parameter in found for segment in parameter.segments):
        shape = reader.index.tensors[segment.key].shape
        if shape[: len(segment.of)] != segment.of:
            problems[segment.key] = f"stacks {list(shape[: len(segment.of)])}, the config has {list(segment.of)}"
    return problems


def _weight(
    parameter: FoundParameter, reader: TorchDistReader, quantizers: SavedQuantizers | None, findings: Findings
) -> WholeWeight:
    key, segments = parameter.key, parameter.segments
    shapes = [reader.shape(segment) for segment in segments]
    dtypes = {reader.index.tensors[segment.key].dtype for segment in segments}
    if len({shape[1:] for shape in shapes}) > 1 or (len(shapes) > 1 and not all(shapes)) or len(dtypes) > 1:
        said = ", ".join(f"{segment.key} {list(shape)}" for segment, shape in zip(segments, shapes, strict=True))
        findings.add(_PARTS, key.name, f"is made of {said}", key.expert)
        return WholeWeight(key, (), dtypes.pop())
    dtype = dtypes.pop()
    if dtype not in PLAIN_DTYPES:
        findings.add(_DTYPES, key.name, f"is {dtype}", key.expert)
    shape = shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])
    spelling = of_checkpoint(key.module)
    weight = quantizers.of_weight(spelling, key) if quantizers else None
    activation = quantizers.of_input(spelling, key) if quantizers else None
    state = _state(weight)
    if state is not None and state.search.is_given and quantizers is not None:
        amaxes = sum(reader.numel(segment) for segment in quantizers.group_amaxes.get(key, ()))
        problem = wrong_blocks(amaxes, shape) if amaxes else None
        state = replace(
            state,
            amax=state.amax if amaxes else None,
            unsupported=(*state.unsupported, *((problem,) if problem else ())),
        )
    return WholeWeight(key, shape, dtype, weight=state, activation=_state(activation))


def _unclaimed(quantizers: SavedQuantizers) -> Iterator[str]:
    return (name for name, settings in quantizers.unclaimed() if _is_enabled(settings))


def _is_enabled(settings: Settings) -> bool:
    return not settings.get("_disabled", False)


def _state(quantizer: SavedQuantizer | None) -> QuantizerState | None:
    """The settings and the amax of an enabled quantizer; None if it is absent or disabled."""
    if quantizer is None or not _is_enabled(quantizer.settings):
        return None
    return _settings(quantizer.name, quantizer.settings).state(quantizer.name, quantizer.amax)


def _attentions(found: Sequence[FoundParameter], quantizers: SavedQuantizers) -> Iterator[KVQuantizers]:
    """What the quantizers of every attention layer say of a KV cache."""
    for parameter in found:
        attention, dot, linear = parameter.key.module.rpartition(_LINEAR_OF_KEYS)
        if dot and not linear:
            core = of_checkpoint(f"{attention}.core_attention.weight")
            yield from _attention(quantizers.of_cache(core, parameter.key), parameter.key)
    for pair in quantizers.of_other_caches():
        yield from _attention(pair, None)


def _attention(pair: Sequence[SavedQuantizer], linear: ParamKey | None) -> Iterator[KVQuantizers]:
    if len(pair) == 2:
        keys, values = pair
        cast = all(quantizer.settings.get("_use_constant_amax") is True for quantizer in pair)
        yield KVQuantizers(keys.name.rpartition(".")[0], _state(keys), _state(values), cast, linear)


def _refuse_changed_inputs(quantizers: SavedQuantizers) -> None:
    findings = Findings(ranks=False)
    for name, settings in quantizers.all():
        for change in _settings(name, settings).changes_of_input():
            findings.add(CHANGES_INPUTS, name, f"has {change}")
    findings.raise_if_any()


def _settings(name: str, saved: Settings) -> QuantizerSettings:
    """The settings of a quantizer, of the attributes that ModelOpt saved.

    Raises:
        CheckpointError: They are none.
    """
    num_bits, blocks, axis = saved.get("_num_bits"), saved.get("_block_sizes") or {}, saved.get("_axis")
    if not (_are_numbers(num_bits) and _are_blocks(blocks) and (axis is None or _are_numbers(axis))):
        raise damaged([Offender(name, "has settings that are none of a quantizer")])
    rotate, backend = saved.get("_rotate"), saved.get("backend")
    return QuantizerSettings(
        num_bits=num_bits if isinstance(num_bits, int) else tuple(num_bits or ()),
        block_sizes=blocks,
        axis=axis,
        backend=None if backend is None else said(backend),
        has_bias=saved.get("_bias") is not None,
        fake_quant=saved.get("_fake_quant") is not False,
        scales_input="_pre_quant_scale" in _buffers(saved),
        rotates=bool(rotate.get("enable")) if isinstance(rotate, dict) else bool(rotate),
        dynamic=saved.get("_dynamic") is True,
    )


def _buffers(saved: Settings) -> Mapping[Any, Any]:
    state = saved.get("_pytorch_state_metadata")
    buffers = state.get("buffers") if isinstance(state, dict) else None
    return buffers if isinstance(buffers, dict) else {}


def _are_numbers(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, tuple | list) and all(isinstance(each, int) for each in value))


def _are_blocks(value: Any) -> bool:
    """Whether these are axes with the sizes of their blocks, and settings beside them."""
    if not isinstance(value, dict):
        return False
    sizes = [size for axis, size in value.items() if isinstance(axis, int)]
    return all(size is None or isinstance(size, int) for size in sizes) and _are_numbers(value.get("scale_bits") or 0)
