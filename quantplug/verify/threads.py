"""Looks at tensors on as many threads as PyTorch would use; what the compiled loops and PyTorch do lets others run."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
_AHEAD = 4  # items begun before the first of them is asked for, a thread: so memory stays bounded


def in_threads(look: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Each item with what `look` gives of it, in order. An exception ends all, when its item is reached."""
    threads = torch.get_num_threads()
    # A pool of one thread would only add the cost of handing things over.
    if threads == 1:
        yield from ((item, look(item)) for item in items)
        return
    begun: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="quantplug-verify") as pool:
        try:
            for item in items:
                begun.append((item, pool.submit(look, item)))
                # The oldest is waited for before more is begun: results are kept in order, and only so many chunks are
                # in memory.
                if len(begun) > _AHEAD * threads:
                    first, future = begun.popleft()
                    yield first, future.result()
            yield from ((item, future.result()) for item, future in begun)
        finally:
            pool.shutdown(cancel_futures=True)
