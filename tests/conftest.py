"""Small real checkpoints, written by transformers and by plain ModelOpt, and Megatron's parallel state of one rank."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.families.cases import DECODER, make
from tests.made_once import MadeOnce
from tests.one_event_loop import share_event_loop

# A test says whether something is right, not how long it took on a busy machine.
settings.register_profile("quantplug", deadline=None)
settings.load_profile("quantplug")

share_event_loop()

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


def _save(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, directory: Path, seed: int = 20, **how: object
) -> None:
    model = model_class(config)
    _fill(model, seed)
    model.to(torch.bfloat16).save_pretrained(directory, **how)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that the workers, which take file after file, end together with short ones."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """From here on the garbage collector leaves alone what importing the libraries and collecting the tests made."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    return MadeOnce.of_run(tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_qwen3_moe_dir(made_once: MadeOnce) -> Path:
    """Qwen3-MoE in bf16: 2 layers, 8 experts, 2 of them for a token."""
    return made_once("qwen3_moe", partial(_save, Qwen3MoeForCausalLM, Qwen3MoeConfig(**MOE_SIZES)))


@pytest.fixture(scope="session")
def one_layer_dir(made_once: MadeOnce) -> Path:
    """Qwen3-MoE in bf16 of one layer and 4 experts, for models that are built again and again."""
    config = Qwen3MoeConfig(**{**MOE_SIZES, "num_hidden_layers": 1, "num_experts": 4})
    return made_once("one_layer", partial(_save, Qwen3MoeForCausalLM, config))


@pytest.fixture(scope="session")
def tiny_qwen3_mixed_dir(made_once: MadeOnce) -> Path:
    """Qwen3-MoE in bf16 with 4 layers, the second of them dense, in shards of at most 400 kB."""
    config = Qwen3MoeConfig(**{**MOE_SIZES, "num_hidden_layers": 4}, mlp_only_layers=[1])
    make_mixed = partial(_save, Qwen3MoeForCausalLM, config, seed=21, max_shard_size="400KB")
    return made_once("qwen3_mixed", make_mixed)


@pytest.fixture(scope="session")
def divisible_dir(made_once: MadeOnce) -> Path:
    """Qwen3-MoE in bf16 of which every weight, but not every half of one, divides by 128."""
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "moe_intermediate_size": 256,
        "head_dim": 64,
        "num_experts": 4,
    }
    return made_once("divisible", partial(_save, Qwen3MoeForCausalLM, Qwen3MoeConfig(**{**MOE_SIZES, **sizes})))


@pytest.fixture(scope="session")
def tiny_qwen3_dir(made_once: MadeOnce) -> Path:
    """Dense Qwen3 in bf16 with an output layer of its own."""
    return made_once("qwen3", partial(_save, Qwen3ForCausalLM, Qwen3Config(**DECODER, tie_word_embeddings=False)))


@pytest.fixture(scope="session")
def tiny_qwen3_tied_dir(made_once: MadeOnce) -> Path:
    """Dense Qwen3 in bf16 whose output layer is its embedding."""
    return made_once("qwen3_tied", partial(_save, Qwen3ForCausalLM, Qwen3Config(**DECODER, tie_word_embeddings=True)))


@pytest.fixture(scope="session")
def tiny_gpt_oss_dir(made_once: MadeOnce) -> Path:
    """GPT-OSS in bf16: 3 layers, the 8 experts of each in one tensor."""
    return made_once("family_gpt_oss", partial(make, "gpt_oss"))


@pytest.fixture(scope="session")
def tiny_llama4_dir(made_once: MadeOnce) -> Path:
    """Llama 4's decoder in bf16: the experts of a layer in one tensor, quantized one by one."""
    return made_once("family_llama4_text", partial(make, "llama4_text"))


@pytest.fixture(scope="session")
def tiny_llama4_with_vision_dir(made_once: MadeOnce) -> Path:
    """Llama 4 with vision in bf16: the experts of a layer in one tensor, which servers load quantized."""
    return made_once("family_llama4", partial(make, "llama4"))


@pytest.fixture(scope="session")
def plain_checkpoints(made_once: MadeOnce) -> Path:
    """The Megatron checkpoints of plain_modelopt.py, written by a process that knows ModelOpt's own wrappers only."""

    def make_all(directory: Path) -> None:
        script = Path(__file__).with_name("plain_modelopt.py")
        directory.mkdir()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
        command = [sys.executable, str(script), str(directory)]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert run.returncode == 0, run.stderr

    return made_once("plain", make_all)


@pytest.fixture(scope="session")
def sources(made_once: MadeOnce, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Hugging Face checkpoints by name, made when first asked for. Nobody may change them."""
    from tests.export.made import make_source

    def source(name: str) -> Path:
        if name == "mixed":
            return request.getfixturevalue("tiny_qwen3_mixed_dir")
        return made_once(f"source_{name}", lambda directory: make_source(name, directory))

    return source


@pytest.fixture(scope="session")
def exports(made_once: MadeOnce, sources: Callable[[str], Path]) -> Callable[..., Path]:
    """Quantized exports by source and scheme, made when first asked for. Nobody may change them."""
    from quantplug.megatron.models.build import LayerSpec
    from tests.export.made import make_export

    def export(name: str, scheme: str, layer_spec: LayerSpec = LayerSpec.TRANSFORMER_ENGINE) -> Path:
        return made_once(
            f"export_{name}_{scheme}_{layer_spec.name}",
            lambda directory: make_export(sources(name), scheme, layer_spec, directory),
        )

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
