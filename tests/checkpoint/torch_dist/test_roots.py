"""Which directory is read of what trainers write, and what is said of those that are not of the format."""

import json
import os
from pathlib import Path

import pytest

from quantplug.checkpoint.torch_dist.roots import BACKEND_FILE, TRACKER_FILE, find_iteration
from quantplug.errors import CheckpointError


def saved(directory: Path, backend: str = "torch_dist") -> Path:
    directory.mkdir(parents=True)
    (directory / BACKEND_FILE).write_text(json.dumps({"sharded_backend": backend}))
    return directory


def noted(root: Path, newest: str) -> None:
    (root / TRACKER_FILE).write_text(newest)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for iteration in (50, 100, 12345678):
        saved(tmp_path / f"iter_{iteration:07d}")
    noted(tmp_path, "100\n")
    return tmp_path


def test_the_iteration_that_the_trainer_noted_is_the_newest(root: Path) -> None:
    # One beyond it is what a killed save left.
    assert find_iteration(root) == root / "iter_0000100"


@pytest.mark.parametrize(("iteration", "name"), [(50, "iter_0000050"), (12345678, "iter_12345678")])
def test_an_iteration_is_chosen_by_its_number(iteration: int, name: str, root: Path) -> None:
    assert find_iteration(root, iteration) == root / name


def test_a_release_is_one_of_them(root: Path) -> None:
    noted(root, "release")
    saved(root / "release")

    assert find_iteration(str(root)) == root / "release"


@pytest.mark.parametrize("iteration", [None, 100])
def test_one_iteration_may_be_given_itself(iteration: int | None, root: Path) -> None:
    assert find_iteration(root / "iter_0000100", iteration) == root / "iter_0000100"


def test_what_megatron_core_saved_by_itself_is_taken_as_it_is(tmp_path: Path) -> None:
    assert find_iteration(saved(tmp_path / "mine")) == tmp_path / "mine"


def test_a_lone_iteration_needs_no_note(tmp_path: Path) -> None:
    saved(tmp_path / "iter_0000007")

    assert find_iteration(tmp_path) == tmp_path / "iter_0000007"


def test_of_several_without_a_note_none_is_chosen(root: Path) -> None:
    (root / TRACKER_FILE).unlink()

    with pytest.raises(CheckpointError, match=r"several checkpoints: iter_0000050, iter_0000100, iter_12345678"):
        find_iteration(root)


def test_an_iteration_that_is_not_there_lists_those_that_are(root: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no iter_0000051; there are: iter_0000050, iter_0000100") as raised:
        find_iteration(root, 51)
    assert "--iteration N" in raised.value.remedy


def test_a_noted_iteration_that_is_gone_is_said(root: Path) -> None:
    noted(root, "150")

    with pytest.raises(CheckpointError, match=rf"has no iter_0000150, which {TRACKER_FILE} names; there are: "):
        find_iteration(root)


def test_another_iteration_of_one_that_was_given_is_refused(root: Path) -> None:
    with pytest.raises(CheckpointError, match="is one checkpoint, and not that of iteration 50"):
        find_iteration(root / "iter_0000100", 50)


@pytest.mark.parametrize("note", ["", "newest", "-1", "../1", "1" * 65])
def test_a_note_of_no_iteration_is_damage(note: str, root: Path) -> None:
    noted(root, note)

    with pytest.raises(CheckpointError, match=TRACKER_FILE):
        find_iteration(root)


def test_a_pipe_for_a_note_is_not_waited_for(root: Path) -> None:
    (root / TRACKER_FILE).unlink()
    os.mkfifo(root / TRACKER_FILE)

    with pytest.raises(CheckpointError, match="is a named pipe, not a file"):
        find_iteration(root)


def test_an_empty_directory_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no iteration"):
        find_iteration(tmp_path)


def test_nothing_at_all_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        find_iteration(tmp_path / "gone")


def test_an_iteration_without_its_files_is_damaged(root: Path) -> None:
    (root / "iter_0000100" / BACKEND_FILE).unlink()

    with pytest.raises(CheckpointError, match=rf"iter_0000100/{BACKEND_FILE}: is missing"):
        find_iteration(root)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"sharded_backend": 3}', "[" * 10_000])
def test_a_backend_that_is_not_stated_is_damage(content: str, root: Path) -> None:
    (root / "iter_0000100" / BACKEND_FILE).write_text(content)

    with pytest.raises(CheckpointError, match="damaged"):
        find_iteration(root)


def test_zarr_is_named_with_the_way_out(tmp_path: Path) -> None:
    saved(tmp_path / "old", "zarr")

    with pytest.raises(CheckpointError, match="format zarr") as raised:
        find_iteration(tmp_path / "old")
    assert "--ckpt-convert-format torch_dist" in raised.value.remedy


@pytest.mark.parametrize("whole_root", [True, False])
def test_torch_is_named_with_the_way_out(whole_root: bool, root: Path) -> None:
    iteration = root / "iter_0000100"
    (iteration / BACKEND_FILE).unlink()
    (iteration / "mp_rank_00").mkdir()

    with pytest.raises(CheckpointError, match="format torch,") as raised:
        find_iteration(root if whole_root else iteration)
    assert "--ckpt-convert-format torch_dist" in raised.value.remedy


@pytest.mark.parametrize(
    ("config", "name"), [("  ckpt_format: fsdp_dtensor\n", "fsdp_dtensor,"), ("", "torch_dcp or fsdp_dtensor,")]
)
def test_shards_of_fsdp_are_named_with_the_way_out(config: str, name: str, root: Path) -> None:
    iteration = root / "iter_0000100"
    (iteration / BACKEND_FILE).unlink()
    (iteration / ".metadata").touch()
    (iteration / "run_config.yaml").write_text(f"checkpoint:\n{config}")

    with pytest.raises(CheckpointError, match=f"format {name}") as raised:
        find_iteration(root)
    assert "--ckpt-format torch_dist" in raised.value.remedy
