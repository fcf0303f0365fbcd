"""What all ranks hold, put together: whole weights, and which ranks can deliver each of them.

Every rank lists what it holds; after one exchange of plain metadata all ranks have the same picture, and so make the
same plan, or raise the same error, without asking one another again.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from quantplug.errors import CalibrationError, MappingError, Offender, ShapeError
from quantplug.export.plan.quantizers.kv_cache import KVQuantizers
from quantplug.export.plan.types import QuantizerState, WeightRef, WholeWeight, not_here
from quantplug.export.sources.vocabulary import VocabularySigns
from quantplug.findings import Findings, Kind
from quantplug.mappings.keys import ParamKey
from quantplug.megatron.agreement import gather_objects
from quantplug.plugins.rules.unmatched import JudgedRule
from quantplug.topology import ShardAxis

_INCOMPLETE = Kind(
    MappingError,
    "Slices of weights are missing: no group of ranks holds them all.",
    "Pass every model chunk of every rank; all ranks of a tensor parallel group must hold the same layers and experts.",
)
_TWICE = Kind(
    MappingError,
    "Weights stand twice in what a rank passed.",
    "Pass one model: a GPTModel or HybridModel, or the list of its own virtual pipeline stages.",
)
_DISAGREE = Kind(
    CalibrationError,
    "Ranks disagree on how a weight is quantized.",
    "Quantize the model with one config on all ranks, and let mtq.quantize finish on all of them.",
)
_SLICES = Kind(
    ShapeError, "Slices of one weight do not fit together.", "Build the model with one configuration on all ranks."
)


@dataclass(frozen=True)
class RankInventory:
    """What one rank holds, as plain data that can travel.

    Attributes:
        groups: Global ranks of this rank's group on each parallel axis that cuts tensors, in slice order.
        refs: Its weights, without a way to load them.
        unclaimed: Names of enabled quantizers that belong to none of them.
        attentions: What the quantizers of its attention layers say of a KV cache.
        rules: The rules of its quantizer config, judged by its quantizers.
        vocabulary: What it knows of the vocabulary beside the rows.
        misplaced: The rules that were applied to other layers than they name.
    """

    rank: int
    groups: dict[ShardAxis, tuple[int, ...]]
    refs: tuple[WeightRef, ...]
    unclaimed: tuple[str, ...] = ()
    attentions: tuple[KVQuantizers, ...] = ()
    rules: tuple[JudgedRule, ...] = ()
    vocabulary: VocabularySigns = field(default_factory=VocabularySigns)
    misplaced: tuple[Offender, ...] = ()


def gather_inventories(mine: RankInventory) -> tuple[RankInventory, ...]:
    """The inventories of all ranks, in order of rank. A collective, of metadata alone."""
    # The way to load a weight is bound to the tensor: pickled, it would take all of the weight's data along.
    portable = replace(mine, refs=tuple(replace(ref, load=not_here, group_amaxes=None) for ref in mine.refs))
    gathered = gather_objects(portable)
    return tuple(sorted(gathered, key=lambda inventory: inventory.rank))


def whole_weights(inventories: Sequence[RankInventory], findings: Findings) -> list[WholeWeight]:
    """Every weight of the model once; what does not fit together goes into `findings`."""
    held: defaultdict[ParamKey, dict[int, WeightRef]] = defaultdict(dict)
    groups = {inventory.rank: inventory.groups for inventory in inventories}
    for inventory in inventories:
        for ref in inventory.refs:
            if inventory.rank in held[ref.key]:
                findings.add(_TWICE, ref.key.name, "is there twice", ref.key.expert, inventory.rank)
            held[ref.key][inventory.rank] = ref
    wholes = (_whole(key, refs, groups, findings) for key, refs in held.items())
    return [whole for whole in wholes if whole is not None]


def _whole(
    key: ParamKey,
    refs: dict[int, WeightRef],
    groups: dict[int, dict[ShardAxis, tuple[int, ...]]],
    findings: Findings,
) -> WholeWeight | None:
    rank, first = next(iter(refs.items()))
    # Slices of one weight differ in their index alone.
    layouts = {
        (ref.shape, ref.dtype, ref.shard and replace(ref.shard, index=0), ref.zero_centred) for ref in refs.values()
    }
    if len(layouts) > 1:
        findings.add(_SLICES, key.name, f"ranks hold {sorted(map(str, layouts))}", key.expert, rank)
        return None
    shape = list(first.shape)
    replicas: list[tuple[int, ...]] = [(rank,) for rank in refs]
    if first.shard is not None:
        shape[first.shard.dim] *= first.shard.count
        # Every group once, in order of rank: data parallel copies are groups of their own, each with all slices.
        candidates = dict.fromkeys(groups[holder][first.shard.axis] for holder in refs)
        replicas = [ranks for ranks in candidates if _is_complete(ranks, refs)]
        if not replicas:
            found = sorted({ref.shard.index for ref in refs.values() if ref.shard})
            reason = f"slices {found} of {first.shard.count} are there"
            findings.add(_INCOMPLETE, key.name, reason, key.expert, rank)
            return None
    weight = _agreed(key, [ref.weight for ref in refs.values()], rank, findings)
    activation = _agreed(key, [ref.activation for ref in refs.values()], rank, findings)
    axis = first.shard.axis if first.shard else None
    return WholeWeight(
        key,
        tuple(shape),
        first.dtype,
        axis,
        tuple(replicas),
        weight,
        activation,
        zero_centred=first.zero_centred,
        unquantized=next((ref.unquantized for ref in refs.values() if ref.unquantized is not None), None),
    )


def _is_complete(ranks: Iterable[int], refs: dict[int, WeightRef]) -> bool:
    """Whether each rank of a group holds the slice of its place in it."""
    shards = (refs[rank].shard if rank in refs else None for rank in ranks)
    return all(shard is not None and shard.index == index for index, shard in enumerate(shards))


def _agreed(
    key: ParamKey, states: Sequence[QuantizerState | None], rank: int, findings: Findings
) -> QuantizerState | None:
    """One quantizer for all slices and copies of a weight: same settings, the largest amax."""
    present = [state for state in states if state is not None]
    if not present:
        return None
    # Amaxes differ between slices, as each rank has seen its own values; what a module is called on a rank says
    # nothing.
    settings = {replace(state, amax=None) for state in present}
    if len(present) < len(states) or len({replace(state, name="") for state in settings}) > 1:
        findings.add(_DISAGREE, present[0].name, "differs between the ranks that hold it", key.expert, rank)
    amaxes = [state.amax for state in present]
    # One uncalibrated or NaN slice spoils the whole: neither may hide behind a larger amax.
    unusable = [amax for amax in amaxes if amax is None or amax != amax]
    amax = unusable[0] if unusable else max(amax for amax in amaxes if amax is not None)
    return replace(present[0], amax=amax)
