"""Amaxes that a checkpoint has where plain ModelOpt puts them: found, loaded whole, and cut to what this rank holds.

For global expert `e` of `fc`, which is `linear_fc1` or `linear_fc2`, all below `decoder.layers.{i}.mlp.experts.`:
    quantplug: `experts.{e}.{fc}.weight_quantizer._amax`, [] per tensor, [N/b, 1, K/b, 1] for blocks; with gate and up
        apart, as `_amax_w` and `_amax_v`, where each is of whole blocks.
    ModelOpt 0.47: the same key, [1] per tensor, [N/b, 1, K/b, 1] for blocks, gate above up.
    ModelOpt 0.46: `experts.{fc}.weight_quantizer._amax`, one [1] for all experts; it has no blocks.

Read off checkpoints that ModelOpt 0.46.1 and 0.47.0 wrote with Megatron-Core 0.16.1. Dense layers are alike in all.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)

from quantplug.checkpoint.torch_dist.index import StoredTensor
from quantplug.errors import CheckpointError, Offender
from quantplug.megatron.checkpoint.keys import Stored, built_entries

WHOLE = "amaxes of another layout"
"""Beside the model chunks of a sharded state: key on disk to the whole tensor there."""

_OF_EXPERT = re.compile(r"(?P<above>.*\.experts)\.(?P<expert>\d+)(?P<linear>\.linear_fc[12]\.weight_quantizer\._amax)")


@dataclass(frozen=True)
class FanOut:
    """One amax that a checkpoint has for all experts of a layer, and who got it on this rank.

    Attributes:
        key: Its key in the checkpoint.
        amax: Its value.
        experts: Global ids of this rank's experts, each with a quantizer that now has it.
        quantizers: For each of them, the number of the model chunk and the name of the quantizer in it.
    """

    key: str
    amax: float
    experts: tuple[int, ...]
    quantizers: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class DisplacedAmax:
    """An amax of the model that the checkpoint has under another key, or in another shape.

    Attributes:
        chunk: Number of the model chunk, as text.
        name: Its name in the chunk's state dict.
        key: The key on disk.
        parts: What the model has of it, to be put together along axis 0: the one tensor, or gate's and up's.
        expert: Global expert, where the one amax on disk is of all experts.
    """

    chunk: str
    name: str
    key: str
    parts: tuple[ShardedTensor, ...]
    expert: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape that the model would give it."""
        shape = tuple(self.parts[0].global_shape)
        return shape if len(self.parts) == 1 else (shape[0] * len(self.parts), *shape[1:])

    @property
    def main_replica(self) -> bool:
        """Whether it is this rank that loads the tensor on disk; Megatron wants one such rank."""
        part = self.parts[0]
        # Of the ranks that share the tensor: the first copy, with the first slice, and where it is of all experts,
        # expert 0.
        return is_main_replica(part.replica_id) and not any(part.global_offset) and not self.expert

    def local(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's share of the tensor on disk, in the model's shape."""
        whole = whole.reshape(self.shape)
        if len(self.parts) == 1:
            # A slice alone would keep the whole tensor in memory for as long as the model lives.
            return whole[_place(self.parts[0])].clone()
        # Gate above up, each cut by itself: this rank's share of both is not one slice of the whole.
        shares = whole.chunk(len(self.parts))
        return torch.cat([share[_place(part)] for share, part in zip(shares, self.parts, strict=True)])


def find_displaced(state: ShardedStateDict, stored: Stored) -> list[DisplacedAmax]:
    """The amaxes of this rank that the checkpoint has in ModelOpt's layouts."""
    # Layers of which the checkpoint has an amax for every expert: a shared one beside those is not theirs.
    per_expert = {_shared_key(key.removesuffix("_w").removesuffix("_v")) for key in stored}
    found = []
    for chunk, entries in state.items():
        for name, entry in entries.items():
            if isinstance(entry, ShardedObject) or not entry.key.endswith("_quantizer._amax"):
                continue
            parts = tuple(built_entries(entry))
            # Those that are where our own save puts them are loaded like any other tensor.
            if not all(part.key in stored and stored[part.key].shape == tuple(part.global_shape) for part in parts):
                for key, expert in _candidates(entry, per_expert):
                    amax = DisplacedAmax(chunk, name, key, parts, expert)
                    # The first place that fits is taken: an expert's own amax comes before that of all experts.
                    if _fits(amax, stored.get(key)):
                        found.append(amax)
                        break
    return found


def redirected(state: ShardedStateDict, displaced: Sequence[DisplacedAmax], stored: Stored) -> ShardedStateDict:
    """The state to load: with what is on disk, whole, in place of amaxes that are displaced."""
    gone = {(amax.chunk, amax.name) for amax in displaced}
    kept = {
        chunk: {name: entry for name, entry in entries.items() if (chunk, name) not in gone}
        for chunk, entries in state.items()
    }
    whole: dict[str, ShardedTensor] = {}
    # Several experts may share one key. The main replica comes first, so that it is the one that speaks for the key.
    for amax in sorted(displaced, key=lambda amax: not amax.main_replica):
        if amax.key not in whole:
            data = torch.empty(stored[amax.key].shape, dtype=amax.parts[0].dtype)
            # No offsets: every rank loads the whole tensor, which is small, and cuts its share from it.
            replica = 0 if amax.main_replica else 1
            whole[amax.key] = ShardedTensor.from_rank_offsets(amax.key, data, replica_id=replica)
    return {**kept, WHOLE: whole}


def put_in_place(loaded: ShardedStateDict, displaced: Sequence[DisplacedAmax]) -> None:
    """Gives the loaded chunks their share of every amax that was displaced."""
    for amax in displaced:
        loaded[amax.chunk][amax.name] = amax.local(loaded[WHOLE][amax.key])


def fan_outs(loaded: ShardedStateDict, displaced: Sequence[DisplacedAmax]) -> tuple[FanOut, ...]:
    """The amaxes that were given to several experts, each with the experts and quantizers that got it here.

    Args:
        loaded: What Megatron loaded, with the whole tensors under `WHOLE`.
        displaced: What `find_displaced` found, in the order of the model, which the result has too.
    """
    given: dict[str, list[tuple[int, tuple[int, str]]]] = {}
    for amax in displaced:
        if amax.expert is not None:
            quantizer = (int(amax.chunk), amax.name.removesuffix("._amax"))
            given.setdefault(amax.key, []).append((amax.expert, quantizer))
    return tuple(FanOut(key, float(loaded[WHOLE][key]), *zip(*experts, strict=True)) for key, experts in given.items())


def require_own_amax(loaded: ShardedStateDict, displaced: Sequence[DisplacedAmax], rank: int) -> None:
    """Refuses one amax for all experts of a layer that cannot be of them all: an expert's weight exceeds it.

    With several expert parallel ranks ModelOpt 0.46 saves the amax of the first one's experts, and no other.

    Raises:
        CheckpointError: Names every expert whose weight exceeds its amax.
    """
    offenders = []
    for amax in displaced:
        if amax.expert is not None:
            value = loaded[amax.chunk][amax.name].float()
            largest = loaded[amax.chunk][_weight_name(amax.name)].float().abs().max()
            # Asked this way round, a NaN on either side is refused as well.
            if not largest <= value:
                reason = f"max|weight| is {largest:.4e}, and the one amax of all experts {value:.4e}"
                offenders.append(Offender(amax.key, reason, amax.expert, rank))
    if offenders:
        raise CheckpointError(
            "This checkpoint has one amax for all experts of a layer, and it is not of all of them.",
            offenders,
            "Quantize the weights anew: ModelOpt 0.46 and before keep one expert parallel rank's amax only, "
            "and know nothing of what weights became in training after calibration.",
        )


def _candidates(
    entry: ShardedTensor | ShardedTensorFactory, per_expert: set[str | None]
) -> Iterator[tuple[str, int | None]]:
    """Keys under which the amax may be on disk; with the global expert where it is that of all experts."""
    yield entry.key, None
    match, shared = _OF_EXPERT.fullmatch(entry.key), _shared_key(entry.key)
    if match is not None and shared is not None and shared not in per_expert:
        yield shared, int(match["expert"])


def _shared_key(key: str) -> str | None:
    match = _OF_EXPERT.fullmatch(key)
    return None if match is None else match["above"] + match["linear"]


def _fits(amax: DisplacedAmax, stored: StoredTensor | None) -> bool:
    """Whether what is on disk differs from the model's in axes of one element alone.

    A gate and up that are not apart are in their order only where no tensor parallelism has sharded them.
    """
    # Some writers keep axes of one element and some do not: one amax a tensor is [1] here and [] there.
    if stored is None or _squeezed(stored.shape) != _squeezed(amax.shape):
        return False
    return len(amax.parts) == 1 or len(stored.chunks) == 1


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _place(part: ShardedTensor) -> tuple[slice, ...]:
    """Where this rank's share is in the global tensor."""
    return tuple(slice(start, start + size) for start, size in zip(part.global_offset, part.local_shape, strict=True))


def _weight_name(amax_name: str) -> str:
    """`....linear_fc1.weight3` for `....linear_fc1.weight_quantizer.3._amax`."""
    return re.sub(r"weight_quantizer\.(\d+)\._amax$", r"weight\1", amax_name)
