"""Shapes of what layers of hybrid decoders have, by kind of tensor (`kinds.kind_of`).

Nemotron-H names every layer's one module `mixer`, whatever it is.
"""

from collections.abc import Callable, Mapping

from quantplug.mappings.layouts import ModelDimensions

Shape = tuple[int | None, ...]
Width = Callable[[ModelDimensions], int | None]


# Mamba-2, arXiv 2405.21060, section 7: one projection to z, x, B, C and dt; the convolution runs over x, B and C.
def _projected(dims: ModelDimensions) -> int | None:
    return 2 * dims.mamba.inner + 2 * dims.mamba.states + dims.mamba.num_heads if dims.mamba else None


def _convolved(dims: ModelDimensions) -> Shape:
    return (dims.mamba.inner + 2 * dims.mamba.states, 1, dims.mamba.kernel) if dims.mamba else (None, 1, None)


def _heads(dims: ModelDimensions) -> Shape:
    return (dims.mamba.num_heads if dims.mamba else None,)


def _inner(dims: ModelDimensions) -> int | None:
    return dims.mamba.inner if dims.mamba else None


def _hidden(dims: ModelDimensions) -> int | None:
    return dims.hidden_size


# Nemotron 3 Super's routed experts read and write a latent; its shared experts work on the hidden size.
def _expert_input(dims: ModelDimensions) -> int | None:
    return dims.expert_latent or dims.hidden_size


def _feed_forward(name: str, width: Width, outside: Width = _hidden) -> dict[str, Callable[[ModelDimensions], Shape]]:
    return {
        f"{name}.up_proj": lambda dims: (width(dims), outside(dims)),
        f"{name}.down_proj": lambda dims: (outside(dims), width(dims)),
    }


def _attention(name: str) -> dict[str, Callable[[ModelDimensions], Shape]]:
    def keys(dims: ModelDimensions) -> Shape:
        return dims.num_query_groups * dims.head_dim, dims.hidden_size

    return {
        f"{name}.q_proj": lambda dims: (dims.num_attention_heads * dims.head_dim, dims.hidden_size),
        f"{name}.k_proj": keys,
        f"{name}.v_proj": keys,
        f"{name}.o_proj": lambda dims: (dims.hidden_size, dims.num_attention_heads * dims.head_dim),
    }


HYBRID_SHAPES: Mapping[str, Callable[[ModelDimensions], Shape]] = {
    **dict.fromkeys(("embeddings", "embedding"), lambda dims: (dims.vocab_size, dims.hidden_size)),
    "norm_f": lambda dims: (dims.hidden_size,),
    "mixer.in_proj": lambda dims: (_projected(dims), dims.hidden_size),
    "mixer.conv1d": _convolved,
    **dict.fromkeys(("mixer.A_log", "mixer.D", "mixer.dt_bias"), _heads),
    "mixer.norm": lambda dims: (_inner(dims),),
    "mixer.out_proj": lambda dims: (dims.hidden_size, _inner(dims)),
    **_attention("mixer"),
    **_feed_forward("mixer", lambda dims: dims.mlp_width),
    "mixer.gate": lambda dims: (dims.num_experts, dims.hidden_size),
    "mixer.gate.e_score_correction_bias": lambda dims: (dims.num_experts,),
    "mixer.fc1_latent_proj": lambda dims: (dims.expert_latent, dims.hidden_size),
    "mixer.fc2_latent_proj": lambda dims: (dims.hidden_size, dims.expert_latent),
    **_feed_forward("mixer.experts", lambda dims: dims.expert_width, _expert_input),
    **_feed_forward("mixer.shared_experts", lambda dims: dims.shared_width),
}
