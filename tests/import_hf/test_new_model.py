"""A Megatron-Core model from a Hugging Face directory, in one call."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import quantplug
from quantplug.errors import ArgumentError, SourceError, TopologyError
from quantplug.megatron.models.build import LayerSpec
from tests.export.checkpoints import read, same_bytes
from tests.megatron.checkpoint.trained import save_trained

NORM = "decoder.final_layernorm.weight"


@pytest.mark.usefixtures("single_rank")
def test_weights_are_those_of_the_checkpoint(tiny_qwen3_dir: Path) -> None:
    reported: list[tuple[str, int, int]] = []

    model = quantplug.build_model(tiny_qwen3_dir, import_weights=True, progress=lambda *report: reported.append(report))

    expected = load_file(tiny_qwen3_dir / "model.safetensors")["model.norm.weight"]
    assert torch.equal(model.state_dict()[NORM], expected)
    assert reported[-1] == ("import", len(reported), len(reported))


@pytest.mark.usefixtures("single_rank")
def test_weights_that_are_not_imported_are_zero(tiny_qwen3_dir: Path) -> None:
    model = quantplug.build_model(tiny_qwen3_dir)

    assert not any(parameter.count_nonzero() for parameter in model.parameters())


@pytest.mark.usefixtures("single_rank")
def test_the_type_is_the_configs_or_the_callers(tiny_qwen3_dir: Path) -> None:
    types = {
        parameter.dtype
        for dtype in (None, torch.float32)
        for parameter in quantplug.build_model(tiny_qwen3_dir, dtype=dtype).parameters()
    }

    assert types == {torch.bfloat16, torch.float32}


@pytest.mark.usefixtures("single_rank")
def test_virtual_stages_without_pipeline_stages_are_refused(tiny_qwen3_dir: Path) -> None:
    """Megatron would build every layer in each of them."""
    with pytest.raises(TopologyError, match="Virtual pipeline stages need pipeline stages"):
        quantplug.build_model(tiny_qwen3_dir, virtual_stages=2)


@pytest.mark.usefixtures("single_rank")
def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not a directory"):
        quantplug.build_model(tmp_path / "absent")


@pytest.mark.usefixtures("no_ranks")
def test_without_parallel_groups_the_way_out_is_named(tiny_qwen3_dir: Path) -> None:
    with pytest.raises(TopologyError, match="initialize_parallel"):
        quantplug.build_model(tiny_qwen3_dir)


@pytest.mark.usefixtures("single_rank")
def test_norms_may_be_those_that_a_checkpoint_was_trained_with(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    trained = quantplug.build_model(tiny_qwen3_dir, import_weights=True, zero_centred_norms=True)
    save_trained([trained], tmp_path / "trained", apply_layernorm_1p=True)
    model = quantplug.build_model(tiny_qwen3_dir, zero_centred_norms=True)
    quantplug.load_checkpoint(model, tmp_path / "trained")
    quantplug.export_mcore_gpt_to_hf(model, tiny_qwen3_dir, tmp_path / "out")
    written, expected = read(tmp_path / "out"), read(tiny_qwen3_dir)
    assert written.keys() == expected.keys()
    assert all(same_bytes(written[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("single_rank")
def test_choices_that_no_model_has_are_refused(tiny_qwen3_dir: Path) -> None:
    with pytest.raises(ArgumentError, match="zero_centred_norms"):
        quantplug.build_model(tiny_qwen3_dir, layer_spec=LayerSpec.LOCAL, zero_centred_norms=True)
    with pytest.raises(ArgumentError, match="vocab_size"):
        quantplug.build_model(tiny_qwen3_dir, vocab_size=0)
