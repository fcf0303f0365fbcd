"""Rules on what compressed-tensors' config says beside the layout of weights: it decides what a server computes.

Each value is what servers read of the formats that are judged (vLLM 0.33, `compressed_tensors.py` and its schemes); any
other one is refused by them, or means other numbers for the same tensors.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from quantplug.checkpoint.untrusted.json_reader import Json, as_object, as_text, as_texts
from quantplug.printable import shown
from quantplug.verify import names
from quantplug.verify.checks import Check
from quantplug.verify.layouts import Fp8Layout
from quantplug.verify.modules import Inventory
from quantplug.verify.report import Finding, error

_FLOAT, _NVFP4 = ("float-quantized", "naive-quantized"), "nvfp4-pack-quantized"
_MIXED = "mixed-precision"
_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def compressed_groups(inventory: Inventory) -> Iterator[Finding]:
    """Weights are symmetric and have scales of their own; inputs are of the format's type, outputs stay as they are."""
    config = as_object(inventory.checkpoint.config.get("quantization_config"))
    if inventory.scheme.method != "compressed-tensors":
        return
    default = as_text(config.get("format"))
    for name, entry in as_object(config.get("config_groups")).items():
        group, where = as_object(entry), f"config_groups.{name}"
        stated = as_text(group.get("format")) or default
        # Readers go by either one. That of floats has two names.
        if stated != default and default != _MIXED and not {stated, default} <= set(_FLOAT):
            yield _error(f"{where}.format", f"is {shown(stated)}, beside a format {shown(default)} of the whole")
        if stated in (*_FLOAT, _NVFP4):
            yield from _weights(where, as_object(group.get("weights")))
            yield from _inputs(where, as_object(group.get("input_activations")), stated)
        if group.get("output_activations"):
            yield _error(f"{where}.output_activations", "is set: outputs of linears would be rounded, too")


def _weights(where: str, weights: Json) -> Iterator[Finding]:
    yield from _differing(f"{where}.weights", weights, {"symmetric": True, "dynamic": False})


def _inputs(where: str, inputs: Json, stated: str) -> Iterator[Finding]:
    if inputs:
        bits = 4 if stated == _NVFP4 else 8
        yield from _differing(
            f"{where}.input_activations", inputs, {"num_bits": bits, "type": "float", "symmetric": True}
        )


def _differing(where: str, said: Json, expected: Mapping[str, Any]) -> Iterator[Finding]:
    """What is said otherwise; what is left out, or null, has its default, which is the expected."""
    for key, value in expected.items():
        found = said.get(key)
        if found is not None and (type(found), found) != (type(value), value):
            yield _error(f"{where}.{key}", f"is {shown(found)}, and servers read {shown(value)}")


def inputs_of_experts(inventory: Inventory) -> Iterator[Finding]:
    """Experts whose weights have a scale a row have inputs that are quantized by token."""
    config = as_object(inventory.checkpoint.config.get("quantization_config"))
    by_row = any(
        isinstance(module.layout, Fp8Layout) and module.layout.per_row and names.expert(module.name) is not None
        for module in inventory.quantized
    )
    if inventory.scheme.method != "compressed-tensors" or not by_row:
        return
    for name, entry in as_object(config.get("config_groups")).items():
        group = as_object(entry)
        strategy = as_text(as_object(group.get("input_activations")).get("strategy"))
        if as_object(group.get("weights")).get("strategy") == "channel" and strategy not in ("", "token"):
            message = f"is {shown(strategy)}: vLLM wants 'token' of experts whose weights have a scale a row"
            yield error(Check.SERVED_EXPERTS, f"config.json config_groups.{name}.input_activations.strategy", message)


def compressed_cache(inventory: Inventory) -> Iterator[Finding]:
    """The KV cache is in FP8, with one scale a tensor."""
    config = as_object(inventory.checkpoint.config.get("quantization_config"))
    if inventory.scheme.method == "compressed-tensors":
        yield from _differing("kv_cache_scheme", as_object(config.get("kv_cache_scheme")), _CACHE)


def not_judged(inventory: Inventory) -> Iterator[Finding]:
    """Sparse weights, and transforms of inputs, are other computations than those that are judged here."""
    config = as_object(inventory.checkpoint.config.get("quantization_config"))
    if inventory.scheme.method != "compressed-tensors":
        return
    sparse = as_text(as_object(config.get("sparsity_config")).get("format"))
    if sparse not in ("", "dense"):
        yield error(Check.NOT_JUDGED, "config.json sparsity_config", f"not judged: weights in {shown(sparse)}")
    if as_object(as_object(config.get("transform_config")).get("config_groups")):
        yield error(Check.NOT_JUDGED, "config.json transform_config", "not judged: inputs or weights are transformed")


def targets(inventory: Inventory) -> Iterator[Finding]:
    """A class of modules that a group is for is that of linears, where the group has weights."""
    config = as_object(inventory.checkpoint.config.get("quantization_config"))
    if inventory.scheme.method != "compressed-tensors":
        return
    for name, entry in as_object(config.get("config_groups")).items():
        group = as_object(entry)
        classes = [target for target in as_texts(group.get("targets")) if target[:1].isupper() and "." not in target]
        if group.get("weights") and classes and "Linear" not in classes:
            yield _error(f"config_groups.{name}.targets", f"is {shown(classes)}: no linear is of such a class")


def _error(where: str, message: str) -> Finding:
    return error(Check.CONFIG_GROUPS, f"config.json {where}", message)


RULES = (compressed_groups, inputs_of_experts, compressed_cache, not_judged, targets)
