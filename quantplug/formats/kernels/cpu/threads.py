"""Runs a compiled loop over the pieces of a weight on as many threads as PyTorch would use.

The loops let go of the interpreter's lock, so plain threads are enough. numba's own parallel loops are not used: their
runtime ends the process when two threads, or a forked process, use it at once.
"""

import os
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial
from typing import Any, TypeVar

import torch

from quantplug.threads import results_in_order

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_AT_ONCE = 8
"""Steps of `in_order`: each may hold a piece of a weight, and memory must not grow with the cores of a machine."""


class _OfThread(threading.local):
    """What is true of the thread that asks.

    Attributes:
        has_neighbours: Whether others do the same work beside it, so that it is to do its own alone.
    """

    has_neighbours = False


_here = _OfThread()


def run(loop: Callable[..., Result], *pieces: Iterable[Any]) -> list[Result]:
    """Calls the loop with each piece, or each row of pieces, on `torch.get_num_threads()` threads; results in order."""
    return run_each(loop, zip(*pieces, strict=True))


def run_each(loop: Callable[..., Result], rows: Iterable[tuple[Any, ...]]) -> list[Result]:
    """Calls the loop with each row of arguments, on the threads that `run` uses; results in order.

    Raises:
        Exception: Whatever a call has raised, once no thread works on the pieces any more.
    """
    calls = list(rows)
    if _here.has_neighbours:
        return [loop(*arguments) for arguments in calls]
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


def in_order(step: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
    """What a step gives of each item, in their order; on several threads, each of which then runs its loops alone.

    For steps that do more than loops, such as to read what these work on. Of the items to come as many are begun as
    there are threads, and one more.

    Raises:
        Exception: What the first failing step has raised, once no step is under way any more.
    """
    threads = min(torch.get_num_threads(), _MOST_AT_ONCE)
    if threads == 1 or _here.has_neighbours:
        yield from map(step, items)
        return
    yield from results_in_order(_pool(threads), partial(_beside_others, step), items, threads)


def _beside_others(step: Callable[[Item], Result], item: Item) -> Result:
    _here.has_neighbours = True
    try:
        with torch.no_grad():  # Which callers have said of their own thread alone.
            return step(item)
    finally:
        _here.has_neighbours = False


# Kept, because starting threads takes longer than a small weight. One pool for each number that `set_num_threads` sets.
@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="quantplug")


# A forked process has the pools without their threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
