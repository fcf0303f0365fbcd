"""A checkpoint that one class of model saved, for the other: loaded where Megatron-Core loads it, else refused."""

from pathlib import Path

import pytest
import torch

from quantplug import load_checkpoint, save_checkpoint
from quantplug.errors import CheckpointError
from quantplug.megatron.checkpoint import forms
from quantplug.megatron.models.build import build_model
from quantplug.megatron.parameters import LanguageModel, iter_parameters
from tests.export.checkpoints import build, load, quantize, same_bytes
from tests.megatron.checkpoint.trained import save_trained
from tests.megatron.hybrid import hybrid_config, load_hybrid, needs_hybrid_model

pytestmark = [needs_hybrid_model, pytest.mark.usefixtures("single_rank")]

STACKED = "decoder.layers.self_attention.linear_proj.weight"


def same_weights(model: LanguageModel, other: LanguageModel) -> bool:
    weights, others = ({it.key: it.tensor for it in iter_parameters(one)} for one in (model, other))
    return weights.keys() == others.keys() and all(same_bytes(weights[key], others[key]) for key in others)


@pytest.mark.parametrize("fixture", ["tiny_qwen3_dir", "tiny_qwen3_moe_dir", "tiny_qwen3_tied_dir"])
def test_a_trained_gpt_model_becomes_a_hybrid_model(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(fixture)
    trained = load(source)
    save_trained([trained], tmp_path)
    model = build_model(hybrid_config(source))

    load_checkpoint(model, tmp_path)

    assert same_weights(model, trained)


@pytest.mark.parametrize("scheme", [None, "w4a16_nvfp4"])
def test_a_hybrid_model_is_loaded_as_it_was_saved(
    scheme: str | None, tiny_qwen3_mixed_dir: Path, tmp_path: Path
) -> None:
    saved = load_hybrid(tiny_qwen3_mixed_dir)
    if scheme is not None:
        quantize(saved, scheme, tiny_qwen3_mixed_dir)
    save_checkpoint(saved, tmp_path / "saved", extra={})
    model = build_model(hybrid_config(tiny_qwen3_mixed_dir))

    load_checkpoint(model, tmp_path / "saved")

    assert same_weights(model, saved)
    amaxes, others = ({name: it for name, it in one.named_buffers() if "amax" in name} for one in (model, saved))
    assert amaxes.keys() == others.keys()
    assert all(torch.equal(amaxes[name], others[name]) for name in others)


def refused(model: LanguageModel, directory: Path) -> str:
    with pytest.raises(CheckpointError, match=r"This checkpoint is of a (GPT|Hybrid)Model, and") as caught:
        load_checkpoint(model, directory)
    return str(caught.value)


def test_what_megatron_does_not_load_is_refused_by_name(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    save_trained([load_hybrid(tiny_qwen3_dir)], tmp_path / "hybrid")
    gpt = load(tiny_qwen3_dir)
    save_checkpoint(gpt, tmp_path / "apart", extra={})
    quantize(gpt, "w4a16_nvfp4")
    save_checkpoint(gpt, tmp_path / "quantized", extra={})

    assert "decoder.final_norm.weight" in refused(build(tiny_qwen3_dir), tmp_path / "hybrid")
    assert "layers stacked" in refused(build_model(hybrid_config(tiny_qwen3_dir)), tmp_path / "apart")
    assert "quantizers" in refused(build_model(hybrid_config(tiny_qwen3_dir)), tmp_path / "quantized")


def test_megatrons_own_reason_is_given(tiny_qwen3_mixed_dir: Path) -> None:
    """Layers of which some are dense, which it refuses whatever the checkpoint has."""
    model = build_model(hybrid_config(tiny_qwen3_mixed_dir))

    with pytest.raises(CheckpointError, match="mixes dense"):
        forms.as_stored(model, [STACKED])
