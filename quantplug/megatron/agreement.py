"""What all ranks agree on before any of them goes on, so that one failing rank ends all of them with one error."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from traceback import clear_frames
from typing import TypeVar

import torch
import torch.distributed as dist

from quantplug.errors import Offender, QuantplugError, RankLostError, TopologyError, UnforeseenError

T = TypeVar("T")

# How long a living rank may take to answer once a peer is lost; they all notice within moments of one another.
_ROLL_CALL = timedelta(seconds=3)


def all_or_none(step: Callable[[], T]) -> T:
    """Runs a step that has no collectives on every rank; if it fails anywhere, it fails everywhere.

    Costs one 4-byte all-reduce where all goes well; objects travel only once something is wrong.

    Raises:
        QuantplugError: Of the lowest failing rank, with the offenders of every rank that failed in the same way.
    """
    result, error = _attempt(step)
    if not _several_ranks():
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # There is a result where there is no error.
    # A rank whose step failed comes here too: the others are on their way into this reduction, and would wait in it for
    # ever.
    failed = torch.tensor([int(error is not None)], dtype=torch.int32, device=agreement_device())
    with lost_ranks_named():
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        # All ranks read the same number, so all of them take part in the gather behind it, or none does.
        if failed.item():
            # The rank that failed keeps the cause: its traceback is the only place that tells where a bug is.
            raise _one_error(error) from (None if error is None else error.__cause__)
    return result  # type: ignore[return-value]


def union(flags: torch.Tensor) -> torch.Tensor:
    """Elementwise maximum over all ranks of a uint8 tensor of flags, on CPU. A collective: all ranks must call it."""
    if not _several_ranks():
        return flags
    # A maximum of zeros and ones, since NCCL has no bitwise OR (torch.distributed.ReduceOp).
    everywhere = flags.to(agreement_device())
    with lost_ranks_named():
        dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)
    return everywhere.cpu()


def gather_objects(mine: T) -> list[T]:
    """One object of every rank, in order of rank: for metadata, not for data. A collective."""
    if not _several_ranks():
        return [mine]
    gathered: list[T | None] = [None] * dist.get_world_size()
    with lost_ranks_named():
        dist.all_gather_object(gathered, mine)
    return gathered  # type: ignore[return-value]  # Every place is filled.


def gather_on_first(mine: T) -> list[T]:
    """One object of every rank, in order, on the first of them; none on the others. A collective."""
    if not _several_ranks():
        return [mine]
    is_first = dist.get_rank() == 0
    gathered: list[T | None] | None = [None] * dist.get_world_size() if is_first else None
    with lost_ranks_named():
        dist.gather_object(mine, gathered)
    return gathered or []  # type: ignore[return-value]  # Every place is filled.


def require_same(mine: str, what: str, remedy: str) -> None:
    """Refuses ranks that come to different results where all must come to the same. A collective, of a short text.

    Raises:
        TopologyError: Names every rank that differs from the first.
    """
    # Every rank sees all results and so comes to the same verdict: raising it needs no second agreement.
    results = gather_objects(mine)
    offenders = [
        Offender(what, "differs from that of rank 0", rank=rank)
        for rank, result in enumerate(results)
        if result != results[0]
    ]
    if offenders:
        raise TopologyError(f"Ranks came to a different {what}.", offenders, remedy)


@contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Around a collective: where it breaks because a rank is gone, all that are left raise one error that names it.

    Raises:
        RankLostError: A peer ended, or could no longer be reached.
    """
    try:
        yield
    except RuntimeError as error:  # What every backend of torch.distributed raises.
        # Asked first, since the roll call takes the process group down, and neither is known after that.
        rank, world_size = dist.get_rank(), dist.get_world_size()
        clear_frames(error.__traceback__)  # They hold the process group, which ends only with its last reference.
        lost = _roll_call(rank, world_size)
        raise RankLostError(
            "A rank ended while the others counted on it.",
            [Offender("process", "does not answer", rank=peer) for peer in lost],
            "Look for that rank's own error above; then run the same command again.",
        ) from error


def _roll_call(rank: int, world_size: int) -> list[int]:
    """Ranks that do not answer in the store; rank 0 if the store is gone, which it hosts unless a launcher does."""
    store = dist.distributed_c10d._get_default_store()  # torch has no public way to the store of init_process_group
    # Closes our connections, so that no living peer goes on waiting for us in a collective.
    dist.destroy_process_group()
    try:
        store.set(f"quantplug/here/{rank}", "")
        lost = _silent(store, [f"quantplug/here/{peer}" for peer in range(world_size)])
        # The first verdict is everybody's: a rank that answers late must not be lost to some and living to others.
        verdict = store.compare_set("quantplug/lost", "", json.dumps(lost)).decode()
        lost = json.loads(verdict)
        store.set(f"quantplug/heard/{rank}", "")
        if rank == 0:  # Which may host the store: the others must have heard all before it ends.
            _silent(store, [f"quantplug/heard/{peer}" for peer in range(world_size) if peer not in lost])
    # The store itself is gone, and with it whoever hosted it.
    except RuntimeError:
        return [0]
    return lost


def _silent(store: "torch._C._distributed_c10d.Store", keys: Sequence[str]) -> list[int]:
    """Places of the keys that nobody has set when the time of the roll call is over, one time for all of them."""
    # One deadline for all keys: with three seconds for each, a thousand ranks that are gone would take most of an hour.
    end = time.monotonic() + _ROLL_CALL.total_seconds()
    silent = []
    for place, key in enumerate(keys):
        # Never zero, which a store takes for no limit at all (c10d's Store::kNoTimeout).
        left = max(timedelta(seconds=end - time.monotonic()), timedelta(milliseconds=1))
        try:
            store.wait([key], left)
        except dist.DistStoreError:
            silent.append(place)
    return silent


def _several_ranks() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _attempt(step: Callable[[], T]) -> tuple[T | None, QuantplugError | None]:
    try:
        return step(), None
    except QuantplugError as error:
        return None, error
    except Exception as error:  # The others must not wait for this rank, whatever it is that ended its step.
        if not _several_ranks():
            raise
        # Of our own kind from here on, so that the other ranks can be told of it like of any other failure.
        unforeseen = UnforeseenError(
            "A rank failed in a way that was not foreseen.",
            [Offender(type(error).__name__, str(error) or "without a word")],
            "Look for the traceback of that rank; if it did not run out of memory or disk, please report it.",
        )
        unforeseen.__cause__ = error
        return None, unforeseen


def _one_error(error: QuantplugError | None) -> QuantplugError:
    """The error of the lowest failing rank, with the offenders of all that failed alike. A collective.

    Args:
        error: What this rank's step raised; None where it went well.
    """
    # What an error is made of, rather than the error: each rank raises one of its own, with the same text.
    mine = None if error is None else (type(error), error.problem, error.offenders, error.remedy, error.shown)
    gathered: list[tuple[type[QuantplugError], str, tuple[Offender, ...], str, int] | None]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    failures = [failure for failure in gathered if failure is not None]
    # Gathered in order of rank, so the first failure is the same one on every rank.
    kind, problem, _, remedy, shown = failures[0]
    # What several ranks find alike (a file that is missing) is said once, on the first of them. An offender that names
    # no rank is of the rank that found it; what every rank finds is of none.
    ranks: dict[Offender, dict[int, None]] = {}
    for rank, failure in enumerate(gathered):
        if failure is not None and failure[:2] == (kind, problem):
            for offender in failure[2]:
                named = rank if offender.rank is None else offender.rank
                ranks.setdefault(replace(offender, rank=None), {})[named] = None
    offenders = [replace(it, rank=None if len(on) == len(gathered) else next(iter(on))) for it, on in ranks.items()]
    return kind(problem, offenders, remedy, shown=shown)


def collective_device() -> torch.device:
    """Where data must be for collectives of the default group: on the GPU where NCCL serves it, else on CPU."""
    return torch.device("cuda" if _serves("cuda:nccl") else "cpu")


def agreement_device() -> torch.device:
    """Where tensors of an agreement must be: on CPU where gloo serves it, also beside NCCL.

    Gloo says at once that a peer has ended; NCCL leaves it to its watchdog, minutes later. Gathers of objects choose
    likewise (torch's `_get_object_coll_device`).
    """
    return torch.device("cpu") if _serves("cpu:gloo") else collective_device()


def _serves(device_and_backend: str) -> bool:
    return device_and_backend in dist.get_backend_config().split(",")
