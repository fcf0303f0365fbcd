"""Runs a compiled loop over the pieces of a weight on as many threads as PyTorch would use.

The loops let go of the interpreter's lock, so plain threads are enough. numba's own parallel loops are not used: their
runtime ends the process when two threads, or a forked process, use it at once.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def run(loop: Callable[..., Result], *pieces: Iterable[Any]) -> list[Result]:
    """Calls the loop with each piece, or each row of pieces, on `torch.get_num_threads()` threads; results in order."""
    return run_each(loop, zip(*pieces, strict=True))


def run_each(loop: Callable[..., Result], rows: Iterable[tuple[Any, ...]]) -> list[Result]:
    """Calls the loop with each row of arguments, on the threads that `run` uses; results in order.

    Raises:
        Exception: Whatever a call has raised, once no thread works on the pieces any more.
    """
    calls = list(rows)
    results: dict[int, Result] = {}
    waiting = iter(enumerate(calls))  # Each thread takes the next: the interpreter lets one at a time.

    def work() -> None:
        for number, arguments in waiting:
            results[number] = loop(*arguments)

    # The calling thread works too, so one helper fewer than PyTorch would use, and none for a single piece.
    helpers = min(torch.get_num_threads(), len(calls)) - 1
    helping = [_pool(torch.get_num_threads()).submit(work) for _ in range(helpers)]
    try:
        work()
    finally:
        # Also when this thread's call has raised: helpers still write to memory that the caller is about to free.
        wait(helping)
    for helper in helping:
        helper.result()
    return [results[number] for number in range(len(calls))]


# Kept, because starting threads takes longer than a small weight. One pool for each number that `set_num_threads` sets.
@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="quantplug")


# A forked process has the pools without their threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
