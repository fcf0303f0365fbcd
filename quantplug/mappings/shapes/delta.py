"""Shapes of the tensors of gated delta nets, by kind of tensor, from their sizes and the hidden size."""

from collections.abc import Callable, Mapping

from quantplug.mappings.layouts import DeltaSizes

# Queries and keys have `key_rows` each, values and gates `value_rows` each; betas and alphas one row a head of values.
# The first two are Qwen3-Next's parts of the input projection, the next four Qwen3.5's.
DELTA_SHAPES: Mapping[str, Callable[[DeltaSizes, int], tuple[int, ...]]] = {
    "linear_attn.in_proj_qkvz": lambda net, hidden: (2 * (net.key_rows + net.value_rows), hidden),
    "linear_attn.in_proj_ba": lambda net, hidden: (2 * net.value_heads, hidden),
    "linear_attn.in_proj_qkv": lambda net, hidden: (2 * net.key_rows + net.value_rows, hidden),
    "linear_attn.in_proj_z": lambda net, hidden: (net.value_rows, hidden),
    "linear_attn.in_proj_b": lambda net, hidden: (net.value_heads, hidden),
    "linear_attn.in_proj_a": lambda net, hidden: (net.value_heads, hidden),
    "linear_attn.conv1d": lambda net, hidden: (2 * net.key_rows + net.value_rows, 1, net.kernel),
    "linear_attn.A_log": lambda net, hidden: (net.value_heads,),
    "linear_attn.dt_bias": lambda net, hidden: (net.value_heads,),
    "linear_attn.norm": lambda net, hidden: (net.value_dim,),
    "linear_attn.out_proj": lambda net, hidden: (hidden, net.value_rows),
}
