"""Forked ranks of an export, of which some are killed at a chosen moment: no launcher, and no imports to wait for."""

import itertools
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from quantplug import QuantplugError, export_mcore_gpt_to_hf
from quantplug.megatron import agreement
from quantplug.megatron.parallel import initialize_parallel
from tests.distributed.export_worker import quantized_model

MAX_SHARD_SIZE = 60_000  # About ten files for each of two ranks.
KILLED = "killed"
EXPORTED = "exported"


@dataclass(frozen=True)
class Moment:
    """When one of some functions is called, after so many calls of any of them: before its work, or after it."""

    functions: tuple[tuple[Any, str], ...]
    calls: int = 0
    after: bool = False

    def await_death(self) -> None:
        """Lets this process end at that moment, by SIGKILL."""
        calls = itertools.count()
        for owner, name in self.functions:
            setattr(owner, name, self._mortal(getattr(owner, name), calls))

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


def before(owner: Any, name: str, calls: int = 0) -> Moment:
    return Moment(((owner, name),), calls)


def after(owner: Any, name: str, calls: int = 0) -> Moment:
    return Moment(((owner, name),), calls, after=True)


@dataclass(frozen=True)
class Ranks:
    """Exports of one source by forked ranks, which meet in a store of the parent, as those of torchrun do.

    Attributes:
        notes: Directory for what the ranks have to say.
    """

    source: Path
    notes: Path
    store: dist.TCPStore
    runs: "itertools.count[int]"

    def export(
        self,
        out: Path,
        *,
        world_size: int = 2,
        tp: int = 2,
        ep: int = 2,
        killed: Mapping[int, Moment] | None = None,
        change: Callable[[int, nn.Module], None] | None = None,
    ) -> list[str]:
        """How each rank ended: KILLED, EXPORTED, or its error.

        Args:
            killed: Ranks to kill, and when.
            change: Called as (rank, model) before the export.
        """
        run = next(self.runs)
        children = []
        for rank in range(world_size):
            child = os.fork()
            if child == 0:
                try:
                    self._join(run, rank, world_size, tp=tp, ep=ep)
                    said = self._export(rank, out, (killed or {}).get(rank), change)
                    (self.notes / f"{run}-{rank}.txt").write_text(said)
                finally:
                    os._exit(0)  # A rank that failed in another way has left no note.
            children.append(child)
        return [self._outcome(os.waitpid(child, 0)[1], run, rank) for rank, child in enumerate(children)]

    def _join(self, run: int, rank: int, world_size: int, **sizes: int) -> None:
        signal.alarm(60)  # A rank that hangs dies of a signal that no test expects.
        torch.set_num_threads(1)
        agreement._ROLL_CALL = timedelta(seconds=0.5)  # Of two ranks none has to wait long for the other.
        client = dist.TCPStore("localhost", self.store.port, is_master=False)
        dist.init_process_group("gloo", store=dist.PrefixStore(f"run{run}", client), rank=rank, world_size=world_size)
        initialize_parallel(**sizes)

    def _export(
        self, rank: int, out: Path, killed: Moment | None, change: Callable[[int, nn.Module], None] | None
    ) -> str:
        model = quantized_model(self.source, "nvfp4")
        if change is not None:
            change(rank, model)
        if killed is not None:
            killed.await_death()
        try:
            export_mcore_gpt_to_hf(model, self.source, export_dir=out, max_shard_size=MAX_SHARD_SIZE)
        except QuantplugError as error:
            return f"{type(error).__name__}: {error}"
        return EXPORTED

    def _outcome(self, status: int, run: int, rank: int) -> str:
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return KILLED
        assert os.WIFEXITED(status), f"rank {rank} hung"
        return (self.notes / f"{run}-{rank}.txt").read_text()
