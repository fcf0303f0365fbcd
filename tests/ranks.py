"""Scripts run by several ranks, as torchrun runs them, but forked from a process that has imported everything.

Importing PyTorch, Transformer Engine, Megatron-Core, ModelOpt and transformers takes a rank longer than most of what
the tests then ask of it. The process has used nothing of them: gloo's threads do not survive a fork.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.one_event_loop import share_event_loop

_IMPORTED = [
    "megatron.core.dist_checkpointing",
    "modelopt.torch.opt.plugins.mcore_dist_checkpointing",
    "quantplug.calibration.collect",
    "quantplug.export.stream.api",
    "quantplug.formats.kernels.cpu.kernels",
    "quantplug.plugins",
    "tests.distributed.export_worker",
    "tests.distributed.mortal_ranks",
    "tests.export.checkpoints",
    "tests.families.served",
    "tests.ranks",  # With pytest. What a rank is to run is found in here, and imported anew by each that lacks it.
    "transformers.models.qwen3_moe",
    "typer",
    "tests.freeze",  # The last one.
]
_GRACE_SECONDS = 10
"""What ranks have left after one has failed: for their own words."""


@dataclass(frozen=True)
class Ended:
    """How ranks ended.

    Attributes:
        statuses: Exit status of each rank; -n for signal n.
        output: What all of them wrote to stdout and stderr.
    """

    statuses: tuple[int | None, ...]
    output: str

    @property
    def ok(self) -> bool:
        return not any(self.statuses)


@cache
def rank_context() -> ForkServerContext:
    """Where ranks are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    with pytest.MonkeyPatch.context() as patch:  # For the server, which Python 3.11 starts without our sys.path.
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        patch.setenv("PYTHONWARNINGS", "ignore")
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def run_ranks(count: int, script: Path, *arguments: object, alone: bool = False, timeout: int = 300) -> Ended:
    """Runs a script as so many ranks.

    Args:
        alone: Whether nothing but a rank itself ends it, also when another one has failed.
        timeout: Seconds until a rank that hangs is ended.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # Here, so that ranks may die.
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        environments = [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",  # As torchrun tells that the store is there already.
            }
            for rank in range(count)
        ]
        command = [str(script), *map(str, arguments)]
        ranks = [
            rank_context().Process(target=_be_rank, args=(command, each, output.name, timeout)) for each in environments
        ]
        for rank in ranks:
            rank.start()
        _await(ranks, alone)
        return Ended(tuple(rank.exitcode for rank in ranks), output.read())


def _await(ranks: Sequence[ForkServerProcess], alone: bool) -> None:
    running = {rank.sentinel: rank for rank in ranks}
    has_failed = False
    while running:
        ended = connection.wait(running, _GRACE_SECONDS if has_failed else None)
        for sentinel in ended:
            rank = running.pop(sentinel)  # type: ignore[arg-type]
            rank.join()
            has_failed = has_failed or (rank.exitcode != 0 and not alone)
        if not ended:
            for rank in running.values():
                rank.kill()


def _be_rank(command: list[str], environment: dict[str, str], output: str, timeout: int) -> None:
    signal.alarm(timeout)
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    share_event_loop()
    script, *_ = sys.argv = command
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
