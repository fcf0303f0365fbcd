"""Small real checkpoints, written by transformers and by plain ModelOpt, and Megatron's parallel state of one rank."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.families.cases import DECODER, make

# A test says whether something is right, not how long it took on a busy machine.
settings.register_profile("quantplug", deadline=None)
settings.load_profile("quantplug")

MOE_SIZES = {
    **DECODER,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
}


def _fill(model: PreTrainedModel, seed: int) -> None:
    """Random weights that keep activations near 1, and norm weights that are not 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)


def _save(model: PreTrainedModel, directory: Path) -> Path:
    _fill(model, seed=20)
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_qwen3_moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-MoE in bf16: 2 layers, 8 experts, 2 of them for a token."""
    return _save(Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE_SIZES)), tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture(scope="session")
def tiny_qwen3_mixed_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-MoE in bf16 with 4 layers, the second of them dense, in shards of at most 400 kB."""
    config = Qwen3MoeConfig(**{**MOE_SIZES, "num_hidden_layers": 4}, mlp_only_layers=[1])
    model = Qwen3MoeForCausalLM(config)
    directory = tmp_path_factory.mktemp("qwen3_mixed")
    _fill(model, seed=21)
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size="400KB")
    return directory


@pytest.fixture(scope="session")
def divisible_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-MoE in bf16 of which every weight, but not every half of one, divides by 128."""
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "moe_intermediate_size": 256,
        "head_dim": 64,
        "num_experts": 4,
    }
    return _save(Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**MOE_SIZES, **sizes})), tmp_path_factory.mktemp("divisible"))


@pytest.fixture(scope="session")
def tiny_qwen3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense Qwen3 in bf16 with an output layer of its own."""
    model = Qwen3ForCausalLM(Qwen3Config(**DECODER, tie_word_embeddings=False))
    return _save(model, tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def tiny_qwen3_tied_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense Qwen3 in bf16 whose output layer is its embedding."""
    model = Qwen3ForCausalLM(Qwen3Config(**DECODER, tie_word_embeddings=True))
    return _save(model, tmp_path_factory.mktemp("qwen3_tied"))


@pytest.fixture(scope="session")
def tiny_gpt_oss_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-OSS in bf16: 3 layers, the 8 experts of each in one tensor."""
    return make("gpt_oss", tmp_path_factory.mktemp("gpt_oss"))


@pytest.fixture(scope="session")
def plain_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Megatron checkpoints of plain_modelopt.py, written by a process that knows ModelOpt's own wrappers only."""
    script, directory = Path(__file__).with_name("plain_modelopt.py"), tmp_path_factory.mktemp("plain")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, str(script), str(directory)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    return directory


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Hugging Face checkpoints by name, made when first asked for. Nobody may change them."""
    from tests.export.made import make_source

    made: dict[str, Path] = {}

    def source(name: str) -> Path:
        if name == "mixed":
            return request.getfixturevalue("tiny_qwen3_mixed_dir")
        if name not in made:
            made[name] = make_source(name, tmp_path_factory.mktemp(name) / "hf")
        return made[name]

    return source


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory, sources: Callable[[str], Path]) -> Callable[..., Path]:
    """Quantized exports by source and scheme, made when first asked for. Nobody may change them."""
    from quantplug.megatron.build import LayerSpec
    from tests.export.made import make_export

    made: dict[tuple[str, str, LayerSpec], Path] = {}

    def export(name: str, scheme: str, layer_spec: LayerSpec = LayerSpec.TRANSFORMER_ENGINE) -> Path:
        key = (name, scheme, layer_spec)
        if key not in made:
            directory = tmp_path_factory.mktemp(f"{name}_{scheme}") / "export"
            made[key] = make_export(sources(name), scheme, layer_spec, directory)
        return made[key]

    return export


@pytest.fixture
def single_rank() -> Iterator[None]:
    """Megatron's parallel state of one rank."""
    from tests.export.checkpoints import one_rank

    with one_rank():
        yield


@pytest.fixture
def no_ranks() -> None:
    """No process group, as a process begins: other tests leave theirs behind."""
    from quantplug.megatron.parallel import destroy_parallel

    destroy_parallel()
