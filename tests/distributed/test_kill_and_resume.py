"""kill -9 of one or both of two ranks at any moment, and the same export again: the same bytes, nothing done twice."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

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

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# What an export calls at moments that matter.
MANIFEST = "quantplug.export.files.staging.write_atomically"
EXCHANGE = "quantplug.export.pipeline.gather.PackedBucket.exchange"
ON_DISK = "quantplug.checkpoint.safetensors.writer.finish_file"
FILE_DONE = "quantplug.checkpoint.safetensors.writer.sync_directory"
INDEX = "quantplug.export.files.finish.write_index"
INDEX_FILE = "quantplug.export.files.index.write_json"
RENAME = "quantplug.export.files.staging.publish_directory"
# When all ranks have agreed that everything is written.
ALL_AGREED = "quantplug.export.to_disk._finish_by_first_rank"
OWN = "quantplug.export.files.write_rounds._RankWork._pack_and_write"  # What a rank holds whole.
WRITE = "os.pwrite"  # Of a header, then of each tensor.
DISK = (WRITE, "os.fsync", "os.replace", "pathlib.Path.replace")


@pytest.fixture(scope="module")
def ranks(one_layer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    # About ten files for each of two ranks.
    return start_ranks(one_layer_dir, tmp_path_factory.mktemp("notes"), max_shard_size=15_000)


@pytest.fixture(scope="module")
def smooth(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks write that nobody kills."""
    out = tmp_path_factory.mktemp("smooth") / "out"
    assert ranks.export(out) == [EXPORTED] * 2
    return out


def everything(directory: Path) -> dict[str, tuple[int, int]]:
    found = directory.rglob("*")
    return {str(path.relative_to(directory)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def assert_resumes(ranks: Ranks, out: Path, smooth: Path) -> None:
    """The same export again ends with the same bytes, and with the very files that were finished."""
    kept = finished(out)
    assert ranks.export(out) == [EXPORTED] * 2
    assert_same_files(out, smooth)
    assert identities(out / name for name in kept) == kept
    assert [path.name for path in out.parent.iterdir()] == [out.name]


# Who is killed and when, and how many files are finished by then, at least; None for all of them.
KILLS: dict[str, tuple[dict[int, Moment], int | None]] = {
    "before the manifest": ({1: before(MANIFEST)}, 0),
    "after the manifest": ({1: after(MANIFEST)}, 0),
    "both around the manifest": ({0: after(MANIFEST), 1: before(MANIFEST)}, 0),
    "before the first exchange": ({0: before(EXCHANGE)}, 0),
    "after the first exchange": ({1: after(EXCHANGE)}, 0),
    "before what is not exchanged": ({1: before(OWN)}, 1),
    "in a header": ({0: before(WRITE)}, 0),
    "in a tensor": ({1: before(WRITE, 11)}, 0),
    "both in a tensor": ({0: after(WRITE, 7), 1: after(WRITE, 9)}, 0),
    "before a file is on disk": ({0: before(ON_DISK, 1)}, 1),
    "after the first file": ({1: after(FILE_DONE)}, 1),
    "after the third file": ({0: after(FILE_DONE, 2)}, 3),
    "both after some files": ({0: after(FILE_DONE, 2), 1: after(FILE_DONE, 3)}, 7),
    "before the index": ({0: before(INDEX)}, None),
    "in the index": ({0: before(INDEX_FILE)}, None),
    "before the rename": ({0: before(RENAME)}, None),
}


@pytest.mark.parametrize("moment", KILLS)
def test_after_a_kill_the_same_export_goes_on(moment: str, ranks: Ranks, smooth: Path, tmp_path: Path) -> None:
    killed, files = KILLS[moment]
    out = tmp_path / "out"
    outcomes = ranks.export(out, killed=killed)
    for rank, outcome in enumerate(outcomes):
        assert outcome == KILLED if rank in killed else outcome.startswith("RankLostError"), outcome
        assert rank in killed or all(f"process on rank {lost}: does not answer" in outcome for lost in killed)
    assert not out.exists()
    assert len(finished(out)) >= (files if files is not None else len(list(smooth.glob("*.safetensors"))))
    assert_resumes(ranks, out, smooth)


@pytest.mark.parametrize(
    "killed",
    [{0: after(RENAME)}, {1: before(ALL_AGREED)}],
    ids=["0", "1"],
)
def test_a_kill_after_the_last_rename_changes_nothing(
    killed: dict[int, Moment], ranks: Ranks, smooth: Path, tmp_path: Path
) -> None:
    """What is there is complete; the same export again does not touch it, and says so on all ranks."""
    out = tmp_path / "out"
    assert KILLED in ranks.export(out, killed=killed)
    assert_same_files(out, smooth)
    as_it_was = everything(out)
    (said,) = set(ranks.export(out))
    assert said.startswith("DestinationError")
    assert "is not empty" in said
    assert everything(out) == as_it_was


def test_random_kills_end_with_the_same_bytes(ranks: Ranks, smooth: Path, tmp_path: Path) -> None:
    """One rank or both, at any write, fsync or rename, again and again until an export gets through."""
    dice = random.Random(0)
    kills = 0
    out = tmp_path / "out"
    while kills < 5:
        while not out.exists():
            victims = dice.choice([(0,), (1,), (0, 1)])
            outcomes = ranks.export(out, killed={rank: Moment(DISK, dice.randrange(160)) for rank in victims})
            kills += outcomes.count(KILLED)
            assert all(said in (KILLED, EXPORTED) or said.startswith("RankLostError") for said in outcomes), outcomes
        assert_same_files(out, smooth)
        shutil.rmtree(out)


def test_gloo_beside_the_backend_of_a_gpu_tells_of_a_kill(ranks: Ranks, smooth: Path, tmp_path: Path) -> None:
    """As with `cpu:gloo,cuda:nccl`; without a GPU there is only torch's fake to stand beside gloo."""
    out = tmp_path / "out"
    outcomes = ranks.export(out, backend="cpu:gloo,cuda:fake", killed={0: after(WRITE, 7)})
    assert outcomes[0] == KILLED
    assert "process on rank 0: does not answer" in outcomes[1]
    assert ranks.export(out, backend="cpu:gloo,cuda:fake") == [EXPORTED] * 2
    assert_same_files(out, smooth)


def _half_done(ranks: Ranks, out: Path) -> None:
    """An export that was killed with some of its files finished."""
    outcomes = ranks.export(out, killed=dict.fromkeys(range(2), after(FILE_DONE, 2)))
    assert outcomes == [KILLED] * 2
    assert len(finished(out)) == 6


LAYOUTS = {"one rank": (1, 1, 1), "no tensor parallelism": (2, 1, 2), "data parallel": (2, 1, 1), "no EP": (2, 2, 1)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_topology_does_not_take_up_what_is_left(
    layout: str, ranks: Ranks, smooth: Path, tmp_path: Path
) -> None:
    world_size, tp, ep = LAYOUTS[layout]
    out = tmp_path / "out"
    _half_done(ranks, out)
    as_it_was = finished(out)
    (said,) = set(ranks.export(out, world_size=world_size, tp=tp, ep=ep))
    assert said.startswith("DestinationError")
    assert "was left by an export of another model, config or topology" in said
    assert not out.exists()
    assert finished(out) == as_it_was
    assert_resumes(ranks, out, smooth)


def _halve_an_element(rank: int, model: nn.Module) -> None:
    if rank == 1:
        with torch.no_grad():  # Not the largest one: every amax stays, and with them the plan.
            model.decoder.layers[0].self_attention.linear_proj.weight[5, 7] *= 0.5


def test_nor_does_a_model_that_changed_on_one_rank_alone(ranks: Ranks, smooth: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _half_done(ranks, out)
    (said,) = set(ranks.export(out, change=_halve_an_element))
    assert said.startswith("DestinationError")
    assert ".out.partial on rank 1: was left by an export of another model" in said
    assert_resumes(ranks, out, smooth)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_nothing_is_finished_another_topology_starts_afresh(layout: str, ranks: Ranks, tmp_path: Path) -> None:
    """Neither half-written files of the other one nor its manifests get in the way, or into the result."""
    world_size, tp, ep = LAYOUTS[layout]
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    assert ranks.export(out, killed=dict.fromkeys(range(2), before(WRITE, 1))) == [KILLED] * 2
    assert list(out.with_name(".out.partial").glob("checkpoint/*.part"))
    for directory in (out, undisturbed):
        outcomes = ranks.export(directory, world_size=world_size, tp=tp, ep=ep)
        assert outcomes == [EXPORTED] * world_size
    assert_same_files(out, undisturbed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]
