"""The export directory is complete or absent, whatever is in its way and wherever writing fails."""

import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantplug import export_mcore_gpt_to_hf
from quantplug.checkpoint.safetensors import writer as safetensors_writer
from quantplug.errors import DestinationError, WriteError
from quantplug.export.files import config_files as hf_config
from quantplug.export.files import index, staging
from quantplug.export.files.staging import check_destination
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
        check_destination(file / inside)
    (offender,) = caught.value.offenders
    assert offender.parameter == str(file)


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


@pytest.mark.usefixtures("single_rank")
def test_nothing_is_overwritten(sources: Sources, tmp_path: Path) -> None:
    model = load(sources("dense"))
    source = shutil.copytree(sources("dense"), tmp_path / "hf")
    with refused(DestinationError, tmp_path):
        export_mcore_gpt_to_hf(model, source, export_dir=source)


@pytest.mark.usefixtures("single_rank")
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
    (os, "ftruncate", 0),
    (os, "pwrite", 0),
    (os, "pwrite", 30),
    (safetensors_writer, "finish_file", 0),
    (safetensors_writer, "finish_file", 1),
    (index, "write_json", 0),
    (shutil, "copyfileobj", 1),
    (hf_config, "write_json", 0),
    (hf_config, "write_json", 1),
    (Path, "replace", 6),
]


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize(("owner", "name", "calls"), FAULTS, ids=[f"{name} {calls}" for _, name, calls in FAULTS])
@pytest.mark.parametrize("existing", [None, "out", "parent"])
def test_after_a_full_disk_the_same_export_goes_on(
    owner: Any, name: str, calls: int, existing: str | None, sources: Sources, tmp_path: Path, monkeypatch: Any
) -> None:
    """Nothing is visible; what is finished is kept out of sight, or no trace is left if nothing is."""
    out = tmp_path / "parent" / "out"
    if existing is not None:
        (out if existing == "out" else out.parent).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    model = quantize(load(sources("dense")), "w4a16_nvfp4")
    monkeypatch.setattr(owner, name, _after(calls, getattr(owner, name)))
    with pytest.raises(WriteError, match="No space left"):
        export_mcore_gpt_to_hf(model, sources("dense"), export_dir=out, max_shard_size=50_000)
    partial = out.with_name(".out.partial")
    finished = {path.name: path.stat().st_mtime_ns for path in (partial / "checkpoint").glob("*.safetensors")}
    if finished:
        assert not out.exists() or not any(out.iterdir())
    else:
        assert sorted(tmp_path.rglob("*")) == before

    monkeypatch.undo()
    export_mcore_gpt_to_hf(model, sources("dense"), export_dir=out, max_shard_size=50_000)
    assert not partial.exists()
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    # Finished files were not written again, and the whole is what an export without trouble writes.
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished
    export_mcore_gpt_to_hf(model, sources("dense"), export_dir=tmp_path / "smooth", max_shard_size=50_000)
    assert_same_files(out, tmp_path / "smooth")


def assert_same_files(directory: Path, expected: Path) -> None:
    assert sorted(path.name for path in directory.iterdir()) == sorted(path.name for path in expected.iterdir())
    for path in expected.iterdir():
        assert (directory / path.name).read_bytes() == path.read_bytes(), path.name


def _stopped(model: Any, source: Path, out: Path) -> None:
    """An export that ends with some of its files finished."""

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage.startswith("Packing") and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_mcore_gpt_to_hf(model, source, export_dir=out, max_shard_size=50_000, progress=interrupt)
    assert list(out.with_name(f".{out.name}.partial").glob("checkpoint/*.safetensors"))


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("change", ["weight", "scheme", "file size", "plain weight"])
def test_another_export_does_not_take_up_what_is_left(change: str, sources: Sources, tmp_path: Path) -> None:
    model = quantize(load(sources("dense")), "w4a16_nvfp4")
    out = tmp_path / "out"
    _stopped(model, sources("dense"), out)
    limit = 50_000
    with torch.no_grad():
        if change == "weight":
            model.decoder.layers[1].mlp.linear_fc2.weight[5, 7] *= 0.5
        elif change == "plain weight":
            model.decoder.final_layernorm.weight[3] += 1
        elif change == "scheme":
            model = quantize(load(sources("dense")), "w8a16_fp8")
        else:
            limit = 60_000
    with refused(DestinationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("dense"), export_dir=out, max_shard_size=limit)
    assert ".out.partial" in str(caught.value)


@pytest.mark.usefixtures("single_rank")
def test_nor_does_it_after_a_rename_that_failed(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files are finished by then: nothing but their manifest tells whose they are."""
    model = load(sources("dense"))
    monkeypatch.setattr(staging, "publish_directory", _disk_full)
    with pytest.raises(WriteError):
        export_mcore_gpt_to_hf(model, sources("dense"), export_dir=tmp_path / "out")
    monkeypatch.undo()
    with torch.no_grad():
        model.decoder.final_layernorm.weight[3] += 1
    with refused(DestinationError, tmp_path):
        export_mcore_gpt_to_hf(model, sources("dense"), export_dir=tmp_path / "out")


@pytest.mark.usefixtures("single_rank")
def test_two_exports_do_not_write_the_same_directory(sources: Sources, tmp_path: Path) -> None:
    model = load(sources("dense"))
    begun: list[int] = []

    def again(stage: str, done: int, total: int) -> None:
        if stage.startswith("Packing") and not begun:
            begun.append(done)
            with pytest.raises(DestinationError, match="still runs"):
                export_mcore_gpt_to_hf(model, sources("dense"), export_dir=tmp_path / "out")

    export_mcore_gpt_to_hf(model, sources("dense"), export_dir=tmp_path / "out", progress=again)
    assert read(tmp_path / "out").keys() == read(sources("dense")).keys()


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks(
    code: int, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says which file system, and what to do; what else a lock may fail of is the disk's."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    source = sources("dense")  # Before: what is made once for all tests is made under a lock.
    model = load(source)
    monkeypatch.setattr(fcntl, "flock", flock)
    kind = WriteError if code == errno.EIO else DestinationError
    with refused(kind, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "new" / "out")
    (offender,) = caught.value.offenders
    assert os.strerror(code) in offender.reason
    if code != errno.EIO:
        df = subprocess.run(["df", "--output=fstype,target", tmp_path], capture_output=True, text=True, check=True)
        file_system, mounted_at = df.stdout.splitlines()[1].split()
        assert offender.reason.startswith(f"{file_system} file system")
        assert offender.parameter == mounted_at
        assert "mounted with locks" in caught.value.remedy


@pytest.mark.usefixtures("single_rank")
@pytest.mark.slow
def test_kills_at_any_moment_end_with_the_same_bytes(sources: Sources, tmp_path: Path) -> None:
    """kill -9 of a forked export, again and again, until one gets through."""
    model = quantize(load(sources("dense")), "w4a16_nvfp4")
    export_mcore_gpt_to_hf(model, sources("dense"), export_dir=tmp_path / "smooth", max_shard_size=20_000)
    dice = random.Random(0)
    kills = 0
    while kills < 25:
        out = tmp_path / f"out{kills}"
        while not out.exists():
            steps = dice.randrange(60)
            child = os.fork()
            if child == 0:
                _export_until(steps, model, sources("dense"), out)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                kills += 1
            else:
                assert os.WEXITSTATUS(status) == 0
        assert_same_files(out, tmp_path / "smooth")
        shutil.rmtree(out)


def _export_until(steps: int, model: Any, source: Path, out: Path) -> None:
    """In a child process: an export that is killed after so many steps, at a write, an fsync or a rename."""
    left = iter(range(steps))

    def mortal(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)

        return call

    torch.set_num_threads(1)
    os.pwrite, os.fsync, os.replace = mortal(os.pwrite), mortal(os.fsync), mortal(os.replace)
    Path.replace = mortal(Path.replace)  # type: ignore[method-assign]
    status = 1
    try:
        export_mcore_gpt_to_hf(model, source, export_dir=out, max_shard_size=20_000)
        status = 0
    finally:
        os._exit(status)


@pytest.mark.usefixtures("single_rank")
def test_a_user_who_interrupts_leaves_nothing(sources: Sources, tmp_path: Path) -> None:
    calls = iter(range(2))

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage.startswith("Packing") and next(calls, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_mcore_gpt_to_hf(
            load(sources("dense")), sources("dense"), export_dir=tmp_path / "out", progress=interrupt
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("single_rank")
def test_progress_counts_the_bytes_of_both_passes(sources: Sources, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    model = load(sources("dense"))
    export_mcore_gpt_to_hf(model, sources("dense"), tmp_path / "out", progress=lambda *call: calls.append(call))
    held = sum(parameter.nbytes for parameter in model.parameters())
    written = sum(tensor.nbytes for tensor in read(sources("dense")).values())
    # The model holds padding rows of the vocabulary too.
    for stage, size in (("Checking weights", held), ("Packing and writing", written)):
        counts = [(done, total) for said, done, total in calls if said == stage]
        assert counts == sorted(counts)
        assert counts[-1] == (size, size)
