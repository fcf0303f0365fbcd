import multiprocessing
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from quantplug.formats.kernels.cpu.threads import in_order, run


@pytest.fixture(params=[1, 3], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_are_in_the_order_of_the_pieces() -> None:
    assert run(lambda one, other: one - other, range(100), range(0, 200, 2)) == [-n for n in range(100)]


def test_as_many_threads_work_as_pytorch_has(threads: int) -> None:
    # Nobody goes on before all have come; with fewer threads than that this would wait, and raise.
    together = threading.Barrier(threads, timeout=30)
    assert len(run(lambda _: together.wait(), range(threads))) == threads


def test_no_more_threads_work_than_pytorch_has(threads: int) -> None:
    names = run(lambda _: (time.thread_time(), threading.current_thread().name)[1], range(50))
    assert len(set(names)) <= threads


def test_an_error_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda divisor: 1 // divisor, [1, 1, 0, 1])


def test_pieces_of_different_number_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        run(lambda one, other: None, [1, 2], [1])


def test_several_callers_at_once() -> None:
    found: list[list[int]] = []
    callers = [threading.Thread(target=lambda: found.append(run(lambda n: n, range(50)))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert found == [list(range(50))] * 4


def test_steps_give_their_results_in_the_order_of_the_items() -> None:
    assert list(in_order(lambda n: -n, range(100))) == [-n for n in range(100)]


def test_as_many_steps_are_under_way_as_there_are_threads(threads: int) -> None:
    together = threading.Barrier(threads, timeout=30)
    assert len(list(in_order(lambda _: together.wait(), range(threads)))) == threads


def test_a_step_runs_its_loops_alone_and_needs_no_gradients() -> None:
    def step(_: int) -> set[int]:
        return {threading.get_ident(), *run(lambda _: threading.get_ident(), range(20))}

    with torch.no_grad():
        assert {len(found) for found in in_order(step, range(20))} == {1}
        assert not any(in_order(lambda _: torch.is_grad_enabled(), range(20)))
    # And afterwards the same threads help each other again.
    together = threading.Barrier(torch.get_num_threads(), timeout=30)
    run(lambda _: together.wait(), range(torch.get_num_threads()))


def test_steps_are_begun_only_a_few_items_ahead(threads: int) -> None:
    begun: list[int] = []
    for number, _ in enumerate(in_order(begun.append, range(50))):
        assert len(begun) <= number + threads + 1


def test_a_failing_step_ends_it_when_no_step_is_under_way() -> None:
    begun, ended = [], []

    def step(number: int) -> None:
        begun.append(number)
        if number == 3:
            raise ZeroDivisionError
        ended.append(number)

    with pytest.raises(ZeroDivisionError):
        list(in_order(step, range(50)))
    assert set(begun) - set(ended) == {3}
    assert len(begun) < 50


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_can_run_too() -> None:
    run(lambda n: n, range(10))
    child = multiprocessing.get_context("fork").Process(target=_run_in_child)
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0


def _run_in_child() -> None:
    assert run(lambda n: n, range(10)) == list(range(10))
