"""A source that changes between the look at it and the packing, or while it is packed: an error, and nothing written.

Each change is made by the progress callback, which an export calls at known moments in its own thread.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantplug.errors import SourceError
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from tests.export.checkpoints import files_of

Sources = Callable[[str], Path]
Change = Callable[[Path], None]
WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.experts.2.up_proj.weight"


def in_place(path: Path, name: str) -> None:
    """Makes a tensor eight times as large where it lies, as a training job that saves over its own file does."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        start, stop = json.loads(file.read(size))[name]["data_offsets"]
        file.seek(8 + size + start)
        data = torch.frombuffer(bytearray(file.read(stop - start)), dtype=torch.bfloat16) * 8
        file.seek(8 + size + start)
        file.write(data.view(torch.uint8).numpy().tobytes())


def in_place_with_its_old_time(path: Path) -> None:
    before = path.stat()
    in_place(path, UP)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replaced(path: Path) -> None:
    tensors = {name: tensor * 8 for name, tensor in load_file(path).items()}
    save_file(tensors, path.with_name("other"), metadata={"format": "pt"})
    path.with_name("other").replace(path)


CHANGES: dict[str, Change] = {
    "in place": lambda path: in_place(path, UP),
    "in place, with its old time": in_place_with_its_old_time,
    "cut short": cut_short,
    "replaced": replaced,
    "gone": lambda path: path.unlink(),
}


@pytest.fixture
def source(sources: Sources, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sources("moe"), tmp_path / "in"))


def changing(change: Callable[[], None], stage: str, after: Callable[[int, int], bool]) -> Callable[..., None]:
    """A progress callback that makes a change once, at the first moment of a stage that is late enough."""
    left = [change]

    def progress(said: str, done: int, total: int) -> None:
        if left and said.startswith(stage) and after(done, total):
            left.pop()()

    return progress


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_before_the_second_look_is_refused(change: str, source: Path, tmp_path: Path) -> None:
    tensors = set(load_file(source / WEIGHTS))
    progress = changing(lambda: CHANGES[change](source / WEIGHTS), "Checking", lambda done, total: done == total)
    with pytest.raises(SourceError, match="changed while it was read") as caught:
        quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4", progress=progress, max_shard_size=50_000)
    named = {offender.parameter for offender in caught.value.offenders}
    assert named
    assert named <= tensors
    assert not change.startswith("in place") or named == {UP}
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_change_behind_the_packer_is_refused(source: Path, tmp_path: Path) -> None:
    """What had been packed when it changed may have changed as it was packed."""
    progress = changing(lambda: in_place(source / WEIGHTS, UP), "Packing", lambda done, total: done == total)
    with pytest.raises(SourceError, match="changed while it was read") as caught:
        quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4", progress=progress, max_shard_size=50_000)
    assert {offender.parameter for offender in caught.value.offenders} == {UP}
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_file_that_is_touched_is_not_changed(source: Path, tmp_path: Path) -> None:
    progress = changing((source / WEIGHTS).touch, "Checking", lambda done, total: done == total)
    quantize_checkpoint(source, tmp_path / "touched", "w4a16_nvfp4", progress=progress)
    quantize_checkpoint(source, tmp_path / "smooth", "w4a16_nvfp4")
    assert files_of(tmp_path / "touched") == files_of(tmp_path / "smooth")


@pytest.mark.parametrize("stage", ["Checking", "Packing"])
def test_the_config_is_read_once(stage: str, source: Path, tmp_path: Path) -> None:
    config = source / "config.json"

    def edit() -> None:
        config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": 7, "architectures": []}))

    before = json.loads(config.read_text())
    quantize_checkpoint(
        source, tmp_path / "out", "w4a16_nvfp4", progress=changing(edit, stage, lambda done, total: True)
    )
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    written.pop("quantization_config")
    assert written == before
