"""Run by torchrun on two ranks: one fails, both must end with the same error; then both go on."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from quantplug.errors import MappingError, Offender, SourceError, UnforeseenError
from quantplug.megatron.agreement import all_or_none, union


def message_of(step) -> str:
    try:
        return f"no error: {all_or_none(step)}"
    except SourceError as error:
        return f"{type(error).__name__}: {error}"


def fail_on(ranks: set[int], rank: int) -> int:
    if rank in ranks:
        alike = Offender("index", "is damaged")
        own = Offender(f"file {rank}", "does not exist", expert=rank)
        raise SourceError("Cannot read.", [alike, own], "Fetch it.")
    return rank


def fail_differently(rank: int) -> None:
    raise (SourceError if rank == 0 else MappingError)(f"Problem of rank {rank}.")


def cause_on_failing_rank(rank: int) -> str:
    """What the traceback that a rank prints goes back to, where rank 1 fails in a way that nobody foresaw."""
    try:
        all_or_none(lambda: {0: "fine"}[rank])
    except UnforeseenError as error:
        return repr(error.__cause__)
    return "no error"


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    messages = {
        "none": message_of(lambda: fail_on(set(), rank)),
        "second": message_of(lambda: fail_on({1}, rank)),
        "both": message_of(lambda: fail_on({0, 1}, rank)),
        "differently": message_of(lambda: fail_differently(rank)),
        "cause": cause_on_failing_rank(rank),
        "union": union(torch.tensor([rank, 0, 1], dtype=torch.uint8)).tolist(),
    }
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(messages))
    dist.destroy_process_group()
