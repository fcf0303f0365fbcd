"""How to leave weights out with all that goes with them, in the words of the way that a user came by."""

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from quantplug.mappings.hybrid_pattern import in_hybrid_model
from quantplug.mappings.keys import ParamKey, fill
from quantplug.mappings.layouts import ModelDimensions
from quantplug.selection.patterns import exclude_patterns
from quantplug.selection.together import Rows, fused_with

LeaveOut = Callable[[Iterable[ParamKey], Rows, ModelDimensions], str]
"""Says how to leave weights out, given all that are quantized: one function for every way to quantize."""

# The advice to leave out all weights would be the advice not to quantize.
NONE_LEFT = "Choose another format: no linear would be left in this one."


def quantizer_rule(module: str) -> dict[str, object]:
    """The rule of a `quant_cfg` that turns a weight's quantizers off, by its name in Megatron or a pattern of it.

    Of an expert's weight it is the rule of all experts: servers load them alike, and Megatron spells them in two ways.
    """
    # What a layer of multi-token prediction has inside is called otherwise by Megatron-Core 0.19, and by a HybridModel.
    module = module.replace(".transformer_layer.", ".")
    mlp, _, in_experts = module.partition(".experts.")
    holder = f"{mlp}.experts" if in_experts else module.rpartition(".")[0]
    return {"quantizer_name": f"*{holder}.*_quantizer*", "enable": False}


def quantizer_rules(modules: Iterable[str]) -> str:
    """The rules of several weights, each once, as a user writes them."""
    return ", ".join(dict.fromkeys(str(quantizer_rule(module)) for module in modules))


def by_exclude(keys: Iterable[ParamKey], rows: Rows, dims: ModelDimensions) -> str:
    """Advice for `quantplug quantize` and its function in Python: the options to add."""
    patterns = exclude_patterns(keys, rows, dims)
    if rows.keys() <= fused_with(keys, rows, dims):
        return NONE_LEFT
    options = " ".join(f"--exclude {shlex.quote(pattern)}" for pattern in patterns)
    return f"Leave out these and what servers fuse with them: add {options}"


def by_rules(keys: Iterable[ParamKey], rows: Rows, dims: ModelDimensions) -> str:
    """Advice for a model whose quantizers a `quant_cfg` has placed: the rules to append."""
    return _rules(_megatron_names(keys, rows, dims))


def by_rules_of_pairs(keys: Iterable[ParamKey], rows: Rows, dims: ModelDimensions) -> str:
    """The same for a `HybridModel`, whose layers have other numbers."""
    return _rules(_megatron_names(keys, rows, dims, lambda key: fill(*in_hybrid_model(key.module, key.layer), None)))


def _rules(names: Iterable[str]) -> str:
    return f"Append to quant_cfg: {quantizer_rules(names)}." if names else NONE_LEFT


def by_checker(keys: Iterable[ParamKey], rows: Rows, dims: ModelDimensions) -> str:
    """Advice for a stream: for which names the checker should answer False."""
    names = _megatron_names(keys, rows, dims)
    return f"Let quantization_checker answer False for {', '.join(names)}." if names else NONE_LEFT


def _megatron_names(
    keys: Iterable[ParamKey],
    rows: Rows,
    dims: ModelDimensions,
    name_of: Callable[[ParamKey], str] = lambda key: key.name,
) -> Sequence[str]:
    """Megatron's names of weights and of all that goes with them, or patterns; none where no weight would be left.

    Where no other layer needs the module quantized, one pattern for all layers says it; else each layer is named, of
    experts all of the layer at once.
    """
    wanted = fused_with(keys, rows, dims)
    others = {key.module for key in rows.keys() - wanted}
    names = (name_of(replace(key, expert=None)) if key.module in others else key.module for key in sorted(wanted))
    return () if rows.keys() <= wanted else tuple(dict.fromkeys(names))
