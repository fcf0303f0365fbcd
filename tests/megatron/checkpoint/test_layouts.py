"""Checkpoints of plain ModelOpt: its own 0.47 layout, and the older one with one amax for all experts of a layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantplug.plugins  # noqa: F401
from quantplug.calibration.collect import collect_statistics
from quantplug.calibration.statistics import AmaxSource
from quantplug.errors import CheckpointError
from quantplug.megatron.checkpoint.save_load import LoadReport, load_checkpoint
from tests.plugins.tiny_model import DENSE, grouped_linears, tiny_model

pytestmark = pytest.mark.usefixtures("single_rank")

WIDE = {"moe_ffn_hidden_size": 256}
OWN_LAYOUT = [("nvfp4", {}), ("fp8", {}), ("fp8_blockwise", {}), ("fp8_blockwise_256", WIDE), ("dense", DENSE)]
FC2 = "decoder.layers.1.mlp.experts.experts.{}linear_fc2.weight_quantizer._amax"


def loaded(directory: Path, **settings: Any) -> tuple[nn.Module, LoadReport]:
    model = tiny_model(**settings)
    return model, load_checkpoint(model, directory)


def assert_amaxes(model: nn.Module, file: Path) -> None:
    expected = torch.load(file)
    found = {name: tensor for name, tensor in model.named_buffers() if name.endswith("_amax")}
    assert found.keys() == expected.keys()
    for name, amax in expected.items():
        assert torch.equal(found[name], amax.view_as(found[name])), name
        assert (found[name].dtype, found[name].numel()) == (amax.dtype, amax.numel())


def refusal(directory: Path, **settings: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        loaded(directory, **settings)
    return caught.value


@pytest.mark.parametrize(("name", "settings"), OWN_LAYOUT, ids=[name for name, _ in OWN_LAYOUT])
def test_every_amax_of_modelopt_047_is_read(plain_checkpoints: Path, name: str, settings: dict[str, Any]) -> None:
    model, report = loaded(plain_checkpoints / f"047_{name}", **settings)
    assert_amaxes(model, plain_checkpoints / f"047_{name}.pt")
    assert report == LoadReport({})


def test_settings_of_modelopt_047_are_read_expert_by_expert(plain_checkpoints: Path) -> None:
    """In every expert's place it has the settings of all of them."""
    model, _ = loaded(plain_checkpoints / "047_nvfp4")
    for linear in grouped_linears(model).values():
        assert [quantizer.is_enabled for quantizer in linear.weight_quantizer] == [expert != 3 for expert in range(8)]


@pytest.mark.parametrize("name", ["nvfp4", "fp8"])
def test_the_one_amax_of_modelopt_046_goes_to_every_expert_and_is_reported(plain_checkpoints: Path, name: str) -> None:
    model, report = loaded(plain_checkpoints / f"046_{name}")
    assert_amaxes(model, plain_checkpoints / f"046_{name}.pt")
    experts = "decoder.layers.{}.mlp.experts.{}linear_{}.weight_quantizer"
    assert {fan_out.key: (fan_out.amax, fan_out.experts) for fan_out in report.fan_outs} == {
        experts.format(layer, "experts.", linear) + "._amax": (
            float(model.get_buffer(experts.format(layer, "", linear) + ".6._amax")),
            tuple(range(8)),
        )
        for layer in range(2)
        for linear in ("fc1", "fc2")
    }
    rows = collect_statistics(model, fan_outs=report.fan_outs).rows
    assert {row.source for row in rows if row.expert is not None} == {AmaxSource.FAN_OUT}
    assert AmaxSource.FAN_OUT not in {row.source for row in rows if row.expert is None}
    assert AmaxSource.FAN_OUT not in {row.source for row in collect_statistics(model).rows}


def test_an_amax_of_other_experts_is_refused(plain_checkpoints: Path) -> None:
    """As 0.46 saves it on several expert parallel ranks, each with an amax of its own: that of the first one's."""
    error = refusal(plain_checkpoints / "046_of_other_experts")
    assert [(offender.parameter, offender.expert) for offender in error.offenders] == [(FC2.format(""), 5)]
    assert "max|weight| is 7.5000e-01" in error.offenders[0].reason


def test_a_lost_amax_of_all_experts_is_refused_by_every_name(plain_checkpoints: Path) -> None:
    names = [offender.parameter for offender in refusal(plain_checkpoints / "046_lost").offenders]
    assert names == [FC2.format(f"{expert}.") for expert in range(8)]


def test_a_lost_amax_of_one_expert_is_refused(plain_checkpoints: Path) -> None:
    names = [offender.parameter for offender in refusal(plain_checkpoints / "047_lost").offenders]
    assert names == [FC2.format("5.")]


@pytest.mark.parametrize("name", ["046_nvfp4", "047_nvfp4"])
def test_another_model_is_refused_by_every_key(plain_checkpoints: Path, name: str) -> None:
    error = refusal(plain_checkpoints / name, num_layers=3, moe_ffn_hidden_size=80)
    names = {offender.parameter for offender in error.offenders}
    fc1 = {f"decoder.layers.{i}.mlp.experts.experts.{e}.linear_fc1.weight_w" for i in range(3) for e in range(8)}
    assert fc1 <= names
    assert "decoder.layers.2.self_attention.linear_proj.weight" in names


def test_blocks_of_another_width_are_no_displaced_amax(plain_checkpoints: Path) -> None:
    error = refusal(plain_checkpoints / "047_fp8_blockwise_256")
    names = {offender.parameter for offender in error.offenders}
    assert {f"decoder.layers.0.mlp.experts.experts.{expert}.linear_fc1.weight_w" for expert in range(8)} <= names
