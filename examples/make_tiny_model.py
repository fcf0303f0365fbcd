"""Makes a small real Hugging Face checkpoint of an architecture that quantplug converts, for demos and tests.

It is written by transformers' own `save_pretrained`, tokenizer and generation settings included, and it is awkward on
purpose: no size is a power of two (hidden 160, head size 48, expert width 96, vocabulary 523), the weights have heavy
tails, the norm weights are not 1, and in each layer of a mixture of experts one expert is all zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

HIDDEN_SIZE = 160
HEAD_DIM = 48
ATTENTION_HEADS = 4
KEY_VALUE_HEADS = 2
EXPERT_WIDTH = 96
SHARED_EXPERT_WIDTH = 288
DENSE_WIDTH = 224
EXPERTS_PER_TOKEN = 2
VOCABULARY = 523
ZERO_EXPERT = 1

# Student's t with this many degrees of freedom: tails heavy enough for outliers, variance finite.
TAIL_DEGREES_OF_FREEDOM = 4.0
WEIGHT_SCALE = 0.02

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SENTENCES = (
    "A mixture of experts sends every token to a few of its feed-forward networks.",
    "The router scores the experts, and the best two of them answer for this token.",
    "Four-bit floating point keeps one scale for each block of sixteen weights.",
    "A scale that is too small saturates; a scale that is too large loses the small values.",
    "The quick brown fox jumps over the lazy dog, and 0123456789 is how we count.",
    "Grüße aus der Zahlenwelt: naïve Rundung ist selten die beste Wahl.",
)


class Architecture(StrEnum):
    """Architectures to choose from, by transformers' `model_type` with a dash."""

    QWEN3_MOE = "qwen3-moe"
    QWEN3 = "qwen3"
    QWEN2_MOE = "qwen2-moe"
    QWEN2 = "qwen2"
    LLAMA = "llama"
    MIXTRAL = "mixtral"
    GPT_OSS = "gpt-oss"


class Dtype(StrEnum):
    """Dtypes of the saved weights."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"

    @property
    def torch(self) -> torch.dtype:
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[self.value]


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `VOCABULARY` entries, trained on the sentences above."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=END_OF_TEXT)
    fast.chat_template = CHAT_TEMPLATE
    return fast


@dataclass(frozen=True)
class Recipe:
    """What to make for an architecture.

    Attributes:
        experts: Its name of the number of experts; None in a dense model.
        settings: Beyond those of every decoder.
    """

    config: type[PreTrainedConfig]
    experts: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


ROUTED = {"moe_intermediate_size": EXPERT_WIDTH, "num_experts_per_tok": EXPERTS_PER_TOKEN}
RECIPES = {
    Architecture.QWEN3_MOE: Recipe(Qwen3MoeConfig, "num_experts", {**ROUTED, "norm_topk_prob": True}),
    Architecture.QWEN3: Recipe(Qwen3Config),
    Architecture.QWEN2_MOE: Recipe(
        Qwen2MoeConfig, "num_experts", {**ROUTED, "shared_expert_intermediate_size": SHARED_EXPERT_WIDTH}
    ),
    Architecture.QWEN2: Recipe(Qwen2Config),
    Architecture.LLAMA: Recipe(LlamaConfig),
    Architecture.MIXTRAL: Recipe(
        MixtralConfig,
        "num_local_experts",
        {"intermediate_size": EXPERT_WIDTH, "num_experts_per_tok": EXPERTS_PER_TOKEN},
    ),
    Architecture.GPT_OSS: Recipe(
        GptOssConfig,
        "num_local_experts",
        {"intermediate_size": EXPERT_WIDTH, "num_experts_per_tok": EXPERTS_PER_TOKEN, "sliding_window": 32},
    ),
}


def build_model(architecture: Architecture, layers: int, experts: int, tie_embeddings: bool) -> PreTrainedModel:
    """The model in FP32 with transformers' own initial weights."""
    recipe = RECIPES[architecture]
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": DENSE_WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": ATTENTION_HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tie_embeddings,
        **recipe.settings,
        **({recipe.experts: experts} if recipe.experts else {}),
    }
    return AutoModelForCausalLM.from_config(recipe.config(**settings))


def draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Fills every parameter: heavy-tailed matrices, norm weights around 1, one expert of each layer all zero."""
    torch.manual_seed(seed)
    student = torch.distributions.StudentT(TAIL_DEGREES_OF_FREEDOM)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.copy_(student.sample(parameter.shape) * WEIGHT_SCALE)
            # In memory, transformers 5 holds all experts of a layer in one tensor [experts, ..., ...].
            if ".experts." in name:
                parameter[ZERO_EXPERT].zero_()


def make_tiny_model(
    out: Annotated[Path, typer.Option(help="Directory to write; must be empty or not exist.")],
    architecture: Annotated[Architecture, typer.Option(help="What to make.")] = Architecture.QWEN3_MOE,
    tie_embeddings: Annotated[bool, typer.Option(help="Share the embedding with the output layer.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of all weights.")] = 0,
    layers: Annotated[int, typer.Option(min=1, help="Transformer layers.")] = 2,
    experts: Annotated[int, typer.Option(min=2, help="Routed experts of a layer, in a mixture of experts.")] = 8,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the saved weights.")] = Dtype.BFLOAT16,
) -> None:
    """Writes a small real Hugging Face checkpoint with random weights, a tokenizer and generation settings."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise typer.BadParameter(f"{out} is not an empty directory", param_hint="--out")
    tokenizer = train_tokenizer()
    model = build_model(architecture, layers, experts, tie_embeddings)
    draw_weights(model, seed)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(dtype.torch).save_pretrained(out)
    tokenizer.save_pretrained(out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    Console().print(f"{architecture.value}, {parameters:,} parameters, {dtype.value}: {out}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(make_tiny_model)
