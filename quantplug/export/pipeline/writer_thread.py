"""Work behind the caller's back: steps are done one after another on a thread, while the caller makes the next."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

AHEAD = 2
"""So many steps wait or are under way: with the one that is being made, memory holds what three of them need."""

THREAD_NAME = "quantplug-writer"


class WriterThread:
    """A thread that does steps in the order they come; leaving the context waits for it.

    The error of a step is the caller's, at the next call or on leaving. Steps that still wait then are dropped, and so
    they are when the caller leaves with an error of its own.
    """

    def __init__(self) -> None:
        # One worker: steps are done in the order in which they come, and no two of them write at once.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=THREAD_NAME)
        self._steps: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def do(self, step: Callable[[], None]) -> None:
        """Hands over a step; waits while too many are not done."""
        self._steps.append(self._thread.submit(step))
        self.wait(AHEAD)

    def wait(self, undone: int = 0) -> None:
        """Waits until no more steps than that are not done."""
        while len(self._steps) > undone:
            # Raises here what the step has raised there.
            self._steps.popleft().result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            # Waits for the step that is under way, which still writes to files that the caller is about to close.
            self._thread.shutdown(cancel_futures=True)
