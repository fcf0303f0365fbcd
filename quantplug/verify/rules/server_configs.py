"""Configs that a server's own classes stop at, or of which they build another model: found by running them.

transformers 5 writes a config anew without settings that publishers' configs have, and for which SGLang 0.5.23 has no
default (docs/readers.md).
"""

from collections.abc import Iterator

from quantplug.checkpoint.untrusted.json_reader import Json, as_object, as_texts
from quantplug.mappings.layouts import ModelDimensions
from quantplug.printable import shown
from quantplug.verify.checks import Check
from quantplug.verify.inventory.modules import Inventory
from quantplug.verify.report import Finding, warning


def sglang_config(inventory: Inventory) -> Iterator[Finding]:
    """Settings without which SGLang stops, or by which it builds another model."""
    known = inventory.known
    if known is None:
        return
    config, nested = inventory.checkpoint.config, known.family.nested
    settings, where = (config, "") if nested is None else (as_object(config.get(nested)), f"{nested}.")
    for asked in (_of_delta_nets, _of_qwen3_next, _of_latent_experts, _of_mamba):
        for name, message in asked(settings, known.dims):
            if name in known.family.server_settings:  # Which all servers ask for, and another rule.
                continue
            yield warning(Check.SGLANG, f"config.json {where}{name}", message)


_Asked = Iterator[tuple[str, str]]  # names of settings, and what is wrong with each


def _of_delta_nets(settings: Json, dims: ModelDimensions) -> _Asked:
    """The layers with attention, by one number alone (`layers_block_type` of configs/qwen3_next.py)."""
    if dims.delta is None:
        return
    name, attention = "full_attention_interval", dims.attention_layers
    every = attention[0] + 1 if attention else dims.num_layers + 1
    if attention != tuple(range(every - 1, dims.num_layers, every)):
        yield "layer_types", "SGLang 0.5.23 builds attention in every Nth layer, and here it is in others"
    elif name not in settings:
        yield name, f"is not set: SGLang 0.5.23 stops; set it to {every}, which is what layer_types says"
    elif settings[name] != every:
        yield name, f"is {shown(settings[name])}: SGLang 0.5.23 goes by it, and layer_types says {every}"


def _of_qwen3_next(settings: Json, dims: ModelDimensions) -> _Asked:
    """What qwen3_next.py takes from the top of the config, and its class has another default of."""
    rope = as_object(settings.get("rope_parameters"))
    if settings.get("model_type") != "qwen3_next":  # Qwen3.5's model looks into `rope_parameters`.
        return
    for name, default in (("rope_theta", 10000), ("partial_rotary_factor", 0.25)):
        if name not in settings and rope.get(name, default) != default:
            said = shown(rope[name])
            yield name, f"is {said} in rope_parameters alone: SGLang 0.5.23 takes {default}; set it beside these too"


def _of_latent_experts(settings: Json, dims: ModelDimensions) -> _Asked:
    """What `_is_layer_sparse` and the router of deepseek_v2.py ask for without a default."""
    if dims.latent is None or not dims.num_experts:
        return
    for name, usual in (("moe_layer_freq", "1"), ("scoring_func", "softmax")):
        if name not in settings:
            yield name, f"is not set: SGLang 0.5.23 stops; set it to {usual}"


def _of_mamba(settings: Json, dims: ModelDimensions) -> _Asked:
    """The words of configs/nemotron_h.py, and its own name of the groups, of which it otherwise builds 8."""
    if dims.mamba is None:
        return
    words = set(as_texts(settings.get("layers_block_type"))) - {"mamba", "attention", "mlp", "moe"}
    if words:
        message = f"SGLang 0.5.23 stops at {', '.join(sorted(words))}; say the layers by hybrid_override_pattern alone"
        yield "layers_block_type", message
    if "mamba_n_groups" not in settings and dims.mamba.num_groups != 8:
        yield "mamba_n_groups", f"is not set: SGLang 0.5.23 builds 8 groups; set it to {dims.mamba.num_groups}"


RULES = (sglang_config,)
