"""Weights that have grown since they were calibrated: refused by name, or by choice calibrated anew or clipped."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantplug import export_hf_weights_quant, export_mcore_gpt_to_hf
from quantplug.errors import ArgumentError, CalibrationError
from quantplug.export.stream.api import plan_stream
from tests.export.checkpoints import files_of, load, quantize, read, same_bytes
from tests.export.refusals import FC1, FC2, offenders, refused

pytestmark = pytest.mark.usefixtures("single_rank")

Sources = Callable[[str], Path]
DOWN = "model.layers.1.mlp.experts.0.down_proj"


def grow(model: torch.nn.Module, linear: str, expert: int, factor: float) -> None:
    with torch.no_grad():
        getattr(model.get_submodule(linear), f"weight{expert}").mul_(factor)


@pytest.mark.parametrize("scheme", ["w4a16_nvfp4", "nvfp4", "fp8"])
def test_every_grown_weight_is_named_with_both_amaxes(scheme: str, sources: Sources, tmp_path: Path) -> None:
    model = quantize(load(sources("moe")), scheme)
    amax = model.get_submodule(FC2).weight0.abs().max().item()
    grow(model, FC1, 2, 64.0)
    grow(model, FC2, 0, 1.125)
    with refused(CalibrationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), tmp_path / "out")
    assert offenders(caught) == {(f"{FC1}.weight2", 2), (f"{FC2}.weight0", 0)}
    assert f"its quantizer's amax is {amax:.6g}" in str(caught.value)
    assert f"holds {model.get_submodule(FC2).weight0.abs().max().item():.6g}" in str(caught.value)


@pytest.mark.parametrize("scheme", ["w4a16_nvfp4", "fp8"])
def test_the_remedy_gives_the_bytes_of_a_new_calibration(scheme: str, sources: Sources, tmp_path: Path) -> None:
    model = quantize(load(sources("moe")), scheme)
    grow(model, FC1, 2, 64.0)
    grow(model, FC2, 1, 0.25)
    export_mcore_gpt_to_hf(model, sources("moe"), tmp_path / "refreshed", amax="refresh")
    anew = load(sources("moe"))
    grow(anew, FC1, 2, 64.0)
    grow(anew, FC2, 1, 0.25)
    export_mcore_gpt_to_hf(quantize(anew, scheme), sources("moe"), tmp_path / "anew")
    assert files_of(tmp_path / "refreshed") == files_of(tmp_path / "anew")


def test_clipping_keeps_the_calibrated_scale(sources: Sources, tmp_path: Path) -> None:
    model = quantize(load(sources("moe")), "w4a16_nvfp4")
    export_mcore_gpt_to_hf(model, sources("moe"), tmp_path / "before")
    grow(model, FC2, 0, 64.0)
    export_mcore_gpt_to_hf(model, sources("moe"), tmp_path / "clipped", amax="clip")
    before, clipped = read(tmp_path / "before"), read(tmp_path / "clipped")
    assert same_bytes(clipped[f"{DOWN}.weight_scale_2"], before[f"{DOWN}.weight_scale_2"])
    # Every block is far above the largest scale that the calibrated one leaves room for.
    assert set(clipped[f"{DOWN}.weight_scale"].float().flatten().tolist()) == {448.0}


def test_rounding_is_no_growth(sources: Sources, tmp_path: Path) -> None:
    """A model that was calibrated in FP32 and rounded to BF16 afterwards."""
    model = quantize(load(sources("moe_fp32"), dtype=torch.float32), "w4a16_nvfp4").bfloat16()
    export_mcore_gpt_to_hf(model, sources("moe_fp32"), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_blocks_with_scales_of_their_own_clip_nothing(sources: Sources, tmp_path: Path) -> None:
    model = quantize(load(sources("moe_blocks")), "fp8_blockwise")
    grow(model, FC1, 2, 64.0)
    with pytest.raises(CalibrationError, match="not their weights'"):
        export_mcore_gpt_to_hf(model, sources("moe_blocks"), tmp_path / "out")
    export_mcore_gpt_to_hf(model, sources("moe_blocks"), tmp_path / "out", amax="refresh")
    anew = load(sources("moe_blocks"))
    grow(anew, FC1, 2, 64.0)
    export_mcore_gpt_to_hf(quantize(anew, "fp8_blockwise"), sources("moe_blocks"), tmp_path / "anew")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "anew")


def test_a_stream_refuses_what_training_has_moved_beyond_its_amax(sources: Sources) -> None:
    model = quantize(load(sources("moe")), "w4a16_nvfp4")
    plans = {amax: plan_stream(model, sources("moe"), quant_format="as_quantized", amax=amax) for amax in POLICIES}
    before = {name: tensor.clone() for name, tensor in plans["calibrated"].tensors()}
    grow(model, FC2, 0, 64.0)
    with pytest.raises(CalibrationError, match=r"linear_fc2\.weight0 \(expert 0\)"):
        next(plans["calibrated"].tensors())
    clipped, refreshed = dict(plans["clip"].tensors()), dict(plans["refresh"].tensors())
    assert same_bytes(clipped[f"{DOWN}.weight_scale_2"], before[f"{DOWN}.weight_scale_2"])
    assert refreshed[f"{DOWN}.weight_scale_2"] == 64 * before[f"{DOWN}.weight_scale_2"]
    assert same_bytes(refreshed[f"{DOWN}.weight"], before[f"{DOWN}.weight"])


POLICIES = ("calibrated", "refresh", "clip")


def test_another_policy_is_refused(sources: Sources, tmp_path: Path) -> None:
    model = quantize(load(sources("moe")), "w4a16_nvfp4")
    with refused(ArgumentError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), tmp_path / "out", amax="grow")
    assert offenders(caught) == {("amax", None)}
    with pytest.raises(ArgumentError, match="calibrated, refresh, clip"):
        export_hf_weights_quant(model, sources("moe"), quant_format="as_quantized", amax="max")
