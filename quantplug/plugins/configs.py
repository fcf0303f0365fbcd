"""ModelOpt's configs by the public names of the formats, made complete for one model by the policy of selection."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
from modelopt.recipe import ModelOptPTQRecipe, load_recipe

from quantplug.checkpoint.config.file import ties_embeddings
from quantplug.checkpoint.config.source import read_source_config
from quantplug.checkpoint.reader import resolve_source
from quantplug.choices import Preset
from quantplug.errors import ArgumentError, Offender, UnsupportedQuantizationError
from quantplug.formats.names import KVCacheFormat, QuantFormat, Scheme, kv_cache_named, scheme_named
from quantplug.mappings.families import find_family
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.rows import Role, Scope, WeightMapping
from quantplug.mappings.table import Family
from quantplug.megatron.releases.hybrid import CONVOLUTION_IS_A_MODULE
from quantplug.plugins.rules.recipe_names import in_megatron
from quantplug.selection.advice import quantizer_rule
from quantplug.selection.output_layer import require_output_layer
from quantplug.selection.policy import (
    Decision,
    Kept,
    Policy,
    Reason,
    preset_named,
    refuse_nothing,
)

_NO_INPUTS = {"quantizer_name": "*input_quantizer", "enable": False}
# ModelOpt's stock configs leave multi-token prediction in high precision by this rule.
_NO_MTP = "mtp.*"
# And the output layer by these, one in Megatron-Core's words and one in those of Hugging Face.
_NO_LM_HEAD = ("*output_layer*", "*lm_head*")

# ModelOpt has no stock config of FP8 weights alone. Rules apply in order, so the one that turns inputs off is last.
_STOCK: Mapping[QuantFormat, Mapping[str, Any]] = {
    QuantFormat.W4A16_NVFP4: mtq.W4A16_NVFP4_CFG,
    QuantFormat.NVFP4: mtq.NVFP4_DEFAULT_CFG,
    QuantFormat.FP8: mtq.FP8_DEFAULT_CFG,
    QuantFormat.W8A16_FP8: {**mtq.FP8_DEFAULT_CFG, "quant_cfg": [*mtq.FP8_DEFAULT_CFG["quant_cfg"], _NO_INPUTS]},
    QuantFormat.FP8_BLOCKWISE: mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
    QuantFormat.FP8_DYNAMIC: mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    QuantFormat.INT4: mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
    QuantFormat.MXFP8: mtq.MXFP8_DEFAULT_CFG,
    QuantFormat.MXFP4: {**mtq.MXFP4_DEFAULT_CFG, "quant_cfg": [*mtq.MXFP4_DEFAULT_CFG["quant_cfg"], _NO_INPUTS]},
}
_NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
# As ModelOpt's own recipes have it (kv_fp8_cast.yaml, kv_fp8.yaml and those of NVFP4 in configs/ptq/units).
_KV_CACHE: Mapping[KVCacheFormat, dict[str, Any]] = {
    KVCacheFormat.FP8_CAST: {
        "quantizer_name": "*[kv]_bmm_quantizer",
        "cfg": {"num_bits": (4, 3), "use_constant_amax": True},
    },
    KVCacheFormat.FP8: {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": (4, 3)}},
    KVCacheFormat.NVFP4_CAST: {
        "quantizer_name": "*[kv]_bmm_quantizer",
        "cfg": {**_NVFP4, "use_constant_amax": True},
    },
    KVCacheFormat.NVFP4: {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": dict(_NVFP4)},
}


def recipe_cfg(recipe: str | Path) -> dict[str, Any]:
    """The config for `mtq.quantize` of a Megatron-Core model by one of ModelOpt's recipes.

    Recipes name modules as Hugging Face does. Rules for linears that Megatron-Core has by another name get that name
    (`*o_proj*` becomes `*linear_proj*`, `*mixer.experts*` becomes `*mlp.experts*`); all else is ModelOpt's, the
    algorithm too. Where a model keeps linears that the recipe quantizes, the export refuses, with the rules to append.

    Args:
        recipe: Name of a general recipe, such as `nvfp4_omlp_only-kv_fp8_cast`, or path of a YAML file: one of
            ModelOpt's for a model (`models/nvidia/.../ptq/nvfp4-max-calib.yaml`), or of your own.

    Raises:
        ArgumentError: There is no such recipe, or it does not say how to quantize.
    """
    path = Path(recipe)
    name = str(path) if path.suffix in (".yaml", ".yml") else f"general/ptq/{recipe}"
    try:
        found = load_recipe(name)
    except (OSError, ValueError, TypeError) as error:
        raise ArgumentError(
            "There is no such recipe.",
            [Offender("recipe", f"is {str(recipe)!r}: {error}")],
            "Use the name of a recipe of ModelOpt's general/ptq, or the path of a YAML file.",
        ) from error
    if not isinstance(found, ModelOptPTQRecipe):
        reason = f"{str(recipe)!r} is a recipe of another kind"
        raise ArgumentError("The recipe does not say how to quantize.", [Offender("recipe", reason)], "Use one of PTQ.")
    config = found.quantize.model_dump()
    rules: dict[str, dict[str, Any]] = {}
    for rule in config["quant_cfg"]:
        translated = {**rule, "quantizer_name": in_megatron(rule["quantizer_name"])}
        # Two rules for what is one linear in Megatron-Core become one, where the last of them stood: later rules
        # overrule earlier ones.
        rules.pop(repr(translated), None)
        rules[repr(translated)] = translated
    return {**config, "quant_cfg": list(rules.values())}


def quant_cfg(
    quant_format: QuantFormat | str,
    pretrained_model_name_or_path: str | Path,
    *,
    group_size: int | None = None,
    quantize_mtp: bool = False,
    quantize_lm_head: bool = False,
    keep_experts: bool = False,
    preset: Preset | str = Preset.DEFAULT,
    kv_cache: KVCacheFormat | str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The config for `mtq.quantize` of a model in a format: ModelOpt's own, and rules for what servers load otherwise.

    Args:
        quant_format: A `QuantFormat` or its name.
        pretrained_model_name_or_path: Directory or hub id of the Hugging Face model, of which only the config is read.
        group_size: How many input features share a scale, where a format leaves the choice: 128 or 32 of `int4`.
        quantize_mtp: Whether layers of multi-token prediction are quantized too; they are kept in any case.
        quantize_lm_head: Whether the output layer is quantized too. One that is the embedding's weight never is.
        keep_experts: Whether routed experts stay in high precision, as they must where no server loads them in the
            format.
        preset: Which linears are quantized at all, a `Preset` or its name.
        kv_cache: The format of the KV cache, a `KVCacheFormat` or its name; None leaves it in 16 bits.
        trust_remote_code: Whether transformers may run code from the source to read its config.

    Raises:
        ArgumentError: No format has this name, of weights or of a KV cache, nor groups of this size, or there is no
            such preset.
        SourceError: The source has no usable config.
        UnsupportedModelError: Its architecture is not supported.
        UnsupportedQuantizationError: No server loads its experts in the format, and they are not to be kept; or no
            linear would be quantized.
    """
    scheme = scheme_named(quant_format, "quant_format", group_size)
    cache = None if kv_cache is None else kv_cache_named(kv_cache, "kv_cache")
    source = read_source_config(resolve_source(pretrained_model_name_or_path, weights=False), trust_remote_code)
    family = find_family(source.architecture)
    dims = family.dimensions(source.values)
    policy = Policy.of(scheme, quantize_mtp, preset_named(preset, "preset"), quantize_lm_head=quantize_lm_head)
    require_output_layer(quantize_lm_head=quantize_lm_head, tied=ties_embeddings(source.values))
    linears = [row for row in family.mappings if _stands_for_modules(row, dims)]
    if not keep_experts:
        _refuse_unserved(linears, policy, scheme)
    # ModelOpt's stock configs are objects of its module, which everybody who uses them shares.
    config = copy.deepcopy(dict(_STOCK[scheme.format]))
    if group_size is not None:
        config["quant_cfg"] = [_in_groups(rule, group_size) for rule in config["quant_cfg"]]
    # Rules of the stock configs that would turn off what is asked for.
    overruled = [_NO_MTP] if quantize_mtp and _has_mtp(family, dims) else []
    if quantize_lm_head:
        overruled += _NO_LM_HEAD
    config["quant_cfg"] = [rule for rule in config["quant_cfg"] if rule["quantizer_name"] not in overruled]
    # Asked as if MTP were quantized: the rule that it is not is one of the stock config's already.
    whatever_mtp = replace(policy, quantize_mtp=True)
    decisions = {
        ParamKey(row.megatron[0]): Decision(row, whatever_mtp.why_kept(row) or _kept_expert(row, keep_experts))
        for row in linears
    }
    refuse_nothing(decisions)
    rules = (quantizer_rule(key.module) for key, decision in decisions.items() if decision.kept)
    # One rule is that of all linears of experts.
    config["quant_cfg"] += {rule["quantizer_name"]: rule for rule in rules}.values()
    if cache is not None:
        config["quant_cfg"].append(copy.deepcopy(_KV_CACHE[cache]))
    return config


def _kept_expert(row: WeightMapping, keep_experts: bool) -> Kept | None:
    is_kept = keep_experts and row.scope is Scope.EXPERT
    return Kept(Reason.EXCLUDED, "expert, kept as keep_experts asks") if is_kept else None


def _in_groups(rule: dict[str, Any], size: int) -> dict[str, Any]:
    """The rule of a stock config with another size of groups, if it has any."""
    settings = rule.get("cfg", {})
    if -1 not in settings.get("block_sizes", {}):
        return rule
    return {**rule, "cfg": {**settings, "block_sizes": {**settings["block_sizes"], -1: size}}}


def _stands_for_modules(row: WeightMapping, dims: ModelDimensions) -> bool:
    """Whether a model of these sizes has the row's weights, in modules that a rule may have to name.

    A rule that matches nothing is refused. The stock configs turn off routers, embeddings, output layers and, unless it
    is asked for, multi-token prediction.
    """
    name = row.megatron[0]
    if name.endswith(".mixer.conv1d.weight") and not CONVOLUTION_IS_A_MODULE:
        return False
    is_linear = row.role in (Role.LINEAR, Role.HIGH_PRECISION) and name.rstrip("*").endswith(".weight")
    return is_linear and any(True for _ in row.keys(dims))


def _refuse_unserved(linears: Iterable[WeightMapping], policy: Policy, scheme: Scheme) -> None:
    found = {row.megatron[0]: why for row in linears if (why := policy.why_unserved(row))}
    if found:
        raise UnsupportedQuantizationError(
            "No server loads the experts of this model in this format.",
            [Offender(name, f"{scheme.format}: {why}") for name, why in found.items()],
            "Choose another format, or keep_experts=True (--experts kept of examples/quantize.py), which quantizes the "
            "rest.",
        )


def _has_mtp(family: Family, dims: ModelDimensions) -> bool:
    """Whether a model of these sizes has layers of multi-token prediction in Megatron."""
    return any(row.block.is_mtp and any(True for _ in row.keys(dims)) for row in family.mappings)
