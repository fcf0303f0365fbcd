"""What all ranks agree on before any of them goes on, so that one failing rank ends all of them with one error."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from quantplug.errors import Offender, QuantplugError

T = TypeVar("T")


def all_or_none(step: Callable[[], T]) -> T:
    """Runs a step that has no collectives on every rank; if it fails anywhere, it fails everywhere.

    Costs one 4-byte all-reduce where all goes well; objects travel only once something is wrong.

    Raises:
        QuantplugError: Of the lowest failing rank, with the offenders of every rank that failed in the same way.
    """
    result, error = _attempt(step)
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # There is a result where there is no error.
    failed = torch.tensor([int(error is not None)], dtype=torch.int32, device=_collective_device())
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if failed.item():
        raise _one_error(error)
    return result  # type: ignore[return-value]


def union(flags: torch.Tensor) -> torch.Tensor:
    """Elementwise maximum over all ranks of a uint8 tensor of flags, on CPU. A collective: all ranks must call it."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return flags
    everywhere = flags.to(_collective_device())
    dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)
    return everywhere.cpu()


def _attempt(step: Callable[[], T]) -> tuple[T | None, QuantplugError | None]:
    try:
        return step(), None
    except QuantplugError as error:
        return None, error


def _one_error(error: QuantplugError | None) -> QuantplugError:
    """The same error on every rank. A collective."""
    mine = None if error is None else (type(error), error.problem, error.offenders, error.remedy)
    gathered: list[tuple[type[QuantplugError], str, tuple[Offender, ...], str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    failures = [failure for failure in gathered if failure is not None]
    kind, problem, _, remedy = failures[0]
    # What every rank finds alike (a file that is missing) is said once, whatever rank says it.
    offenders: dict[tuple[str, str, int | None], Offender] = {}
    for other_kind, other_problem, found, _ in failures:
        if (other_kind, other_problem) == (kind, problem):
            for offender in found:
                offenders.setdefault((offender.parameter, offender.reason, offender.expert), offender)
    return kind(problem, tuple(offenders.values()), remedy)


def _collective_device() -> torch.device:
    return torch.device("cuda") if dist.get_backend() == dist.Backend.NCCL else torch.device("cpu")
