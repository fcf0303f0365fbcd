"""What a checkpoint says of quantizers: their settings, which are pickles in objects, and their amaxes.

ModelOpt keeps the settings of a module's quantizers as bytes in the module's extra state. Of experts, 0.47 has in each
one's the weight quantizers of all experts of the rank that saved, `weight_quantizer.{local expert}`, quantplug the
expert's own as `weight_quantizer.0`, and 0.46 one `weight_quantizer` for all (`quantplug.plugins.extra_state`).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch

from quantplug.checkpoint.torch_dist.files import damaged, open_regular
from quantplug.checkpoint.torch_dist.index import Extent, Index
from quantplug.checkpoint.torch_dist.keys import Naming
from quantplug.checkpoint.torch_dist.reader import Segment, TorchDistReader
from quantplug.checkpoint.torch_dist.saved import Span, UnusableSaveError, read_saved
from quantplug.checkpoint.untrusted.pickles import Made, only_one
from quantplug.errors import Offender
from quantplug.mappings.keys import ParamKey, fill

MODELOPT_STATE = "modelopt_state"
"""Directory beside the tensors of a quantized model: the config that its quantizers were inserted by."""

WEIGHT, INPUT = "weight_quantizer", "input_quantizer"
_OF_CACHE = ("k_bmm_quantizer", "v_bmm_quantizer")
_EXTRA_STATE = re.compile(r"(?P<module>.+)\._extra_state/shard_(?P<place>\d+(?:\.\d+)*)_(?P<of>\d+(?:\.\d+)*)")
_OF_EXPERT = re.compile(WEIGHT + r"\.(?P<expert>\d+)")
_ARCHIVE = b"PK\x03\x04"
# Whole amaxes are read into memory; the largest is one of FP8 blocks, 16,384 times smaller than its weight.
_MOST_AMAXES = 2**24

Settings = Mapping[str, Any]
"""The attributes of a quantizer, as ModelOpt 0.46 and 0.47 name them: `_num_bits`, `_block_sizes`, `_disabled`, ..."""


@dataclass(frozen=True)
class SavedQuantizer:
    """A quantizer of a checkpoint.

    Attributes:
        name: For messages.
        amax: The largest of its amaxes; None if it has none.
    """

    name: str
    settings: Settings
    amax: float | None


def is_quantized(index: Index) -> bool:
    """Whether a checkpoint is of a model with quantizers."""
    return (index.directory / MODELOPT_STATE).is_dir() or any("_quantizer." in key for key in index.tensors)


class SavedQuantizers:
    """The quantizers of a checkpoint.

    Args:
        reader: Of the checkpoint.
        naming: How its model names its modules.

    Raises:
        CheckpointError: Settings cannot be read; names each.
    """

    def __init__(self, reader: TorchDistReader, naming: Naming) -> None:
        self._reader, self._naming = reader, naming
        self._settings = _read_settings(reader.index)
        self._claimed: set[tuple[str, str]] = set()
        self._without_settings: list[Offender] = []
        self._group_amaxes: dict[ParamKey, tuple[Segment, ...]] = {}

    def of_weight(self, spelling: str, key: ParamKey) -> SavedQuantizer | None:
        """The weight quantizer of a linear; None if it has none.

        Args:
            spelling: Of the weight, as `of_checkpoint` gives it.
        """
        name, settings = self._named(spelling, key, WEIGHT)
        if key.expert is not None and settings is None:
            name, settings = self._of_expert(spelling, key)
        return self._saved(name, key, settings, self._amax(spelling, key, WEIGHT))

    @property
    def group_amaxes(self) -> Mapping[ParamKey, tuple[Segment, ...]]:
        """Where the amaxes of weights are that have several, of the weights that were asked for."""
        return self._group_amaxes

    def of_input(self, spelling: str, key: ParamKey) -> SavedQuantizer | None:
        """The input quantizer of a linear; None if it has none."""
        name, settings = self._named(spelling, key, INPUT)
        return self._saved(name, key, settings, self._amax(spelling, key, INPUT))

    def _saved(self, name: str, key: ParamKey, settings: Settings | None, amax: float | None) -> SavedQuantizer | None:
        """A quantizer by its settings; None if the model has none."""
        if settings is not None:
            return SavedQuantizer(name, settings, amax)
        if amax is not None:
            self._without_settings.append(Offender(fill(name, key.layer, key.expert), "has an amax and no settings"))
        return None

    def require_settings(self) -> None:
        """Refuses quantizers, of those that were asked for, that have an amax and no settings.

        Nothing would say how they quantize, and their weights would pass for ones that were never quantized.

        Raises:
            CheckpointError: Names each.
        """
        if self._without_settings:
            raise damaged(self._without_settings)

    def of_cache(self, spelling: str, key: ParamKey) -> tuple[SavedQuantizer, ...]:
        """The quantizers of what an attention layer puts into its KV cache, of keys and of values; none if it has none.

        Args:
            spelling: Of the attention core with a tensor's name behind it, as `of_checkpoint` gives that of a weight.
            key: Of a weight in the same layer.
        """
        named = [(quantizer, *self._named(spelling, key, quantizer)) for quantizer in _OF_CACHE]
        return tuple(
            SavedQuantizer(name, settings, self._amax(spelling, key, quantizer))
            for quantizer, name, settings in named
            if settings is not None
        )

    def of_other_caches(self) -> Iterator[tuple[SavedQuantizer, ...]]:
        """As `of_cache`, of all attention layers that were not asked for: those of a latent have no linear of keys."""
        for module, quantizers in self._settings.items():
            if (module, _OF_CACHE[0]) not in self._claimed:
                claims = [self._claim(module, quantizers, name) for name in _OF_CACHE]
                yield tuple(SavedQuantizer(name, settings, None) for name, settings in claims if settings is not None)

    def all(self) -> Iterator[tuple[str, Settings]]:
        """Every quantizer, by its name."""
        return ((name, settings) for _, name, settings in self._all())

    def unclaimed(self) -> Iterator[tuple[str, Settings]]:
        """Every quantizer that was not asked for, by its name."""
        return ((name, settings) for key, name, settings in self._all() if key not in self._claimed)

    def _all(self) -> Iterator[tuple[tuple[str, str], str, Settings]]:
        for module, quantizers in self._settings.items():
            for name, settings in quantizers.items():
                if isinstance(settings, Mapping) and not self._is_of_child(module, name):
                    yield (module, name), f"{_label(module)}.{name}", settings

    def _is_of_child(self, module: str, name: str) -> bool:
        """Whether a module below has this quantizer too, as its own: ModelOpt 0.48 notes those of delta nets twice."""
        match, (path, _, quantizer) = _EXTRA_STATE.fullmatch(module), name.rpartition(".")
        if match is None or not path:
            return False
        child = f"{match['module']}.{path}._extra_state/shard_{match['place']}_{match['of']}"
        return quantizer in self._settings.get(child, {})

    def _module(self, spelling: str, key: ParamKey) -> tuple[str, Mapping[str, Any]]:
        """Key of the extra state of a weight's module, and the quantizers in it."""
        module = spelling.rpartition(".")[0]
        for segment in self._naming.places(module, key):
            name = _extra_state_key(segment)
            if name in self._settings:
                return name, self._settings[name]
        return module, {}

    def _named(self, spelling: str, key: ParamKey, quantizer: str) -> tuple[str, Settings | None]:
        module, quantizers = self._module(spelling, key)
        return self._claim(module, quantizers, quantizer)

    def _of_expert(self, spelling: str, key: ParamKey) -> tuple[str, Settings | None]:
        module, quantizers = self._module(spelling, key)
        numbers = [int(match["expert"]) for match in map(_OF_EXPERT.fullmatch, quantizers) if match]
        # Ranks hold blocks of as many experts, in order: the place of a global expert among those of its rank.
        for number in numbers:
            self._claimed.add((module, f"{WEIGHT}.{number}"))
        number = (key.expert or 0) % max(len(numbers), 1)
        return self._claim(module, quantizers, f"{WEIGHT}.{number}")

    def _claim(self, module: str, quantizers: Mapping[str, Any], name: str) -> tuple[str, Settings | None]:
        self._claimed.add((module, name))
        settings = quantizers.get(name)
        return f"{_label(module)}.{name}", settings if isinstance(settings, Mapping) else None

    def _amax(self, spelling: str, key: ParamKey, quantizer: str) -> float | None:
        module = spelling.rpartition(".")[0]
        for segment in self._naming.places(f"{module}.{quantizer}._amax", key):
            # Gate and up of blocks are apart.
            for parts in (("",), ("_w", "_v")):
                names = [segment.key + part for part in parts]
                if all(name in self._reader.index.tensors for name in names):
                    found = tuple(self._placed(Segment(name, segment.place, segment.of)) for name in names)
                    # An amax of the whole weight has no axes; that of a single block has.
                    if quantizer == WEIGHT and any(self._reader.shape(each) for each in found):
                        self._group_amaxes[key] = found
                    values = [self._largest(each) for each in found]
                    # max() would lose a NaN, which must not pass for calibrated.
                    largest = float(torch.tensor(values).max())
                    whole = self._whole(f"{module}.{quantizer}", key)
                    return largest if whole is None or largest != largest else whole
        return None

    def _whole(self, quantizer: str, key: ParamKey) -> float | None:
        """The amax of a weight that stands above those of its static blocks; None where it has none."""
        for segment in self._naming.places(f"{quantizer}._global_amax", key):
            if segment.key in self._reader.index.tensors:
                return self._largest(self._placed(segment))
        return None

    def _placed(self, segment: Segment) -> Segment:
        """The segment by as many of its places as the tensor has axes of layers and experts."""
        shape = self._reader.index.tensors[segment.key].shape
        # One of all experts, under a name without their numbers, has no axis of them: ModelOpt 0.46, and inputs.
        axes = next(count for count in range(len(segment.of), -1, -1) if shape[:count] == segment.of[:count])
        return Segment(segment.key, segment.place[:axes], segment.of[:axes])

    def _largest(self, segment: Segment) -> float:
        if self._reader.numel(segment) > _MOST_AMAXES:
            shape = self._reader.index.tensors[segment.key].shape
            raise damaged([Offender(segment.key, f"is no amax: it has the shape {list(shape)}")])
        amaxes = self._reader.read(segment)
        return float(amaxes.float().max()) if amaxes.numel() else float("nan")


def _label(module: str) -> str:
    return module.partition("._extra_state")[0]


def _extra_state_key(segment: Segment) -> str:
    """Key of a module's extra state: objects are named after their places among all of them."""
    place, of = segment.place or (0,), segment.of or (1,)
    return f"{segment.key}._extra_state/shard_{'.'.join(map(str, place))}_{'.'.join(map(str, of))}"


def _read_settings(index: Index) -> dict[str, Mapping[str, Any]]:
    """The quantizers of every module that has any, by the key of its extra state."""
    found: dict[str, Mapping[str, Any]] = {}
    offenders = []
    for key, extent in index.objects.items():
        if _EXTRA_STATE.fullmatch(key):
            try:
                quantizers = _quantizers_in(index, extent)
            except (UnusableSaveError, OSError) as error:
                offenders.append(Offender(key, str(error)))
            else:
                if quantizers:
                    found[key] = quantizers
    if offenders:
        raise damaged(offenders)
    return found


def _quantizers_in(index: Index, extent: Extent) -> Mapping[str, Any]:
    """The settings of quantizers by name, in the extra state of a module: bytes of one `torch.save` in another."""
    with open_regular(index.directory, extent.file) as file:
        outer = read_saved(file, Span(extent.offset, extent.offset + extent.length))
        span = _bytes_of(outer.value, outer.storages)
        # Transformer Engine's own is empty, or a bare pickle of training in FP8; ModelOpt's is another `torch.save`.
        if span is None or not _is_archive(file, span):
            return {}
        inner = read_saved(file, span).value
    quantizers = inner.get("modelopt_quantizer_state") if isinstance(inner, dict) else None
    return quantizers if isinstance(quantizers, dict) else {}


def _is_archive(file: IO[bytes], span: Span) -> bool:
    file.seek(span.start)
    return span.stop - span.start > len(_ARCHIVE) and file.read(len(_ARCHIVE)) == _ARCHIVE


def _bytes_of(value: Any, storages: Mapping[str, Span]) -> Span | None:
    """Where the data of a tensor of bytes is."""
    value = only_one(value)
    is_tensor = isinstance(value, Made) and value.of.startswith("torch._utils._rebuild_tensor")
    return next(iter(storages.values())) if is_tensor and len(storages) == 1 else None
