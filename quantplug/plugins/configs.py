"""ModelOpt's configs by the public names of the formats, made complete for one model by the policy of selection."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq

from quantplug.checkpoint.reader import resolve_source
from quantplug.checkpoint.source_config import read_source_config
from quantplug.formats.names import QuantFormat, scheme_named
from quantplug.mappings.families import find_family
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import Family, Role
from quantplug.selection import Policy, quantizer_rule

_NO_INPUTS = {"quantizer_name": "*input_quantizer", "enable": False}
# ModelOpt's stock configs leave multi-token prediction in high precision by this rule.
_NO_MTP = "mtp.*"

# ModelOpt has no stock config of FP8 weights alone. Rules apply in order, so the one that turns inputs off is last.
_STOCK: Mapping[QuantFormat, Mapping[str, Any]] = {
    QuantFormat.W4A16_NVFP4: mtq.W4A16_NVFP4_CFG,
    QuantFormat.NVFP4: mtq.NVFP4_DEFAULT_CFG,
    QuantFormat.FP8: mtq.FP8_DEFAULT_CFG,
    QuantFormat.W8A16_FP8: {**mtq.FP8_DEFAULT_CFG, "quant_cfg": [*mtq.FP8_DEFAULT_CFG["quant_cfg"], _NO_INPUTS]},
    QuantFormat.FP8_BLOCKWISE: mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
}


def quant_cfg(
    quant_format: QuantFormat | str,
    pretrained_model_name_or_path: str | Path,
    *,
    quantize_mtp: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The config for `mtq.quantize` of a model in a format: ModelOpt's own, and rules for what servers load otherwise.

    Args:
        quant_format: A `QuantFormat` or its name.
        pretrained_model_name_or_path: Directory or hub id of the Hugging Face model, of which only the config is read.
        quantize_mtp: Whether layers of multi-token prediction are quantized too; they are kept in any case.
        trust_remote_code: Whether transformers may run code from the source to read its config.

    Raises:
        ArgumentError: No format has this name.
        SourceError: The source has no usable config.
        UnsupportedModelError: Its architecture is not supported.
    """
    scheme = scheme_named(quant_format, "quant_format")
    source = read_source_config(resolve_source(pretrained_model_name_or_path, weights=False), trust_remote_code)
    family = find_family(source.architecture)
    dims = family.dimensions(source.values)
    # ModelOpt's stock configs are objects of its module, which everybody who uses them shares.
    config = copy.deepcopy(dict(_STOCK[scheme.format]))
    if quantize_mtp and _has_mtp(family, dims):
        config["quant_cfg"] = [rule for rule in config["quant_cfg"] if rule["quantizer_name"] != _NO_MTP]
    config["quant_cfg"] += _rules(family, dims, Policy(scheme.weight_bits, quantize_mtp))
    return config


def _rules(family: Family, dims: ModelDimensions, policy: Policy) -> list[dict[str, Any]]:
    """Rules for the linears that the policy keeps, and ModelOpt's config of the format does not know.

    Only for what a model of these sizes has, and for weights of modules: a rule that matches nothing is refused. The
    stock configs turn off routers, embeddings, output layers and, unless it is asked for, multi-token prediction.
    """
    # Asked as if MTP were quantized: the rule that it is not is one of the stock config's already.
    linears = [row for row in family.mappings if row.role in (Role.LINEAR, Role.HIGH_PRECISION)]
    whatever_mtp = Policy(policy.weight_bits, quantize_mtp=True)
    return [
        quantizer_rule(row.megatron[0])
        for row in linears
        if whatever_mtp.why_kept(row) is not None and row.megatron[0].endswith(".weight")
        if any(True for _ in row.keys(dims))
    ]


def _has_mtp(family: Family, dims: ModelDimensions) -> bool:
    """Whether a model of these sizes has layers of multi-token prediction in Megatron."""
    return any(row.block.is_mtp and any(True for _ in row.keys(dims)) for row in family.mappings)
