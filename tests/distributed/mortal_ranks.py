"""Ranks of an export, of which some are killed at a chosen moment."""

import itertools
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed import fake_pg  # noqa: F401  # registers the backend `fake`

from quantplug import QuantplugError, export_mcore_gpt_to_hf
from quantplug.megatron import agreement
from quantplug.megatron.parallel import initialize_parallel
from tests.distributed.export_worker import quantized_model
from tests.one_event_loop import share_event_loop
from tests.ranks import rank_context

MAX_SHARD_SIZE = 60_000  # About ten files for each of two ranks, of two layers.
KILLED = "killed"
EXPORTED = "exported"


@dataclass(frozen=True)
class Moment:
    """When one of some functions is called, after so many calls of any of them: before its work, or after it."""

    functions: tuple[str, ...]
    calls: int = 0
    after: bool = False

    def await_death(self) -> None:
        """Lets this process end at that moment, by SIGKILL."""
        calls = itertools.count()
        for function in self.functions:
            owner, _, name = function.rpartition(".")
            setattr(resolve_name(owner), name, self._mortal(resolve_name(function), calls))

    def _mortal(self, real: Callable[..., Any], calls: "itertools.count[int]") -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            is_last = next(calls) == self.calls
            if is_last and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **more)
            if is_last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call


def before(function: str, calls: int = 0) -> Moment:
    return Moment((function,), calls)


def after(function: str, calls: int = 0) -> Moment:
    return Moment((function,), calls, after=True)


@dataclass(frozen=True)
class Run:
    """One export by some ranks.

    Attributes:
        killed: Ranks to kill, and when.
        change: Called as (rank, model) before the export.
    """

    out: Path
    world_size: int = 2
    tp: int = 2
    ep: int = 2
    backend: str = "gloo"
    killed: Mapping[int, Moment] | None = None
    change: Callable[[int, nn.Module], None] | None = None


@dataclass(frozen=True)
class Ranks:
    """Exports of one source by ranks that meet in a store of the parent, as those of torchrun do.

    Attributes:
        notes: Directory for what the ranks have to say.
        numbers: Of the runs, each of which has its own part of the store.
        max_shard_size: Of the exports.
    """

    source: Path
    notes: Path
    store: dist.TCPStore
    context: ForkServerContext
    numbers: "itertools.count[int]"
    max_shard_size: int

    def export(self, out: Path, **settings: Any) -> list[str]:
        """How each rank of a `Run` ended: KILLED, EXPORTED, or its error."""
        run, number = Run(out, **settings), next(self.numbers)
        notes = [self.notes / f"{number}-{rank}.txt" for rank in range(run.world_size)]
        processes = [
            self.context.Process(
                target=_be_rank, args=(rank, run, self.source, self.max_shard_size, self.store.port, number, note)
            )
            for rank, note in enumerate(notes)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return [_outcome(process.exitcode, note) for process, note in zip(processes, notes, strict=True)]


def start_ranks(source: Path, notes: Path, max_shard_size: int = MAX_SHARD_SIZE) -> Ranks:
    """What exports of a source are run with."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    return Ranks(source, notes, store, rank_context(), itertools.count(), max_shard_size)


def finished(out: Path) -> dict[str, tuple[int, int]]:
    """Of every finished file of an export that was killed what changes if it is written again: inode and time."""
    return identities(out.with_name(f".{out.name}.partial").glob("checkpoint/*.safetensors"))


def identities(files: Iterable[Path]) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def assert_same_files(directory: Path, expected: Path) -> None:
    assert sorted(path.name for path in directory.iterdir()) == sorted(path.name for path in expected.iterdir())
    for path in expected.iterdir():
        assert (directory / path.name).read_bytes() == path.read_bytes(), path.name


def _outcome(status: int | None, note: Path) -> str:
    assert status in (0, -signal.SIGKILL), f"{note.stem} failed or hung: {status}"
    return note.read_text() if status == 0 else KILLED


def _be_rank(rank: int, run: Run, source: Path, max_shard_size: int, port: int, number: int, note: Path) -> None:
    signal.alarm(60)  # A rank that hangs dies of a signal that no test expects.
    torch.set_num_threads(1)
    share_event_loop()
    agreement._ROLL_CALL = timedelta(seconds=0.5)  # Of two ranks none has to wait long for the other.
    store = dist.PrefixStore(f"run{number}", dist.TCPStore("localhost", port, is_master=False))
    dist.init_process_group(run.backend, store=store, rank=rank, world_size=run.world_size)
    initialize_parallel(tp=run.tp, ep=run.ep)
    model = quantized_model(source, "w4a16_nvfp4")
    if run.change is not None:
        run.change(rank, model)
    if run.killed and rank in run.killed:
        run.killed[rank].await_death()
    try:
        export_mcore_gpt_to_hf(model, source, export_dir=run.out, max_shard_size=max_shard_size)
    except QuantplugError as error:
        note.write_text(f"{type(error).__name__}: {error}")
    else:
        note.write_text(EXPORTED)
