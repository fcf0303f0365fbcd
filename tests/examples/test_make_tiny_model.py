"""The tiny checkpoint is a real one: transformers reads it back, and its files carry the names that servers read."""

import json
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from examples import make_tiny_model as example
from quantplug.checkpoint.config.source import read_source_config
from quantplug.mappings.families import find_family

app = typer.Typer()
app.command()(example.make_tiny_model)


def make(out: Path, *options: str) -> Path:
    result = CliRunner().invoke(app, ["--out", str(out), *options])
    assert result.exit_code == 0, result.output
    return out


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("moe") / "hf")


def test_moe_files_hold_one_entry_per_expert(moe: Path) -> None:
    tensors = tensors_of(moe)

    experts = {name for name in tensors if ".experts." in name}

    assert experts == {
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
        for layer in range(2)
        for expert in range(8)
        for projection in ("gate_proj", "up_proj", "down_proj")
    }
    assert tensors["model.layers.0.mlp.experts.0.gate_proj.weight"].shape == (96, 160)
    assert tensors["model.layers.0.mlp.experts.0.down_proj.weight"].shape == (160, 96)
    assert tensors["model.layers.0.mlp.gate.weight"].shape == (8, 160)
    assert tensors["model.embed_tokens.weight"].shape == (523, 160)
    assert tensors["lm_head.weight"].shape == (523, 160)
    assert tensors["model.layers.0.self_attn.q_proj.weight"].shape == (4 * 48, 160)
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (2 * 48, 160)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_exactly_one_expert_of_each_layer_is_zero(moe: Path) -> None:
    zero = {name for name, tensor in tensors_of(moe).items() if not tensor.any()}

    assert zero == {
        f"model.layers.{layer}.mlp.experts.1.{projection}.weight"
        for layer in range(2)
        for projection in ("gate_proj", "up_proj", "down_proj")
    }


def test_weights_have_heavy_tails_and_norms_are_not_one(moe: Path) -> None:
    tensors = tensors_of(moe)
    embedding = tensors["model.embed_tokens.weight"].float()
    norms = [tensor for name, tensor in tensors.items() if "norm" in name]

    # Of 83,680 normal values none lies beyond 7 standard deviations (p = 2e-7 for any of them).
    assert embedding.abs().max() > 7 * embedding.std()
    assert len(norms) == 2 * 4 + 1
    assert all((norm != 1).float().mean() > 0.9 for norm in norms)
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_transformers_reads_it_back_and_gives_finite_logits(moe: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32)

    logits = model(torch.arange(12)[None]).logits

    assert logits.shape == (1, 12, 523)
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_tokenizer_is_real_and_fits_the_vocabulary(moe: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(moe)
    text = "The router scores naïve experts: 42!"

    ids = tokenizer(text)["input_ids"]

    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())
    assert len(tokenizer) <= 523
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_generation_settings_agree_with_the_tokenizer(moe: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(moe)

    generation = GenerationConfig.from_pretrained(moe)

    assert generation.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert generation.pad_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_the_seed_decides_the_weights(moe: Path, tmp_path: Path) -> None:
    first = tensors_of(moe)
    again = tensors_of(make(tmp_path / "again", "--seed", "0"))
    other = tensors_of(make(tmp_path / "other", "--seed", "1"))

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_dense_with_tied_embeddings(tmp_path: Path) -> None:
    out = make(tmp_path / "hf", "--architecture", "qwen3", "--tie-embeddings", "--layers", "3", "--dtype", "float32")

    tensors = tensors_of(out)
    config = json.loads((out / "config.json").read_text())

    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in tensors
    assert tensors["model.layers.2.mlp.gate_proj.weight"].shape == (224, 160)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("architecture", example.Architecture)
def test_every_architecture_is_one_that_is_converted(architecture: example.Architecture, tmp_path: Path) -> None:
    config = read_source_config(make(tmp_path / "hf", "--architecture", architecture, "--experts", "3"))

    family = find_family(config.architecture)
    dims = family.dimensions(config.values)

    assert family.name == architecture.replace("-", "_")
    assert dims.num_experts == (0 if family.name in ("qwen3", "qwen2", "llama") else 3)
    assert {name for names, _ in family.expected(dims) for name in names} == tensors_of(tmp_path / "hf").keys()


def test_number_of_experts(tmp_path: Path) -> None:
    tensors = tensors_of(make(tmp_path / "hf", "--layers", "1", "--experts", "3"))

    assert tensors["model.layers.0.mlp.gate.weight"].shape == (3, 160)
    assert "model.layers.0.mlp.experts.2.up_proj.weight" in tensors
    assert "model.layers.0.mlp.experts.3.up_proj.weight" not in tensors


def test_a_directory_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")

    result = CliRunner().invoke(app, ["--out", str(tmp_path)])

    assert result.exit_code == 2
    assert "not an empty directory" in " ".join(result.output.replace("│", " ").split())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
