"""Steps behind the caller's back: their order, how far ahead the caller gets, and what becomes of errors."""

import threading
import weakref
from collections.abc import Callable
from functools import partial

import pytest

from quantplug.export.pipeline.writer_thread import AHEAD, THREAD_NAME, WriterThread

PATIENCE = 60
"""Seconds after which a test that waits for another thread fails; none waits for long when all is well."""


class Held:
    """What a step holds."""


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


def failing(error: BaseException) -> Callable[[], None]:
    def step() -> None:
        raise error

    return step


def test_steps_are_done_in_their_order_on_one_other_thread() -> None:
    done: list[tuple[int, int]] = []
    with WriterThread() as behind:
        for number in range(20):
            behind.do(lambda number=number: done.append((number, threading.get_ident())))
    assert [number for number, _ in done] == list(range(20))
    (thread,) = {thread for _, thread in done}
    assert thread != threading.get_ident()
    assert threads() == []


def test_the_caller_gets_ahead_so_far_and_no_further() -> None:
    """The first step ends only when the caller has made the last item that it may make meanwhile."""
    made: list[int] = []
    lead: list[int] = []
    far = threading.Event()

    def step(number: int) -> None:
        assert far.wait(PATIENCE)
        lead.append(len(made) - number)

    with WriterThread() as behind:
        for number in range(50):
            made.append(number)
            if number == AHEAD:
                far.set()
            behind.do(partial(step, number))
    assert max(lead) == AHEAD + 1


def test_what_a_step_held_goes_with_the_step() -> None:
    alive: weakref.WeakSet[Held] = weakref.WeakSet()
    most = 0
    with WriterThread() as behind:
        for _ in range(50):
            held = Held()
            alive.add(held)
            most = max(most, len(alive))
            behind.do(partial(id, held))
            del held
    assert most <= AHEAD + 1
    assert not alive


@pytest.mark.parametrize("later", [0, 1, AHEAD, 20])
def test_the_first_error_of_a_step_is_the_caller_s(later: int) -> None:
    """Whether it hears of it as it hands over another step, or as it leaves."""
    first = OSError("first")

    def run() -> None:
        with WriterThread() as behind:
            behind.do(failing(first))
            for _ in range(later):
                behind.do(failing(OSError("later")))

    with pytest.raises(OSError, match="first") as caught:
        run()
    assert caught.value is first
    assert threads() == []


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt()])
def test_an_error_of_the_caller_drops_what_waits_and_waits_for_what_is_under_way(error: BaseException) -> None:
    begun, dropped = threading.Event(), threading.Event()
    done: list[str] = []

    def slow() -> None:
        begun.set()
        assert dropped.wait(PATIENCE)
        done.append("under way")

    def run() -> None:
        with WriterThread() as behind:
            behind.do(slow)
            assert begun.wait(PATIENCE)
            behind.do(partial(done.append, "waiting"))
            behind._steps[-1].add_done_callback(lambda step: dropped.set())
            raise error

    with pytest.raises(type(error)) as caught:
        run()
    assert caught.value is error
    assert done == ["under way"]
    assert threads() == []


@pytest.mark.parametrize("undone", range(AHEAD + 1))
def test_waiting_leaves_so_many_undone_and_no_more(undone: int) -> None:
    done: list[int] = []
    far = threading.Event()

    def step(number: int) -> None:
        if number >= AHEAD - undone:
            assert far.wait(PATIENCE)
        done.append(number)

    with WriterThread() as behind:
        for number in range(AHEAD):
            behind.do(partial(step, number))
        behind.wait(undone)
        assert done == list(range(AHEAD - undone))
        far.set()
    assert done == list(range(AHEAD))
