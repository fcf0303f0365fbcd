"""The export directory is complete or absent, whatever is in its way and wherever writing fails."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantplug import export_mcore_gpt_to_hf
from quantplug.errors import DestinationError
from quantplug.export import hf_config, writer
from quantplug.export.writer import check_destination
from tests.export.checkpoints import load, quantize, read
from tests.export.refusals import refused

Sources = Callable[[str], Path]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("text")
    return path


@pytest.mark.parametrize("inside", ["", "below", "further/below"])
def test_a_file_is_no_directory(inside: str, file: Path, tmp_path: Path) -> None:
    with refused(DestinationError, tmp_path) as caught:
        check_destination(file / inside, rank=2)
    (offender,) = caught.value.offenders
    assert (offender.parameter, offender.rank) == (str(file), 2)


@pytest.mark.parametrize("name", ["config.json", ".hidden", "directory"])
def test_a_directory_that_holds_anything(name: str, tmp_path: Path) -> None:
    (tmp_path / "out" / name).mkdir(parents=True)
    with refused(DestinationError, tmp_path) as caught:
        check_destination(tmp_path / "out")
    assert [offender.parameter for offender in caught.value.offenders] == [str(tmp_path / "out")]


def test_a_link_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with refused(DestinationError, tmp_path):
        check_destination(tmp_path / "out")


def test_a_mount_point_cannot_be_replaced_by_a_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    with refused(DestinationError, tmp_path) as caught:
        check_destination(tmp_path / "out")
    assert "mount point" in str(caught.value)


def test_the_current_directory_cannot_be_replaced_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    for spelled in (Path(), tmp_path / "out"):
        with refused(DestinationError, tmp_path) as caught:
            check_destination(spelled)
        assert "current directory" in str(caught.value)


@pytest.mark.usefixtures("rank")
def test_nothing_is_overwritten(sources: Sources, tmp_path: Path) -> None:
    model = load(sources("dense"))
    source = shutil.copytree(sources("dense"), tmp_path / "hf")
    with refused(DestinationError, tmp_path):
        export_mcore_gpt_to_hf(model, source, export_dir=source)


@pytest.mark.usefixtures("rank")
@pytest.mark.parametrize("as_type", [str, Path])
@pytest.mark.parametrize("kind", ["new", "empty", "below two new ones", "link", "relative"])
def test_directories_that_can_be_used(
    kind: str, as_type: type, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    given: Path = {"below two new ones": out / "a" / "b", "relative": Path("out")}.get(kind, out)
    if kind == "empty":
        out.mkdir()
    elif kind == "link":
        (tmp_path / "real").mkdir()
        out.symlink_to(tmp_path / "real")
    elif kind == "relative":
        monkeypatch.chdir(tmp_path)
    result = export_mcore_gpt_to_hf(load(sources("dense")), sources("dense"), export_dir=as_type(given))
    there = out / "a" / "b" if kind == "below two new ones" else out
    assert result.directory.samefile(there)
    assert read(there).keys() == read(sources("dense")).keys()
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".partial")]


def _disk_full(*arguments: Any, **more: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _after(calls: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """Works so many times, then the disk is full."""
    left = iter(range(calls))

    def faulty(*arguments: Any, **more: Any) -> Any:
        return _disk_full() if next(left, None) is None else real(*arguments, **more)

    return faulty


FAULTS: list[tuple[Any, str, int]] = [
    (writer, "save_file", 0),
    (writer, "save_file", 2),
    (writer, "finish_file", 1),
    (writer, "write_json", 0),
    (shutil, "copyfile", 1),
    (hf_config, "write_json", 0),
    (hf_config, "write_json", 1),
]


@pytest.mark.usefixtures("rank")
@pytest.mark.parametrize(("owner", "name", "calls"), FAULTS, ids=[f"{name} {calls}" for _, name, calls in FAULTS])
@pytest.mark.parametrize("existing", [None, "out", "parent"])
def test_a_disk_that_is_full_leaves_nothing(
    owner: Any, name: str, calls: int, existing: str | None, sources: Sources, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "parent" / "out"
    if existing is not None:
        (out if existing == "out" else out.parent).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    model = quantize(load(sources("dense")), "w4a16_nvfp4")
    monkeypatch.setattr(owner, name, _after(calls, getattr(owner, name)))
    with pytest.raises(OSError, match="No space left"):
        export_mcore_gpt_to_hf(model, sources("dense"), export_dir=out, max_shard_size=50_000)
    assert sorted(tmp_path.rglob("*")) == before

    monkeypatch.undo()
    export_mcore_gpt_to_hf(model, sources("dense"), export_dir=out, max_shard_size=50_000)
    assert out.is_dir()


@pytest.mark.usefixtures("rank")
def test_a_user_who_interrupts_leaves_nothing(sources: Sources, tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage.startswith("Packing") and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_mcore_gpt_to_hf(
            load(sources("dense")), sources("dense"), export_dir=tmp_path / "out", progress=interrupt
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("rank")
def test_progress_counts_every_task_of_both_passes(sources: Sources, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    export_mcore_gpt_to_hf(
        load(sources("dense")), sources("dense"), export_dir=tmp_path / "out", progress=lambda *call: calls.append(call)
    )
    stages = list(dict.fromkeys(stage for stage, _, _ in calls))
    assert len(stages) == 2
    total = calls[0][2]
    assert total > 0
    assert calls == [(stage, done, total) for stage in stages for done in range(1, total + 1)]


def test_one_file_is_in_memory_at_a_time(tmp_path: Path) -> None:
    specs = {name: writer.TensorSpec(name, (4,), torch.float32) for name in "abc"}
    sink = writer.SafetensorsSink(tmp_path, (("a", "b"), ("c",)), specs)
    sink.write("a", torch.ones(4))
    assert list(tmp_path.iterdir()) == []
    sink.write("b", torch.ones(4))
    assert [path.name for path in tmp_path.iterdir()] == ["model-00001-of-00002.safetensors"]
    with pytest.raises(AssertionError):
        sink.close()
