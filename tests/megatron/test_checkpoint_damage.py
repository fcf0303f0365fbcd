"""Whatever happened to a checkpoint's files since it was saved is a CheckpointError that names one of them."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch

import quantplug.plugins  # noqa: F401
from quantplug.errors import CheckpointError
from quantplug.megatron.checkpoint.save_load import load_checkpoint, save_checkpoint
from quantplug.megatron.releases.installed import MEGATRON_CORE
from tests.export.checkpoints import one_rank
from tests.plugins.tiny_model import tiny_model

Damage = Callable[[Path], object]
SHARD, STATE = "__0_0.distcp", "modelopt_state"


@pytest.fixture(scope="module", autouse=True)
def one_for_all() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "q"
    save_checkpoint(mtq.quantize(tiny_model(), mtq.W4A16_NVFP4_CFG), directory, extra={})
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "q")


@pytest.fixture
def undigested(copy: Path) -> Path:
    """As plain ModelOpt and trainers write them: without our file."""
    (copy / "quantplug.json").unlink()
    return copy


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def garbage(path: Path) -> None:
    path.write_bytes(b"\x80\x04garbage")


DAMAGES: dict[str, Damage] = {
    "flipped": flipped, "cut": cut, "piped": piped, "garbage": garbage, "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""), "directory": lambda path: (path.unlink(), path.mkdir()),
}  # fmt: skip
# Megatron-Core 0.19 has an object of the index in place of a common.pt, also in what ModelOpt lets it save.
NOTES = [name for name in ("common.pt", f"{STATE}/common.pt") if MEGATRON_CORE < (0, 19)]
PARTS = [f"{STATE}/{name}" for name in (SHARD, ".metadata") if MEGATRON_CORE >= (0, 19)]
FILES = [SHARD, ".metadata", "metadata.json", *NOTES, *PARTS, f"{STATE}/metadata.json"]


def refused(directory: Path, named: str) -> CheckpointError:
    model = tiny_model()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, directory)
    assert any(named in offender.parameter for offender in caught.value.offenders), caught.value
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    return caught.value


def test_the_undamaged_copy_loads(copy: Path) -> None:
    load_checkpoint(tiny_model(), copy)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_every_damage_of_every_file_is_found_and_named(name: str, damage: Damage, copy: Path) -> None:
    damage(copy / name)
    refused(copy, name if name != ".metadata" else "")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [it for name, it in DAMAGES.items() if name != "flipped"])
def test_without_digests_what_cannot_be_read_is_named(name: str, damage: Damage, undigested: Path) -> None:
    damage(undigested / name)
    refused(undigested, Path(name).name)


def test_without_digests_it_loads(undigested: Path) -> None:
    load_checkpoint(tiny_model(), undigested)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"extra": 7}', '{"extra": {}, "files": {"../q": {}}}'])
def test_our_own_file(text: str, copy: Path) -> None:
    (copy / "quantplug.json").write_text(text)
    refused(copy, "quantplug.json" if "files" not in text else "../q")


@pytest.mark.parametrize("config", [{"sharded_backend": "zarr9"}, {"sharded_backend": "zarr"}, {}, [], 7])
@pytest.mark.parametrize("part", ["", STATE])
def test_a_backend_that_is_not_read(part: str, config: object, undigested: Path) -> None:
    (undigested / part / "metadata.json").write_text(json.dumps(config))
    assert not mto.ModeloptStateManager.is_converted(tiny_model())
    error = refused(undigested, "")
    assert "metadata.json" in str(error) or "format zarr" in str(error)


def test_every_file_has_its_digest(saved: Path) -> None:
    files = json.loads((saved / "quantplug.json").read_text())["files"]
    there = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert files.keys() == there - {"quantplug.json"}
    assert set(FILES) <= files.keys()
    assert all(files[name]["bytes"] == (saved / name).stat().st_size for name in files)
