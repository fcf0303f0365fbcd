"""Files that two ranks write together, their experts in one tensor: kill -9 at any moment, and a disk that is full."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import nn

from quantplug.checkpoint.safetensors.writer import SafetensorsFile
from tests.distributed.export_worker import SMALL_BUCKET_BYTES
from tests.distributed.mortal_ranks import (
    EXPORTED,
    KILLED,
    Moment,
    Ranks,
    after,
    assert_same_files,
    before,
    finished,
    identities,
    start_ranks,
)
from tests.distributed.test_export_topologies import assert_same_tensors

pytestmark = pytest.mark.distributed

MAKE = "quantplug.export.files.sink.make_file"
MAKE_ALL = "quantplug.export.files.sink.FileSink.make_shared"
NAME = "quantplug.export.files.sink.name_file"
EXPERT = "quantplug.export.pipeline.assemble._of_expert"  # Before one expert's rows of a tensor are written.
# What a rank writes of a file is all written.
PART_DONE = "quantplug.checkpoint.safetensors.writer.SafetensorsFile._finish"


@pytest.fixture(scope="module")
def ranks(tiny_llama4_with_vision_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return start_ranks(tiny_llama4_with_vision_dir, tmp_path_factory.mktemp("notes"))


def _small_buckets(rank: int, model: nn.Module) -> None:
    """So that files become full one after another, in many rounds."""
    from quantplug.export.files import write_rounds as work
    from quantplug.export.pipeline.buckets import make_rounds

    work.make_rounds = lambda tasks, dims, _: make_rounds(tasks, dims, SMALL_BUCKET_BYTES)


def is_shared(path: Path) -> bool:
    with safe_open(path, "pt") as opened:
        return any(".experts." in name for name in opened.keys())  # noqa: SIM118  # No dict, whatever ruff takes it for.


@pytest.fixture(scope="module")
def smooth(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks write that nobody kills: the tensors of one rank."""
    out = tmp_path_factory.mktemp("smooth")
    assert ranks.export(out / "one", world_size=1, tp=1, ep=1) == [EXPORTED]
    assert ranks.export(out / "two", change=_small_buckets) == [EXPORTED] * 2
    assert_same_tensors(out / "two", out / "one")
    assert sum(map(is_shared, (out / "two").glob("*.safetensors"))) >= 3
    return out / "two"


# Exports one after another, each killed somewhat later than the one before it; and how many shared files are finished
# then, at least.
KILLS: dict[str, list[tuple[dict[int, Moment], int]]] = {
    "the rank that makes them": [
        ({0: after(MAKE, 1)}, 0),
        ({0: before(EXPERT, 9)}, 0),
        ({0: before(NAME)}, 0),
        ({0: after(NAME)}, 1),
    ],
    "the other one": [
        ({1: before(EXPERT, 3)}, 0),
        ({1: before(PART_DONE)}, 0),
        ({1: before(EXPERT, 30)}, 1),
    ],
    "both": [
        ({0: before(MAKE_ALL), 1: after(MAKE_ALL)}, 0),
        ({0: before(NAME), 1: after(PART_DONE, 4)}, 0),
        ({0: after(NAME), 1: before(EXPERT, 25)}, 0),
    ],
}


@pytest.mark.parametrize("who", KILLS)
def test_after_each_kill_the_export_goes_on(who: str, ranks: Ranks, smooth: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kept: dict[str, tuple[int, int]] = {}
    for number, (killed, files) in enumerate(KILLS[who]):
        outcomes = ranks.export(out, killed=killed, change=_small_buckets)
        # Of two ranks the later one may notice the death of the other before it comes to its own.
        dead = {rank for rank, outcome in enumerate(outcomes) if outcome == KILLED}
        assert dead, (number, outcomes)
        assert dead <= set(killed), (number, outcomes)
        assert all(outcome == KILLED or outcome.startswith("RankLostError") for outcome in outcomes), (number, outcomes)
        assert not out.exists()
        # What has its final name is complete, whoever was killed, and is not written again.
        there = sorted((tmp_path / ".out.partial" / "checkpoint").glob("*.safetensors"))
        assert [path.name for path in there if path.read_bytes() != (smooth / path.name).read_bytes()] == []
        assert sum(map(is_shared, there)) >= files, number
        assert kept.items() <= identities(there).items()
        kept = identities(there)
    assert ranks.export(out, change=_small_buckets) == [EXPORTED] * 2
    assert_same_files(out, smooth)
    assert identities(out / name for name in kept) == kept
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _full_disk(rank: int, model: nn.Module) -> None:
    """The second rank's disk is full when it has written three experts into files that the first one makes."""
    if rank == 0:
        return
    left, real = iter(range(3)), SafetensorsFile.write

    def write(file: SafetensorsFile, name: str, *arguments: Any) -> None:
        if ".experts." in name and next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, name, *arguments)

    SafetensorsFile.write = write  # type: ignore[method-assign]


def test_a_full_disk_on_the_second_rank_ends_both_alike(ranks: Ranks, smooth: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (said,) = set(ranks.export(out, change=_full_disk))
    assert said.startswith("WriteError: The checkpoint could not be written.")
    assert "on rank 1: No space left on device" in said
    assert not out.exists()
    left = finished(out)
    assert not [name for name in left if is_shared(tmp_path / ".out.partial" / "checkpoint" / name)]
    assert ranks.export(out) == [EXPORTED] * 2
    assert_same_files(out, smooth)
    assert identities(out / name for name in left) == left
