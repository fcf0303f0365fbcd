"""Looks at tensors on as many threads as PyTorch would use; what the compiled loops and PyTorch do lets others run."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from quantplug.threads import results_in_order

Item = TypeVar("Item")
Result = TypeVar("Result")
_AHEAD = 4  # items begun before the first of them is asked for, a thread: so memory stays bounded


def in_threads(look: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Each item with what `look` gives of it, in order. An exception ends all, when its item is reached."""

    def looked_at(item: Item) -> tuple[Item, Result]:
        return item, look(item)

    threads = torch.get_num_threads()
    # A pool of one thread would only add the cost of handing things over.
    if threads == 1:
        yield from map(looked_at, items)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="quantplug-verify") as pool:
        yield from results_in_order(pool, looked_at, items, _AHEAD * threads)
