"""Shapes that follow from the sizes in config.json, by kind of tensor (`kinds.kind_of`)."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from quantplug.mappings.layouts import ModelDimensions, Option
from quantplug.mappings.shapes.delta import DELTA_SHAPES
from quantplug.mappings.shapes.hybrid import HYBRID_SHAPES

_NO_OTHERS: Mapping[str, "ShapeBySizes"] = MappingProxyType({})
Shape = tuple[int | None, ...]  # None: not said by the config


ShapeBySizes = Callable[[ModelDimensions], Shape]


def expected_shape(kind: str, dims: ModelDimensions, own: Mapping[str, ShapeBySizes] = _NO_OTHERS) -> Shape | None:
    """The shape of a tensor of this kind, such as `self_attn.q_proj.weight`; None where the config does not say.

    Args:
        own: Shapes in which a family differs from others, as in `Family.shapes`.
    """
    # A weight and its bias have one row of the table: the bias is as long as the weight has rows.
    name = kind.removesuffix(".weight").removesuffix(".bias")
    # Only in models that have the sizes: elsewhere a tensor of that name is not known, and is not judged.
    if name in own:
        return own[name](dims)[:1] if kind.endswith(".bias") else own[name](dims)
    if dims.delta is not None and name in DELTA_SHAPES:
        return DELTA_SHAPES[name](dims.delta, dims.hidden_size)
    wanted = _SHAPES.get(name)
    if wanted is None:
        return None
    return wanted(dims)[:1] if kind.endswith(".bias") else wanted(dims)


def fits(shape: Shape, wanted: Shape) -> bool:
    """Whether a shape is the expected one, as far as the config says it."""
    # None on the wanted side fits every size, but not another number of axes.
    return len(shape) == len(wanted) and all(other in (size, None) for size, other in zip(shape, wanted, strict=True))


def _hidden(dims: ModelDimensions) -> Shape:
    return (dims.hidden_size,)


def _vocabulary(dims: ModelDimensions) -> Shape:
    return dims.vocab_size, dims.hidden_size


def _router(dims: ModelDimensions) -> Shape:
    return dims.num_experts, dims.hidden_size


def _query_rows(dims: ModelDimensions) -> int:
    return dims.num_attention_heads * dims.head_dim


def _queries(dims: ModelDimensions) -> Shape:
    # With an output gate, as Qwen3-Next has it, the gate of every head is in the same projection.
    return _query_rows(dims) * (2 if Option.QUERY_GATE in dims.options else 1), dims.hidden_size


def _key_rows(dims: ModelDimensions) -> int:
    return dims.num_query_groups * dims.head_dim


def _output_columns(dims: ModelDimensions) -> int:
    return dims.num_attention_heads * (dims.latent.value_dim if dims.latent else dims.head_dim)


def _query_rank(dims: ModelDimensions) -> int | None:
    return dims.latent.query_rank if dims.latent else None


# DeepSeek-V2, arXiv 2405.04434, section 2.1: the latent of keys and values, then one rotated key for all heads.
def _latent_down(dims: ModelDimensions) -> Shape:
    return dims.latent.key_value_rank + dims.latent.rotary_dim if dims.latent else None, dims.hidden_size


def _latent_up(dims: ModelDimensions) -> Shape:
    if dims.latent is None:
        return None, None
    # `head_dim` includes the rotated entries of a key; the latent gives each head the others, and its values.
    unrotated = dims.head_dim - dims.latent.rotary_dim
    return dims.num_attention_heads * (unrotated + dims.latent.value_dim), dims.latent.key_value_rank


def _mlp(name: str, width: Callable[[ModelDimensions], int | None]) -> dict[str, Callable[[ModelDimensions], Shape]]:
    return {
        f"{name}.gate_proj": lambda dims: (width(dims), dims.hidden_size),
        f"{name}.up_proj": lambda dims: (width(dims), dims.hidden_size),
        f"{name}.down_proj": lambda dims: (dims.hidden_size, width(dims)),
    }


# Where a tensor holds all experts of a layer this is the shape of one expert's, not transposed.
_SHAPES: Mapping[str, Callable[[ModelDimensions], Shape]] = {
    "embed_tokens": _vocabulary,
    "lm_head": _vocabulary,
    "shared_head.head": _vocabulary,
    **dict.fromkeys(("norm", "input_layernorm", "post_attention_layernorm"), _hidden),
    **dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), _hidden),
    **dict.fromkeys(("pre_fc_norm_embedding", "pre_fc_norm_hidden"), _hidden),
    "fc": lambda dims: (dims.hidden_size, 2 * dims.hidden_size),
    "eh_proj": lambda dims: (dims.hidden_size, 2 * dims.hidden_size),
    "self_attn.q_norm": lambda dims: (dims.head_dim,),
    "self_attn.k_norm": lambda dims: (dims.head_dim,),
    "self_attn.q_proj": _queries,
    "self_attn.k_proj": lambda dims: (_key_rows(dims), dims.hidden_size),
    "self_attn.v_proj": lambda dims: (_key_rows(dims), dims.hidden_size),
    "self_attn.o_proj": lambda dims: (dims.hidden_size, _output_columns(dims)),
    "self_attn.q_a_proj": lambda dims: (_query_rank(dims), dims.hidden_size),
    "self_attn.q_a_layernorm": lambda dims: (_query_rank(dims),),
    "self_attn.q_b_proj": lambda dims: (_query_rows(dims), _query_rank(dims)),
    "self_attn.kv_a_proj_with_mqa": _latent_down,
    "self_attn.kv_a_layernorm": lambda dims: (dims.latent.key_value_rank if dims.latent else None,),
    "self_attn.kv_b_proj": _latent_up,
    "self_attn.sinks": lambda dims: (dims.num_attention_heads,),
    **dict.fromkeys(("mlp.gate", "mlp.router", "block_sparse_moe.gate"), _router),
    "mlp.shared_expert_gate": lambda dims: (1, dims.hidden_size),
    "mlp.gate.e_score_correction_bias": lambda dims: (dims.num_experts,),
    **_mlp("mlp", lambda dims: dims.mlp_width),
    **_mlp("mlp.experts", lambda dims: dims.expert_width),
    **_mlp("mlp.shared_experts", lambda dims: dims.shared_width),
    **_mlp("mlp.shared_expert", lambda dims: dims.shared_width),
    "feed_forward.router": _router,
    **_mlp("feed_forward", lambda dims: dims.mlp_width),
    **_mlp("feed_forward.experts", lambda dims: dims.expert_width),
    **_mlp("feed_forward.shared_expert", lambda dims: dims.shared_width),
    "feed_forward.experts.gate_up_proj": lambda dims: (dims.expert_width and 2 * dims.expert_width, dims.hidden_size),
    "mlp.experts.gate_up_proj": lambda dims: (dims.expert_width and 2 * dims.expert_width, dims.hidden_size),
    "block_sparse_moe.experts.w1": lambda dims: (dims.expert_width, dims.hidden_size),
    "block_sparse_moe.experts.w3": lambda dims: (dims.expert_width, dims.hidden_size),
    "block_sparse_moe.experts.w2": lambda dims: (dims.hidden_size, dims.expert_width),
    **HYBRID_SHAPES,
}
