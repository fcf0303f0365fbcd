"""Biases beside linears that are quantized: carried where servers load them, and refused by name where one does not."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quantplug.errors import MappingError, UnsupportedModelError
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.import_hf.new_model import build_model
from quantplug.verify import Severity, verify_checkpoint
from tests.export.checkpoints import one_rank, read, same_bytes
from tests.export.refusals import refused


def biased_llama(directory: Path, **biases: bool) -> Path:
    config = LlamaConfig(
        hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=48, vocab_size=67, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], **biases,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):  # transformers leaves them zero
                parameter.normal_()
    model.save_pretrained(directory)
    return directory


def test_biases_of_a_llamas_attention_are_carried_as_they_are(tmp_path: Path) -> None:
    """Of all four projections, as transformers has them; vLLM's and SGLang's llama.py load them."""
    source = biased_llama(tmp_path / "in", attention_bias=True)
    result = quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    given, found = read(source), read(result.directory)
    biases = {name for name in given if name.endswith(".bias")}
    assert len(biases) == 2 * 4
    assert [name for name in biases if not same_bytes(found[name], given[name])] == []
    assert not verify_checkpoint(result.directory, source).checks(Severity.ERROR)


def test_megatron_would_compute_such_a_llama_without_a_bias(tmp_path: Path) -> None:
    source = biased_llama(tmp_path / "in", attention_bias=True)
    with one_rank(), pytest.raises(UnsupportedModelError, match="attention_bias"):
        build_model(source)


def test_biases_of_a_llamas_mlp_are_refused_as_sglang_would_skip_them(tmp_path: Path) -> None:
    source = biased_llama(tmp_path / "in", attention_bias=True, mlp_bias=True)
    with refused(MappingError, tmp_path) as caught:
        quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    assert {offender.parameter.partition(".mlp.")[2] for offender in caught.value.offenders} == {
        f"{projection}_proj.bias" for projection in ("gate", "up", "down")
    }
