"""What a caller may choose to be otherwise than config.json says: the vocabulary, and multi-token prediction."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantplug import (
    build_model,
    export_checkpoint,
    export_hf_weights_quant,
    export_mcore_gpt_to_hf,
    quantize_checkpoint,
    save_checkpoint,
)
from quantplug.checkpoint.config.source import megatron_config, read_source_config
from quantplug.errors import ArgumentError, MappingError, ShapeError
from quantplug.megatron.models import build
from quantplug.megatron.parameters import LanguageModel
from quantplug.verify import verify_checkpoint
from tests.export.checkpoints import assert_same_export, quantize, read, same_bytes
from tests.export.refusals import edited_source, refused
from tests.families.cases import make
from tests.made_once import MadeOnce

pytestmark = pytest.mark.usefixtures("single_rank")

Checkpoint = Callable[[str], Path]
TOKENS = 2000  # Of which a multiple of 128 makes 2048 rows. The config counts 523.


@pytest.fixture
def checkpoint(made_once: MadeOnce) -> Checkpoint:
    return lambda name: made_once(f"family_{name}", partial(make, name))


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def grown(source: Path) -> LanguageModel:
    """A model whose vocabulary grew in training: every row of it is a token's, or padding that is not zero."""
    model = build_model(source, import_weights=True, vocab_size=TOKENS)
    with torch.no_grad():
        for weight in held(model).values():
            weight.normal_()
    return model


def held(model: LanguageModel) -> dict[str, torch.Tensor]:
    """The rows of the embedding and of the output layer, which may be the same."""
    embedding = model.embedding.word_embeddings.weight
    return {"embed": embedding, "head": embedding if model.output_layer.weight is None else model.output_layer.weight}


def vocabulary(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: it for name, it in tensors.items() if name.endswith(("embed_tokens.weight", "head.weight"))}


# Untied; tied; with copies in a layer of multi-token prediction; and beside a vision model.
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_tied", "deepseek_v3", "qwen3_vl_tied"])
def test_a_vocabulary_that_grew_is_refused_or_written_whole(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(family)
    model = grown(source)
    with refused(ShapeError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, source, tmp_path / "out")
    assert "embedding.word_embeddings.weight" in {offender.parameter for offender in caught.value.offenders}
    assert "has 2048 rows, 1525 more than the 523" in str(caught.value)

    export_mcore_gpt_to_hf(quantize(model, "w4a16_nvfp4", source), source, tmp_path / "out", vocab_size=TOKENS)

    config, written = config_of(tmp_path / "out"), vocabulary(read(tmp_path / "out"))
    assert config.get("text_config", config)["vocab_size"] == TOKENS
    assert written.keys() == vocabulary(read(source)).keys()
    for name, tensor in written.items():
        assert same_bytes(tensor, held(model)["embed" if "embed" in name else "head"][:TOKENS])
    assert verify_checkpoint(tmp_path / "out").ok


def test_transformers_reads_the_grown_vocabulary(checkpoint: Checkpoint, tmp_path: Path) -> None:
    export_mcore_gpt_to_hf(grown(checkpoint("qwen3")), checkpoint("qwen3"), tmp_path / "out", vocab_size=TOKENS)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.tensor([[1, TOKENS - 1]])).logits
    assert logits.shape[-1] == TOKENS


def test_a_stream_is_held_to_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model, source = grown(checkpoint("qwen3_moe")), checkpoint("qwen3_moe")
    stream = partial(export_hf_weights_quant, model, source, quant_format="w4a16_nvfp4")
    with refused(ShapeError, tmp_path):
        stream()
    assert dict(stream(vocab_size=TOKENS))["lm_head.weight"].shape[0] == TOKENS


@pytest.mark.parametrize("tokens", [100, 523, 2048])
def test_any_number_of_tokens_that_the_model_has_is_written(
    tokens: int, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    export_mcore_gpt_to_hf(grown(checkpoint("qwen3")), checkpoint("qwen3"), tmp_path / "out", vocab_size=tokens)
    assert {len(tensor) for tensor in vocabulary(read(tmp_path / "out")).values()} == {tokens}
    assert config_of(tmp_path / "out")["vocab_size"] == tokens


def test_more_tokens_than_the_model_has_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3")
    with refused(ShapeError, tmp_path):
        export_mcore_gpt_to_hf(grown(source), source, tmp_path / "out", vocab_size=2049)
    shrunk = build_model(source, vocab_size=300)
    with refused(ShapeError, tmp_path):
        export_mcore_gpt_to_hf(shrunk, source, tmp_path / "out")
    with refused(ArgumentError, tmp_path):
        export_mcore_gpt_to_hf(shrunk, source, tmp_path / "out", vocab_size=0)


def test_layers_that_the_config_does_not_count_are_refused_or_dropped(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("deepseek_v3")
    model = build_model(source, import_weights=True)
    uncounted = edited_source(source, tmp_path / "hf", num_nextn_predict_layers=0)
    with refused(MappingError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, uncounted, tmp_path / "out")
    assert [offender.parameter for offender in caught.value.offenders] == ["mtp.layers.0"]
    assert "num_nextn_predict_layers" in caught.value.remedy
    export_mcore_gpt_to_hf(model, uncounted, tmp_path / "out", drop_mtp=True)
    # Of a config that counts them, too.
    export_mcore_gpt_to_hf(model, source, tmp_path / "counted", drop_mtp=True)
    expected = {name: it for name, it in read(source).items() if not name.startswith("model.layers.3.")}
    for out in (tmp_path / "out", tmp_path / "counted"):
        written = read(out)
        assert written.keys() == expected.keys()
        assert all(same_bytes(written[name], expected[name]) for name in expected)
        assert config_of(out)["num_nextn_predict_layers"] == 0


def test_an_architecture_without_such_layers_says_so(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe")
    said = megatron_config(read_source_config(source))
    model = build.build_model(replace(said, transformer={**said.transformer, "mtp_num_layers": 2}))
    with refused(MappingError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, source, tmp_path / "out")
    assert [offender.parameter for offender in caught.value.offenders] == ["mtp.layers.0", "mtp.layers.1"]
    assert "drop_mtp" in caught.value.remedy
    assert "Set num" not in caught.value.remedy
    export_mcore_gpt_to_hf(model, source, tmp_path / "out", drop_mtp=True)
    assert read(tmp_path / "out").keys() == read(source).keys()
    assert "num_nextn_predict_layers" not in config_of(tmp_path / "out")
    stream = dict(export_hf_weights_quant(model, source, quant_format="w4a16_nvfp4", drop_mtp=True))
    assert read(source).keys() <= stream.keys()


@pytest.mark.parametrize("family", ["qwen3_next", "nemotron_h_moe", "qwen3_5_vl"])
def test_what_a_source_has_of_them_is_dropped_likewise(family: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint(family)
    model = quantize(build_model(source, import_weights=True), "w4a16_nvfp4", source)
    export_mcore_gpt_to_hf(model, source, tmp_path / "out", drop_mtp=True)
    assert not [name for name in read(tmp_path / "out") if name.startswith("mtp.")]
    assert verify_checkpoint(tmp_path / "out").ok


@pytest.mark.parametrize(("family", "quantized"), [("deepseek_v3", False), ("deepseek_v3", True), ("qwen3_5_vl", True)])
def test_a_checkpoints_layers_are_dropped_as_the_models(
    family: str, quantized: bool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(family)
    model = build_model(source, import_weights=True)
    if quantized:
        quantize(model, "w4a16_nvfp4", source)
    save_checkpoint(model, tmp_path / "saved", extra={})
    uncounted = source
    if family == "deepseek_v3":
        uncounted = edited_source(source, tmp_path / "hf", num_nextn_predict_layers=0)
    export_mcore_gpt_to_hf(model, source, tmp_path / "expected", drop_mtp=True)
    for number, hf in enumerate((source, uncounted)):
        export_checkpoint(tmp_path / "saved", tmp_path / f"out{number}", hf, drop_mtp=True)
        found, expected = read(tmp_path / f"out{number}"), read(tmp_path / "expected")
        assert found.keys() == expected.keys()
        assert [name for name in expected if not same_bytes(found[name], expected[name])] == []
        assert config_of(tmp_path / f"out{number}") == config_of(tmp_path / "expected")


@pytest.mark.parametrize("choices", [{"preset": "experts_only", "input_scale": 1.0}, {"preset": "omlp_only"}])
def test_a_checkpoint_is_quantized_by_the_same_choices(
    choices: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("qwen3_moe")
    save_checkpoint(build_model(source, import_weights=True), tmp_path / "saved", extra={})
    name = "nvfp4" if "input_scale" in choices else "w4a16_nvfp4"
    export_checkpoint(tmp_path / "saved", tmp_path / "out", source, name, **choices)
    quantize_checkpoint(source, tmp_path / "expected", name, **choices)
    assert_same_export(tmp_path / "out", tmp_path / "expected")
