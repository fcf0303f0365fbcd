"""Rules on what compressed-tensors' config says beside the layout of weights: it decides what a server computes.

Each value is what servers read of the formats that are judged (vLLM 0.33, `compressed_tensors.py` and its schemes); any
other one is refused by them, or means other numbers for the same tensors.
"""

from collections.abc import Iterator, Mapping, Set
from typing import Any

import torch

from quantplug.checkpoint.config.file import saved_dtype
from quantplug.checkpoint.untrusted.json_reader import Json, as_count, as_object, as_text, as_texts
from quantplug.printable import shown
from quantplug.verify.checks import Check
from quantplug.verify.inventory import names
from quantplug.verify.inventory.layouts import Fp8Layout
from quantplug.verify.inventory.modules import Inventory
from quantplug.verify.report import Finding, error, warning

_FLOAT, _NVFP4 = ("float-quantized", "naive-quantized"), "nvfp4-pack-quantized"
_MIXED = "mixed-precision"
_DYNAMIC = ("token", "tensor", "group")  # strategies of FP8 inputs whose scales are found as they come
# What a setting that is left out means: the defaults of `QuantizationArgs` in compressed-tensors 0.20. A strategy that
# is left out follows from the size of groups.
_DEFAULTS: Json = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
_ARGUMENTS = ("weights", "input_activations", "output_activations")
_GROUPED = ("group", "tensor_group")
_TYPES = ("scale_dtype", "zp_dtype")
_KNOWN = frozenset({
    *_DEFAULTS, *_TYPES, "strategy", "group_size", "block_structure", "actorder", "observer", "observer_kwargs",
})  # fmt: skip
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_BYTE_FLOATS = frozenset({
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
})  # fmt: skip
_INTEGERS = frozenset({
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
})  # fmt: skip
_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def compressed_groups(inventory: Inventory) -> Iterator[Finding]:
    """Weights are symmetric and have scales of their own; inputs are of the format's type, outputs stay as they are."""
    config = as_object(inventory.checkpoint.config.get("quantization_config"))
    if inventory.scheme.method != "compressed-tensors":
        return
    default = as_text(config.get("format"))
    for name, entry in as_object(config.get("config_groups")).items():
        group, where = as_object(entry), f"config_groups.{name}"
        if not isinstance(group.get("format"), str | None):
            yield _error(f"{where}.format", f"is {shown(group['format'])}, which is no name: compressed-tensors stops")
        stated = as_text(group.get("format")) or default
        # Readers go by either one. That of floats has two names.
        if stated != default and default != _MIXED and not {stated, default} <= set(_FLOAT):
            yield _error(f"{where}.format", f"is {shown(stated)}, beside a format {shown(default)} of the whole")
        if stated in (*_FLOAT, _NVFP4):
            # A group without any is no group, which is told by itself.
            if isinstance(weights := group.get("weights"), dict):
                yield from _weights(where, weights, stated)
            yield from _inputs(where, as_object(group.get("input_activations")), stated)
        if group.get("output_activations"):
            yield _error(f"{where}.output_activations", "is set: outputs of linears would be rounded, too")


def _weights(where: str, weights: Json, stated: str) -> Iterator[Finding]:
    expected = {"symmetric": True, "dynamic": False} | ({"strategy": "tensor_group"} if stated == _NVFP4 else {})
    yield from _differing(f"{where}.weights", weights, expected)


def _inputs(where: str, inputs: Json, stated: str) -> Iterator[Finding]:
    if not inputs:
        return
    expected: Json = {"num_bits": 8, "type": "float", "symmetric": True}
    if stated == _NVFP4:
        # Scales of blocks as they come, below one of the tensor that is stored.
        expected = {**expected, "num_bits": 4, "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}
    elif _meant(inputs, "dynamic") is False:
        expected = {**expected, "strategy": "tensor"}
    elif _meant(inputs, "strategy") not in _DYNAMIC:
        message = f"{_words(inputs, 'strategy')}, and servers read {', '.join(map(shown, _DYNAMIC))}"
        yield _error(f"{where}.input_activations.strategy", message)
    yield from _differing(f"{where}.input_activations", inputs, expected)


def _differing(where: str, said: Json, expected: Mapping[str, Any]) -> Iterator[Finding]:
    """What is said otherwise; what is left out, or null, has its default."""
    for key, value in expected.items():
        found = _meant(said, key)
        if (type(found), found) != (type(value), value):
            yield _error(f"{where}.{key}", f"{_words(said, key)}, and servers read {shown(value)}")


def _meant(said: Json, key: str) -> Any:
    """What a setting is, or stands for where it is left out."""
    if said.get(key) is None and key == "strategy":
        size = as_count(said.get("group_size"))
        return "group" if size else "tensor"
    return _DEFAULTS.get(key) if said.get(key) is None else said[key]


def _words(said: Json, key: str) -> str:
    return (
        f"is {shown(said[key])}" if said.get(key) is not None else f"is not set, which means {shown(_meant(said, key))}"
    )


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
        inputs = as_object(group.get("input_activations"))
        if as_object(group.get("weights")).get("strategy") == "channel" and _meant(inputs, "strategy") != "token":
            message = f"{_words(inputs, 'strategy')}: vLLM wants 'token' of experts whose weights have a scale a row"
            yield error(Check.SERVED_EXPERTS, f"config.json config_groups.{name}.input_activations.strategy", message)


def compressed_cache(inventory: Inventory) -> Iterator[Finding]:
    """The KV cache is in FP8, with one scale a tensor."""
    config = as_object(inventory.checkpoint.config.get("quantization_config"))
    said = config.get("kv_cache_scheme")
    if inventory.scheme.method != "compressed-tensors" or said is None:
        return
    if not isinstance(said, dict):
        yield _error("kv_cache_scheme", f"is {shown(said)}, not an object")
        return
    yield from _differing("kv_cache_scheme", said, _CACHE)


def arguments(inventory: Inventory) -> Iterator[Finding]:
    """Arguments of a quantization are some that the library takes: at any others readers stop."""
    config = as_object(inventory.checkpoint.config.get("quantization_config"))
    if inventory.scheme.method != "compressed-tensors":
        return
    named = {"kv_cache_scheme": config.get("kv_cache_scheme")}
    for name, group in as_object(config.get("config_groups")).items():
        of_group = as_object(group)
        for key in of_group.keys() - {*_ARGUMENTS, "targets", "format"}:
            message = "is nothing that compressed-tensors knows of a group: it stops; leave it out"
            yield _error(f"config_groups.{name}.{key}", message)
        named |= {f"config_groups.{name}.{key}": of_group.get(key) for key in _ARGUMENTS}
        if of_group.get("input_activations") == {}:
            message = "is {}: to vLLM none, to transformers integers of 8 bits; leave it out, or say what inputs are"
            yield _error(f"config_groups.{name}.input_activations", message)
    for where, said in named.items():
        for key, problem in argument_problems(as_object(said)):
            yield _error(f"{where}.{key}", problem)


def argument_problems(said: Json) -> Iterator[tuple[str, str]]:
    """Names of arguments that `QuantizationArgs` of compressed-tensors 0.20 refuses, and why."""
    for key, usual in _DEFAULTS.items():
        if key in said and said[key] is None:
            yield key, f"is null, at which compressed-tensors stops: leave it out for {shown(usual)}"
    size, strategy, block = said.get("group_size"), said.get("strategy"), said.get("block_structure")
    # A strategy that is left out follows from the size.
    if size is not None and not isinstance(size, int):
        yield "group_size", f"is {shown(size)}, which is no size of groups"
    elif size is not None and size > 0 and strategy not in (None, *_GROUPED):
        yield "group_size", f"is {shown(size)} beside strategy {shown(strategy)}, which has no groups: readers stop"
    elif strategy in _GROUPED and (size is None or size < 1):
        yield "group_size", f"is {shown(size)}, and strategy {shown(strategy)} has groups of a size: readers stop"
    if (block is not None) is not (strategy == "block"):
        yield "block_structure", f"is {shown(block)} beside strategy {shown(strategy)}: readers stop"
    if (problem := _dynamic_problem(said.get("dynamic", False), strategy)) is not None:
        yield "dynamic", f"{problem}: readers stop"
    ordered = said.get("actorder")
    if ordered not in (None, False, "weight", "static"):
        yield "actorder", f"is {shown(ordered)}, and compressed-tensors knows 'weight' alone: it stops"
    if not isinstance(said.get("observer"), str | None):
        yield "observer", f"is {shown(said['observer'])}, which is no name: compressed-tensors stops; leave it out"
    if not isinstance(said.get("observer_kwargs", {}), dict):
        yield "observer_kwargs", f"is {shown(said['observer_kwargs'])}, not an object: readers stop; leave it out"
    for key in said.keys() - _KNOWN:
        yield key, "is an argument that compressed-tensors does not know: it stops; leave it out"
    for key in _TYPES:
        if said.get(key) is not None and _type(said[key]) is None:
            yield key, f"is {shown(said[key])}, which is no type of PyTorch: compressed-tensors stops; leave it out"


def _dynamic_problem(dynamic: object, strategy: object) -> str | None:
    """Why scales cannot be found so as they come; null is told as one of the defaults."""
    if isinstance(dynamic, str):
        if dynamic.lower() == "local" and strategy == "tensor_group":
            return None
        return f"is {shown(dynamic)} beside strategy {shown(strategy)}: 'local' is for 'tensor_group' alone"
    if dynamic is not None and dynamic not in (0, 1):
        return f"is {shown(dynamic)}, neither true nor false"
    if dynamic and strategy not in (None, *_DYNAMIC, "tensor_group"):
        return f"is {shown(dynamic)} beside strategy {shown(strategy)}, whose scales are stored"
    return f"is {shown(dynamic)} beside strategy 'token'" if not dynamic and strategy == "token" else None


def _type(spelled: object) -> torch.dtype | None:
    """The type of a name, with or without PyTorch's before it, as compressed-tensors reads it."""
    found = vars(torch).get(spelled.removeprefix("torch.")) if isinstance(spelled, str) else None
    return found if isinstance(found, torch.dtype) else None


def types_of_scales(inventory: Inventory) -> Iterator[Finding]:
    """Types that a config names for scales and zero points are some by which transformers computes what servers do.

    Servers do not look at them: they take scales in the type in which they are stored, and find those of inputs in
    their own. transformers (5.14, with compressed-tensors 0.20) does in two places, of all that are judged here.
    """
    config = as_object(inventory.checkpoint.config.get("quantization_config"))
    if inventory.scheme.method != "compressed-tensors":
        return
    of_model, default = saved_dtype(inventory.checkpoint.config), as_text(config.get("format"))
    for name, entry in as_object(config.get("config_groups")).items():
        group, where = as_object(entry), f"config.json config_groups.{name}"
        inputs, is_nvfp4 = as_object(group.get("input_activations")), (group.get("format") or default) == _NVFP4
        found = _type(as_object(group.get("weights")).get("scale_dtype"))
        if is_nvfp4 and found is not None and not _holds_stored_scales(found):
            message = f"is {shown(str(found))}: transformers 5.14 takes stored scales for it, or stops; leave it out"
            yield warning(Check.TRANSFORMERS, f"{where}.weights.scale_dtype", message)
        for key in input_types_computed_otherwise(inputs, of_model, is_nvfp4=is_nvfp4):
            message = f"is {shown(inputs[key])}: transformers 5.14 rounds to it, which servers do not, or stops"
            yield warning(Check.TRANSFORMERS, f"{where}.input_activations.{key}", f"{message}; leave it out")


def input_types_computed_otherwise(inputs: Json, of_model: torch.dtype, *, is_nvfp4: bool) -> Iterator[str]:
    """Which of `scale_dtype` and `zp_dtype` change what transformers computes of inputs whose scales it finds."""
    scale, zero = (_type(inputs.get(key)) for key in _TYPES)
    if not inputs.get("dynamic"):
        return
    # Of NVFP4 scales of blocks are found in FP32, below the one that is stored, and rounded to FP8 where that is said.
    is_servers = is_nvfp4 and scale is torch.float8_e4m3fn
    if scale is not None and not is_servers and not _fits(scale, _FLOATS, torch.float32 if is_nvfp4 else of_model):
        yield "scale_dtype"
    # Inputs are symmetric, and zero is in any type that it can be converted to.
    if zero is not None and not _fits(zero, _FLOATS | _BYTE_FLOATS | _INTEGERS, of_model):
        yield "zp_dtype"


def _holds_stored_scales(found: torch.dtype) -> bool:
    """Whether a parameter of a type is given the FP8 scales of a file: those of another byte take them for theirs."""
    is_plain = found.is_complex or found in _FLOATS | _INTEGERS
    return found is torch.float8_e4m3fn or (is_plain and found.itemsize > 1)


def _fits(found: torch.dtype, among: Set[torch.dtype], other: torch.dtype) -> bool:
    """Whether a type is among some, none of whose numbers is too large for a float of another type: else it stops."""
    most = torch.iinfo if found in _INTEGERS else torch.finfo
    return found in among and most(found).max <= torch.finfo(other).max


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


RULES = (compressed_groups, inputs_of_experts, compressed_cache, arguments, types_of_scales, not_judged, targets)
