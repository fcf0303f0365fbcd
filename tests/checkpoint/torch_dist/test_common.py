"""What a trainer noted beside the tensors: its arguments as plain data, and nothing that runs."""

import argparse
import enum
from pathlib import Path

import pytest
import torch

from quantplug.checkpoint.torch_dist.index import read_index
from quantplug.checkpoint.torch_dist.noted.common import COMMON_FILE, read_common
from quantplug.errors import CheckpointError
from tests.checkpoint.torch_dist.written import Touching, put_object, save


class Backend(enum.Enum):
    FLASH = "flash"


ARGUMENTS = argparse.Namespace(
    num_layers=2, rate=0.5, fp8=None, path="x", pattern=[1, 0], attention_backend=Backend.FLASH, dtype=torch.bfloat16
)
SAID = {"num_layers": 2, "rate": 0.5, "fp8": None, "path": "x", "pattern": [1, 0], "attention_backend": "flash"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoint", {"weight": torch.zeros(2)})


def test_arguments_are_plain_data(directory: Path) -> None:
    torch.save({"iteration": 100, "args": ARGUMENTS, "rng": torch.zeros(2)}, directory / COMMON_FILE)

    arguments = read_common(directory)

    assert arguments == {**SAID, "dtype": None}


def test_a_checkpoint_without_arguments_has_none(directory: Path) -> None:
    assert read_common(directory) == {}


def test_megatron_core_019_keeps_it_in_the_index(tmp_path: Path) -> None:
    directory = save(tmp_path / "newer", {"weight": torch.zeros(2)})
    put_object(directory, "common_state/shard_0_1", {"args": ARGUMENTS})
    (directory / COMMON_FILE).unlink()

    assert read_common(directory, read_index(directory))["num_layers"] == 2


def test_nothing_in_it_runs(directory: Path, tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(a=Touching(tmp_path / "ran"), b=3)}, directory / COMMON_FILE)

    assert read_common(directory) == {"a": None, "b": 3}
    assert not (tmp_path / "ran").exists()


def test_what_is_in_itself_ends(directory: Path) -> None:
    looped: dict[str, object] = {"a": 1}
    looped["self"] = looped
    torch.save({"args": looped}, directory / COMMON_FILE)
    assert read_common(directory)["a"] == 1

    endless: list[object] = []
    endless.append(endless)
    torch.save(endless, directory / COMMON_FILE)
    assert read_common(directory) == {}


def shared(times: int, levels: int) -> list[object]:
    """A list that is in memory once for each level, and a list of `times` to the power of `levels` to who walks it."""
    value: list[object] = [1] * times
    for _ in range(levels - 1):
        value = [value] * times
    return value


@pytest.mark.parametrize("value", [shared(1000, 3), 10**4000], ids=["shared", "digits"])
def test_what_goes_on_and_on_is_no_note_of_a_trainer(value: object, directory: Path) -> None:
    torch.save({"args": argparse.Namespace(num_layers=value)}, directory / COMMON_FILE)

    with pytest.raises(CheckpointError, match="more than any trainer notes"):
        read_common(directory)


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\x80\x04K\x01."])
def test_a_damaged_file_is_named(content: bytes, directory: Path) -> None:
    (directory / COMMON_FILE).write_bytes(content)

    with pytest.raises(CheckpointError, match=COMMON_FILE):
        read_common(directory)


def test_a_missing_file_is_named(directory: Path) -> None:
    (directory / COMMON_FILE).unlink()

    with pytest.raises(CheckpointError, match=COMMON_FILE):
        read_common(directory)
