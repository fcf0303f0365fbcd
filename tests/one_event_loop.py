"""All gloo groups of a process use one event loop.

torch gives every group a gloo device of its own, whose thread polls: `gloo::transport::tcp::Loop::run` waits for events
for at most 10 ms, so it wakes up 100 times a second, also where nobody communicates. Megatron makes some forty groups
for each set of parallel sizes and torch never forgets one, so that ranks that go through many layouts would soon do
little but wake up. A device is made to be shared: the connections of each group are its own as before.
"""

from datetime import timedelta
from functools import cache, wraps

from torch._C._distributed_c10d import Store
from torch.distributed import ProcessGroupGloo

_make = ProcessGroupGloo.__init__


@cache
def _device() -> ProcessGroupGloo.Device:
    return ProcessGroupGloo.create_default_device()


@wraps(_make)
def _on_the_one_device(
    group: ProcessGroupGloo, store: Store, rank: int, size: int, timeout: timedelta, enable_reconfigure: bool = False
) -> None:
    assert not enable_reconfigure  # torch 2.14 says so with every group; 2.11 has no such word.
    options = ProcessGroupGloo._Options()
    options._devices = [_device()]
    options._timeout = timeout
    _make(group, store, rank, size, options)


def share_event_loop() -> None:
    """Of the groups that this process makes from here on, and those that are forked from it: each process its own."""
    ProcessGroupGloo.__init__ = _on_the_one_device
