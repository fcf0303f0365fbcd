"""A rank that fails ends all ranks with one error."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from quantplug.errors import SourceError
from quantplug.megatron.agreement import agreement_device, all_or_none, collective_device, union
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]


def refuse() -> None:
    raise SourceError("Cannot read.")


def test_without_a_process_group_a_step_is_just_called():
    assert all_or_none(lambda: 3) == 3
    assert union(torch.tensor([0, 1], dtype=torch.uint8)).tolist() == [0, 1]
    with pytest.raises(SourceError, match="Cannot read"):
        all_or_none(refuse)


def test_errors_that_are_not_for_users_pass_through():
    with pytest.raises(ZeroDivisionError):
        all_or_none(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("backend", "agreement", "data"),
    [
        ("cpu:gloo,cuda:gloo", "cpu", "cpu"),  # What torch makes of "gloo"; the next one of "nccl".
        ("cuda:nccl", "cuda", "cuda"),
        ("cpu:gloo,cuda:nccl", "cpu", "cuda"),
        ("cuda:nccl,cpu:gloo", "cpu", "cuda"),
    ],
)
def test_agreement_keeps_to_gloo_and_data_to_nccl(backend, agreement, data, monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda: backend)
    assert agreement_device() == torch.device(agreement)
    assert collective_device() == torch.device(data)


@pytest.mark.usefixtures("no_ranks")
def test_what_torch_makes_of_gloo():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.get_backend_config() == "cpu:gloo,cuda:gloo"
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_agree(tmp_path):
    script = ROOT / "tests" / "distributed" / "agreement_ranks.py"
    ended = run_ranks(2, script, tmp_path)
    assert ended.ok, ended.output[-9000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first.pop("none") == "no error: 0"
    assert second.pop("none") == "no error: 1"
    assert (first.pop("cause"), second.pop("cause")) == ("None", "KeyError(1)")
    assert first == second
    assert "file 1 (expert 1) on rank 1: does not exist" in first["second"]
    assert "index on rank 1: is damaged" in first["second"]
    # What every rank finds is of none; what one finds is of that one.
    assert first["both"].count("index: is damaged") == 1
    assert "file 0 (expert 0) on rank 0: does not exist" in first["both"]
    assert "file 1 (expert 1) on rank 1: does not exist" in first["both"]
    assert first["differently"] == "SourceError: Problem of rank 0."
    assert first["union"] == [1, 0, 1]
