"""Checkpoints of one Megatron-Core load under another: those that each release wrote lie in `samples`."""

import tarfile
from pathlib import Path

import modelopt.torch.opt as mto
import pytest
import torch

from quantplug.megatron.checkpoint.save_load import load_checkpoint
from quantplug.releases import KNOWN, release_of
from tests.made_once import MadeOnce
from tests.megatron.checkpoint.samples import FOLDER, SAMPLES, expected, held

ARCHIVES = sorted(FOLDER.glob("*.tar.xz"))


def version_of(archive: Path) -> str:
    return archive.name.removeprefix("megatron_core-").removesuffix(".tar.xz")


def test_there_are_samples_of_both_ends() -> None:
    assert {release_of(version_of(archive)) for archive in ARCHIVES} >= set(KNOWN["megatron-core"])


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("archive", ARCHIVES, ids=version_of)
def test_every_weight_and_amax_is_what_was_saved(archive: Path, name: str, made_once: MadeOnce) -> None:
    def unpack(directory: Path) -> None:
        with tarfile.open(archive) as packed:
            packed.extractall(directory, filter="data")

    make, config = SAMPLES[name]
    model = make()
    report = load_checkpoint(model, made_once(f"sample_{archive.name}", unpack) / name)
    assert mto.ModeloptStateManager.is_converted(model) is (config is not None)
    assert report.extra == ({"sample": name} if config is not None else {})
    amaxes = 0
    for tensor_name, tensor in held(model):
        assert torch.equal(tensor, expected(tensor_name, tensor)), tensor_name
        amaxes += tensor_name.endswith("._amax")
    assert bool(amaxes) is (config is not None)
