"""The hidden directory in which an export grows: whose it is, while ranks of another one may still write."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantplug.errors import DestinationError
from quantplug.export.files.index import write_index
from quantplug.export.files.staging import Staging, check_destination
from quantplug.export.plan.types import ShardFile
from quantplug.formats import TensorSpec

PLAN = ("plan", "weights")


def staged(out: Path, rank: int, world_size: int, plan: tuple[str, str] = PLAN) -> Staging:
    return Staging(out, *plan, rank, world_size)


def start(out: Path, world_size: int, plan: tuple[str, str] = PLAN) -> list[Staging]:
    """What the ranks of an export do together."""
    ranks = [staged(out, rank, world_size, plan) for rank in range(world_size)]
    for step in (Staging.make, Staging.lock, Staging.open):
        for rank in ranks:
            step(rank)
    return ranks


def test_a_rank_that_outlives_its_export_keeps_one_of_fewer_ranks_out(tmp_path: Path) -> None:
    """It could finish a file among those of the new one."""
    out = tmp_path / "out"
    killed, living = start(out, 2)
    killed.close()
    alone = staged(out, 0, 1, ("another plan", "weights"))
    alone.make()
    with pytest.raises(DestinationError, match="still runs"):
        alone.lock()
    alone.discard_unless_resumable()
    alone.close()
    assert living.directory.is_dir()

    living.close()
    (alone,) = start(out, 1, ("another plan", "weights"))
    alone.close()


def test_ranks_that_found_nobody_leave_what_another_rank_found_in_use(tmp_path: Path) -> None:
    """A rank still writes: if the others removed the directory, it could go on in that of the next export."""
    out = tmp_path / "out"
    killed, living = start(out, 2)
    killed.close()
    first, second = (staged(out, rank, 2) for rank in range(2))
    first.make()
    second.make()
    first.lock()
    with pytest.raises(DestinationError, match="still runs"):
        second.lock()
    first.discard_unless_resumable()
    assert living.directory.is_dir()
    for rank in (first, second, living):
        rank.close()


def test_after_a_failure_no_directory_is_left_whichever_rank_is_faster(tmp_path: Path) -> None:
    first, second = (staged(tmp_path / "new" / "below" / "out", rank, 2) for rank in range(2))
    for step in (Staging.make, Staging.lock, Staging.open):
        step(first)
        step(second)
    for rank in (first, second):
        rank.discard_unless_resumable()
        rank.close()
    assert not list(tmp_path.iterdir())


def test_no_rank_but_the_first_makes_directories(tmp_path: Path) -> None:
    staged(tmp_path / "new" / "out", 1, 2).make()
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_in_the_plan_is_not_published(tmp_path: Path) -> None:
    spec = TensorSpec("weight", (2, 3), torch.float32)
    for name in ("model-00001-of-00001", "model-00001-of-00002"):
        save_file({"weight": torch.zeros(2, 3)}, tmp_path / f"{name}.safetensors")
    files = [ShardFile("model-00001-of-00001.safetensors", (0,), ("weight",))]
    with pytest.raises(DestinationError, match=r"model-00001-of-00002\.safetensors on rank 0: is not in the plan"):
        write_index(tmp_path, files, {"weight": spec})
    assert not (tmp_path / "model.safetensors.index.json").exists()
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    write_index(tmp_path, files, {"weight": spec})


def test_of_a_checkpoint_in_the_way_it_is_said_that_it_may_be_the_wanted_one(tmp_path: Path) -> None:
    """As after an export that was killed when all was done, and is started again."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(DestinationError, match="holds a checkpoint, and one that an export wrote is complete"):
        check_destination(out)
