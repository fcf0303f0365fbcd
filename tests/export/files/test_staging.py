"""The hidden directory in which an export grows: whose it is, while ranks of another one may still write."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from quantplug.errors import DestinationError, WriteError
from quantplug.export.files.index import refuse_strays
from quantplug.export.files.staging import Staging, check_destination

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


STRAYS: dict[str, Callable[[Path], object]] = {
    "model-00002-of-00002.safetensors": lambda path: path.write_bytes(b""),
    "modeling_own.py": lambda path: path.write_text(""),
    ".hidden": lambda path: path.write_text(""),
    "below/notes.txt": lambda path: (path.parent.mkdir(), path.write_text("")),
    "config.json": lambda path: path.symlink_to("/etc/passwd"),
    "tokenizer.json": os.mkfifo,
    "folder": lambda path: path.symlink_to("/etc"),
}


@pytest.mark.parametrize("name", STRAYS)
def test_what_this_export_has_not_written_is_not_published(name: str, tmp_path: Path) -> None:
    ours = {"model.safetensors", "config.json", "tokenizer.json", "additional_chat_templates/tool.jinja"}
    (tmp_path / "model.safetensors").touch()
    (tmp_path / ".model.safetensors.1234.part").touch()
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool.jinja").touch()
    refuse_strays(tmp_path, ours)
    STRAYS[name](tmp_path / name)
    with pytest.raises(DestinationError, match="is not in the plan") as caught:
        refuse_strays(tmp_path, ours)
    assert [offender.parameter for offender in caught.value.offenders] == [str(tmp_path / name)]


def test_of_a_checkpoint_in_the_way_it_is_said_that_it_may_be_the_wanted_one(tmp_path: Path) -> None:
    """As after an export that was killed when all was done, and is started again."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(DestinationError, match="holds a checkpoint, and one that an export wrote is complete"):
        check_destination(out)


def test_what_a_killed_export_has_not_written_yet_takes_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unfinished file has its full size from the first moment on, and holes; a finished one is there."""
    (staging,) = start(tmp_path / "out", 1)
    size = 2**20
    (staging.directory / "one.safetensors").write_bytes(b"x" * size)
    with (staging.directory / "two.safetensors.part").open("wb") as file:
        file.truncate(size)
    usage = shutil.disk_usage(tmp_path)
    sizes = {"one.safetensors": size, "two.safetensors": size, "tokenizer.json": 7}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size + 6))
    with pytest.raises(WriteError, match=f"{size + 7:,} needed"):
        staging.require_space(sizes)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size + 7))
    staging.require_space(sizes)
    staging.close()
