"""Packing beside writing, from a live model and from a checkpoint: pieces that are there at once, and every failure.

That the bytes are the same is asked all over tests/export; here, that they are after a failure too.
"""

import errno
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from quantplug import export_mcore_gpt_to_hf
from quantplug.checkpoint.safetensors import writer
from quantplug.errors import QuantplugError, WriteError
from quantplug.export import model_free
from quantplug.export.pipeline import pack
from quantplug.export.pipeline.prescan import Marks
from quantplug.export.pipeline.writer_thread import AHEAD, THREAD_NAME
from quantplug.export.plan.source import ReadRows, Source
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from tests.export.checkpoints import files_of, load, quantize

pytestmark = pytest.mark.usefixtures("single_rank")

Sources = Callable[[str], Path]
Export = Callable[[Path], object]
SHARDS = 100_000


@pytest.fixture(params=["from a model", "from a checkpoint"])
def export(request: pytest.FixtureRequest, sources: Sources) -> Export:
    if request.param == "from a checkpoint":
        return lambda out: quantize_checkpoint(sources("moe"), out, "w4a16_nvfp4", max_shard_size=SHARDS)
    model = quantize(load(sources("moe")), "w4a16_nvfp4")
    return lambda out: export_mcore_gpt_to_hf(model, sources("moe"), out, max_shard_size=SHARDS)


@pytest.fixture
def packer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Where exports call `pack_rows`, for one piece at a time as if all were large."""
    monkeypatch.setattr(pack, "_are_alike", lambda one, other: False)
    return pack


def after(calls: int, real: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """Works so many times, then fails for good."""
    left = iter(range(calls))

    def faulty(*arguments: Any, **more: Any) -> Any:
        if next(left, None) is None:
            raise error
        return real(*arguments, **more)

    return faulty


def no_thread_is_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


def test_a_few_packed_pieces_are_there_at_once(
    export: Export, packer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    counts: list[int] = []
    pack_rows = packer.pack_rows

    def counted(*arguments: Any) -> Sequence[torch.Tensor]:
        counts.append(len(alive) + 1)
        packed = pack_rows(*arguments)
        alive.add(packed[0])
        return packed

    monkeypatch.setattr(packer, "pack_rows", counted)
    export(tmp_path / "out")
    assert len(counts) > 20
    # One is being made, so many are written or wait; and the caller still has the last one in its hands.
    assert max(counts) <= AHEAD + 2
    assert not alive


@pytest.mark.parametrize("calls", [0, 1, 30])
def test_a_failing_packer_ends_it(
    calls: int, export: Export, packer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = MemoryError("of the packer")
    monkeypatch.setattr(packer, "pack_rows", after(calls, packer.pack_rows, error))
    with pytest.raises(MemoryError) as caught:
        export(tmp_path / "out")
    assert caught.value is error
    goes_on(export, tmp_path, monkeypatch)


@pytest.mark.parametrize("calls", [0, 30])
def test_a_failing_reader_ends_it(
    calls: int, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ValueError("of the reader")

    def failing(source: Source, marks: Marks) -> ReadRows:
        return after(calls, source.read, error)

    monkeypatch.setattr(model_free, "unchanged_rows", failing)

    def export(out: Path) -> None:
        quantize_checkpoint(sources("moe"), out, "w4a16_nvfp4", max_shard_size=SHARDS)

    with pytest.raises(ValueError, match="of the reader") as caught:
        export(tmp_path / "out")
    assert caught.value is error
    goes_on(export, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["pwrite", "posix_fadvise", "fsync"])
@pytest.mark.parametrize("calls", [2, 12])
def test_a_failing_disk_ends_it(
    name: str, calls: int, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    # Of files as small as these the disk would not be told to begin.
    monkeypatch.setattr(writer, "_ADVISED", 0)
    monkeypatch.setattr(writer, "_LEAST_ADVISED", 0)
    monkeypatch.setattr(os, name, after(calls, getattr(os, name), error))
    with pytest.raises(QuantplugError, match="No space left") as caught:
        export(tmp_path / "out")
    assert type(caught.value) is WriteError
    goes_on(export, tmp_path, monkeypatch)


def goes_on(export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is visible, nothing runs; the same export then keeps what is finished, and ends with the same bytes."""
    assert no_thread_is_left()
    assert not (tmp_path / "out").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    monkeypatch.undo()
    export(tmp_path / "out")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished} == finished
    export(tmp_path / "smooth")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "smooth")
