"""Rules on the two config files: the algorithm, and that they agree."""

from collections.abc import Iterator, Mapping
from contextlib import suppress

import torch

from quantplug.checkpoint.untrusted.json_reader import Json, as_count, as_object, as_text, as_texts, is_texts
from quantplug.printable import shown
from quantplug.verify.checks import Check
from quantplug.verify.inventory.checkpoint import UnreadableTensorError
from quantplug.verify.inventory.excludes import with_parents
from quantplug.verify.inventory.layouts import Layout
from quantplug.verify.inventory.modules import Inventory
from quantplug.verify.inventory.scheme import MODELOPT_LAYOUTS, modelopt_kv_cache
from quantplug.verify.report import Finding, error, warning

FILE = "hf_quant_config.json"
CONFIG = "config.json"
# Columns that share a scale, of the algorithms that have a `group_size`.
_GROUP_SIZES = {"NVFP4": 16, "W4A16_NVFP4": 16, "MXFP8": 32}
_SERVED_DENSE_ONLY = ("FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")  # no vLLM MoE, no SGLang (vLLM 0.33, SGLang 0.5.23)


def _quantization_config(inventory: Inventory) -> Json:
    return as_object(inventory.checkpoint.config.get("quantization_config"))


def _file(inventory: Inventory) -> Json:
    return as_object(as_object(inventory.checkpoint.hf_quant_config).get("quantization"))


def algo(inventory: Inventory) -> Iterator[Finding]:
    """An algorithm that servers know, spelled as they spell it."""
    if inventory.scheme.method != "modelopt":
        return
    config = _quantization_config(inventory)
    # Whatever form it has, so that the name is judged even where the form is a finding too.
    config = as_object(config.get("quantization")) or config or _file(inventory)
    name = as_text(config.get("quant_algo"))
    # vLLM and SGLang compare with upper-case names, letter by letter.
    if name != name.upper():
        yield error(Check.ALGO, CONFIG, f"quant_algo {name!r} is not upper-case: vLLM and SGLang do not know it")
    if name.upper() not in MODELOPT_LAYOUTS and name != "MIXED_PRECISION":
        yield error(Check.ALGO, CONFIG, f"quant_algo {name or 'missing'!r} is known to no server")
    elif name.upper() in _SERVED_DENSE_ONLY and inventory.expert_groups:
        yield error(Check.ALGO, CONFIG, f"quant_algo {name!r} of a mixture of experts: vLLM and SGLang cannot load it")
    elif name.upper() in _SERVED_DENSE_ONLY:
        yield warning(Check.ALGO, CONFIG, f"quant_algo {name!r} is served by vLLM alone")
    for where, holder in ((CONFIG, config), (FILE, _file(inventory))):
        for key in ("pre_quant_scale", "has_zero_point"):
            if holder.get(key) is True and isinstance(MODELOPT_LAYOUTS.get(name.upper()), Layout):
                yield error(Check.ALGO, where, f"{key} is True, and no linear of {name} has any: TensorRT-LLM wants it")


def fp8_config(inventory: Inventory) -> Iterator[Finding]:
    """For DeepSeek's form: the keys and the block that its readers ask for."""
    if inventory.scheme.method != "fp8":
        return
    config = _quantization_config(inventory)
    if as_text(config.get("activation_scheme")) not in ("dynamic", "static"):
        yield error(Check.ALGO, CONFIG, "activation_scheme is neither dynamic nor static: vLLM refuses to start")
    block = config.get("weight_block_size")
    if block is not None and block != [128, 128]:
        yield warning(
            Check.ALGO, CONFIG, f"weight_block_size {block!r} is not [128, 128], the only one TensorRT-LLM takes"
        )
    if config.get("fmt", "e4m3") != "e4m3":
        yield error(Check.ALGO, CONFIG, f"fmt is {shown(config['fmt'])}, the weights are E4M3")
    # vLLM reads the second of the two where it is there, others the first.
    lists = [set(as_texts(config[key])) for key in ("modules_to_not_convert", "ignored_layers") if config.get(key)]
    if len(lists) == 2 and lists[0] != lists[1]:
        message = "modules_to_not_convert and ignored_layers differ: servers exclude other modules by each"
        yield error(Check.CONFIG_AGREEMENT, CONFIG, message)
    if config.get("scale_fmt") == "ue8m0":
        yield from _powers_of_two(inventory)


def _powers_of_two(inventory: Inventory) -> Iterator[Finding]:
    """Scales that are to be powers of two: servers store them by their exponents alone, and inputs' likewise."""
    for module in inventory.quantized:
        name = f"{module.name}.weight_scale_inv"
        if module.sound and name in inventory.checkpoint.tensors and inventory.checkpoint.tensors[name].dtype == "F32":
            with suppress(UnreadableTensorError):  # Which has a finding of its own.
                mantissas, _ = torch.frexp(inventory.checkpoint.read(name))
                others = int((mantissas.abs() != 0.5).sum())
                if others:
                    message = f"{others} scales are no powers of two, as scale_fmt 'ue8m0' says: servers round them"
                    yield error(Check.ALGO, name, message)


def config_agreement(inventory: Inventory) -> Iterator[Finding]:
    """VLLM and SGLang read config.json, TensorRT-LLM hf_quant_config.json; they have to say the same."""
    if inventory.scheme.method != "modelopt":
        return
    config, file = _quantization_config(inventory), _file(inventory)
    if "quantization" in config:
        yield error(
            Check.CONFIG_AGREEMENT, CONFIG, "quantization_config is nested: SGLang wants quant_algo and ignore flat"
        )
        return
    if not config:
        yield error(
            Check.CONFIG_AGREEMENT,
            CONFIG,
            f"has no quantization_config, only {FILE}: vLLM refuses W4A16_NVFP4 and MXFP8 so",
        )
    if not file:
        yield error(
            Check.CONFIG_AGREEMENT, FILE, "missing, or without an object quantization: TensorRT-LLM reads this file"
        )
    if not config or not file:
        return
    # Both readers look at it before they take a file for ModelOpt's.
    producer = as_text(as_object(as_object(inventory.checkpoint.hf_quant_config).get("producer")).get("name"))
    if producer != "modelopt":
        yield error(
            Check.CONFIG_AGREEMENT, FILE, f"producer.name is {producer!r}, vLLM's and SGLang's readers want 'modelopt'"
        )
    yield from _disagreements(config, file)
    if as_text(file.get("quant_algo")) in _GROUP_SIZES:
        absent = [key for key in ("group_size", "kv_cache_quant_algo", "exclude_modules") if key not in file]
        yield from (
            error(Check.CONFIG_AGREEMENT, FILE, f"quantization lacks {key}, which vLLM reads") for key in absent
        )


def _disagreements(config: Json, file: Json) -> Iterator[Finding]:
    pairs = (
        ("quant_algo", as_text(config.get("quant_algo")), as_text(file.get("quant_algo"))),
        ("KV cache", modelopt_kv_cache(config), modelopt_kv_cache(file)),
        ("quantized_layers", config.get("quantized_layers"), file.get("quantized_layers")),
    )
    for what, here, there in pairs:
        if here != there:
            yield error(Check.CONFIG_AGREEMENT, what, f"{CONFIG} says {shown(here)}, {FILE} says {shown(there)}")
    for where, value in (
        (f"{CONFIG} ignore", config.get("ignore")),
        (f"{FILE} exclude_modules", file.get("exclude_modules")),
    ):
        if value is not None and not is_texts(value):
            yield error(Check.CONFIG_AGREEMENT, where, "is not a list of names")
    here, there = set(as_texts(config.get("ignore"))), set(as_texts(file.get("exclude_modules")))
    # Order is free, and so are repetitions: a list is a set of modules here.
    for pattern in sorted(here ^ there):
        where, other = (CONFIG, FILE) if pattern in here else (FILE, CONFIG)
        yield error(Check.CONFIG_AGREEMENT, pattern, f"excluded by {where}, but not by {other}")


def group_size(inventory: Inventory) -> Iterator[Finding]:
    """NVFP4's block is 16: SGLang asserts it, vLLM's Marlin path assumes it. MXFP8's is 32, whatever a config says."""
    if inventory.scheme.method != "modelopt":
        return
    config, file = _quantization_config(inventory), _file(inventory)
    algorithm = as_text((config or file).get("quant_algo"))
    if algorithm not in _GROUP_SIZES:
        return
    wanted = _GROUP_SIZES[algorithm]
    if "group_size" in file and as_count(file["group_size"]) != wanted:
        yield error(Check.ALIGNMENT, FILE, f"group_size is {file['group_size']!r}, {algorithm} has {wanted}")
    for name, group in as_object(config.get("config_groups")).items():
        size = as_object(as_object(group).get("weights")).get("group_size")
        if size is not None and as_count(size) != wanted:
            message = f"group_size is {size!r}, {algorithm} has {wanted}"
            yield error(Check.ALIGNMENT, f"{CONFIG} config_groups.{name}", message)


def weight_only(inventory: Inventory) -> Iterator[Finding]:
    """The config groups say the same about activations as the algorithm does."""
    if inventory.scheme.method != "modelopt":
        return
    config = _quantization_config(inventory)
    name, groups = as_text(config.get("quant_algo")), as_object(config.get("config_groups"))
    inputs = {key: bool(as_object(group).get("input_activations")) for key, group in groups.items()}
    if name == "W4A16_NVFP4":
        for key in (key for key, has in inputs.items() if has):
            message = "has input_activations, but W4A16_NVFP4 is weight-only"
            yield error(Check.WEIGHT_ONLY, f"{CONFIG} config_groups.{key}", message)
    # One group without activations may be meant; none with them says that the algorithm has another name.
    if name == "NVFP4" and inputs and not any(inputs.values()):
        message = "no input_activations: vLLM reads weight-only NVFP4, SGLang does not; the name is W4A16_NVFP4"
        yield error(Check.WEIGHT_ONLY, f"{CONFIG} config_groups", message)


def status(inventory: Inventory) -> Iterator[Finding]:
    """compressed-tensors: `frozen` and all before it, which nothing said means too: weights are not quantized yet."""
    found = _quantization_config(inventory).get("quantization_status")
    if inventory.scheme.method == "compressed-tensors" and found != "compressed":
        message = (
            f"quantization_status is {shown(found)}: transformers reads packed weights only where it is 'compressed'"
        )
        yield error(Check.STATUS, CONFIG, message)


def producer(inventory: Inventory) -> Iterator[Finding]:
    """What is said of the tool is an object, where it is said: vLLM asks it for a name, whatever the method."""
    found = _quantization_config(inventory).get("producer", {})
    if not isinstance(found, dict):
        yield error(Check.CONFIG_AGREEMENT, f"{CONFIG} producer", f"is {shown(found)}, not an object: vLLM stops")


def mixed(inventory: Inventory) -> Iterator[Finding]:
    """What vLLM and SGLang both take as MIXED_PRECISION."""
    config = _quantization_config(inventory)
    if inventory.scheme.method != "modelopt" or as_text(config.get("quant_algo")) != "MIXED_PRECISION":
        return
    layers = as_object(config.get("quantized_layers"))
    algos = {name: as_text(as_object(entry).get("quant_algo")) for name, entry in layers.items()}
    if not layers:
        yield error(
            Check.MIXED,
            CONFIG,
            "MIXED_PRECISION without quantized_layers: no layer has an algorithm",
        )
    elif not set(algos.values()) & {"NVFP4", "W4A16_NVFP4"}:
        yield error(Check.MIXED, CONFIG, "no layer is NVFP4 or W4A16_NVFP4: SGLang reads such a file as w4afp8")
    if "kv_cache_quant_algo" not in config and "kv_cache_scheme" not in config:
        yield error(
            Check.MIXED,
            CONFIG,
            "neither kv_cache_quant_algo nor kv_cache_scheme: SGLang reads the other file",
        )
    yield from _listed(inventory, layers, algos)
    yield from _experts_by_chance(inventory, algos)


def _listed(inventory: Inventory, layers: Json, algos: Mapping[str, str]) -> Iterator[Finding]:
    """Each key names a module, and an algorithm that both servers know in this schema."""
    known = inventory.served.keys() | inventory.expert_groups.keys()
    for name, algorithm in algos.items():
        if algorithm.upper() == "FP8_PB_WO":
            yield error(Check.MIXED, name, "FP8_PB_WO inside MIXED_PRECISION: vLLM and SGLang want different tensors")
        if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
            message = (
                "FP8_PER_CHANNEL_PER_TOKEN inside MIXED_PRECISION: of linears vLLM alone reads it, of experts nobody"
            )
            yield error(Check.MIXED, name, message)
        size = as_object(layers[name]).get("group_size")
        wanted = _GROUP_SIZES.get(algorithm)
        if wanted is not None and size is not None and as_count(size) != wanted:
            message = f"group_size is {size!r}, {algorithm} has {wanted}"
            yield error(Check.ALIGNMENT, f"quantized_layers.{name}", message)
        if name not in known:
            yield error(Check.MIXED, name, "listed in quantized_layers, but no module on disk has that name")


def _experts_by_chance(inventory: Inventory, algos: Mapping[str, str]) -> Iterator[Finding]:
    """Plain experts beside a listed module: vLLM 0.33 looks for any key below their parent and takes its algorithm."""
    parents: dict[str, str] = {}
    for name in algos:
        for parent in with_parents([name.rpartition(".")[0]]):
            parents.setdefault(parent, name)
    for experts, members in inventory.expert_groups.items():
        beside = parents.get(experts.rpartition(".")[0])
        is_plain = not any(inventory.modules[name].quantized for name in members)
        if is_plain and beside is not None and not inventory.scheme.excludes.names(experts):
            message = f"plain, but on no exclude list: vLLM takes the algorithm of {beside} for them"
            yield error(Check.MIXED, experts, message)


RULES = (algo, fp8_config, config_agreement, group_size, weight_only, status, producer, mixed)
