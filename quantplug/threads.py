"""Results of several threads, in the order of the items, with no more items begun ahead than memory has room for."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def results_in_order(
    pool: Executor, step: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Generator[Result, None, None]:
    """What a step gives of each item, in their order.

    Args:
        ahead: Of the items to come so many are begun, and one more. Their results are kept until they are asked for.

    Raises:
        Exception: What the first failing step has raised, when its item is reached and no step is under way any more.
    """
    under_way: deque[Future[Result]] = deque()
    try:
        for item in items:
            under_way.append(pool.submit(step, item))
            # The oldest is waited for before more is begun, or results behind a slow one would pile up.
            if len(under_way) > ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        # Also when the caller asks for no more: what is begun may still read what he is about to close.
        for future in under_way:
            future.cancel()
        wait(under_way)
