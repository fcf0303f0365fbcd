import multiprocessing
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from quantplug.formats.kernels.threads import run


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


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_can_run_too() -> None:
    run(lambda n: n, range(10))
    child = multiprocessing.get_context("fork").Process(target=_run_in_child)
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0


def _run_in_child() -> None:
    assert run(lambda n: n, range(10)) == list(range(10))
