"""Rules on `config_groups` and the KV cache's algorithm: what readers index without looking."""

from collections.abc import Iterator

from quantplug.checkpoint.untrusted.json_reader import Json, as_count, as_object, as_text, as_texts, is_texts
from quantplug.printable import shown
from quantplug.verify.checks import Check
from quantplug.verify.inventory.modules import Inventory
from quantplug.verify.report import Finding, error

_MODELOPT_BITS = {"NVFP4": 4, "W4A16_NVFP4": 4, "FP8": 8, "FP8_PER_CHANNEL_PER_TOKEN": 8, "MXFP8": 8}
_COMPRESSED_BITS = {"nvfp4-pack-quantized": 4, "float-quantized": 8, "naive-quantized": 8}


def config_groups(inventory: Inventory) -> Iterator[Finding]:
    """Each group says which modules it is for, and how their weights are stored."""
    config = as_object(inventory.checkpoint.config.get("quantization_config"))
    compressed = inventory.scheme.method == "compressed-tensors"
    if inventory.scheme.method not in ("modelopt", "compressed-tensors"):
        return
    # ModelOpt's readers can do without; those of compressed-tensors have nothing else to go by.
    if "config_groups" not in config:
        if compressed:
            yield _error("", "missing: nothing says what is quantized")
        return
    groups = config["config_groups"]
    if not isinstance(groups, dict) or (compressed and not groups):
        yield _error("", f"is {shown(groups)}, not an object of groups")
        return
    for name, group in groups.items():
        if not isinstance(group, dict):
            yield _error(f".{name}", f"is {shown(group)}, not an object")
            continue
        if compressed:
            yield from _group(f".{name}", group, _compressed_bits(config, group))
            continue
        listed = _listed_bits(config, group)
        if len(listed) > 1:
            one, other, *_ = listed.values()
            yield _error(f".{name}", f"is for {one} and for {other}, of other bits by quantized_layers")
            continue
        of_all = _MODELOPT_BITS.get(as_text(config.get("quant_algo")))
        bits = next(iter(listed), of_all)
        yield from _group(f".{name}", group, bits)
        yield from _inputs(f".{name}", group.get("input_activations"), bits)


def _listed_bits(config: Json, group: Json) -> dict[int, str]:
    """By bits a target that has them, in a config that lists every layer with its algorithm (`MIXED_PRECISION`)."""
    layers = as_object(config.get("quantized_layers"))
    targets = as_texts(group.get("targets"))
    bits = {target: _MODELOPT_BITS.get(as_text(as_object(layers.get(target)).get("quant_algo"))) for target in targets}
    return {of_target: target for target, of_target in bits.items() if of_target is not None}


def _compressed_bits(config: Json, group: Json) -> int | None:
    return _COMPRESSED_BITS.get(as_text(group.get("format")) or as_text(config.get("format")))


def _group(name: str, group: Json, bits: int | None) -> Iterator[Finding]:
    """`bits` are those of the algorithm; None when its groups are not known in full."""
    if not is_texts(group.get("targets")) or not group["targets"]:
        yield _error(name, f"targets is {shown(group.get('targets'))}, not a list of classes or modules")
    inputs = group.get("input_activations")
    if inputs is not None and not isinstance(inputs, dict):
        yield _error(name, f"input_activations is {shown(inputs)}, not an object or null")
    weights = group.get("weights")
    # Groups of an algorithm that is not known in full may say it otherwise.
    if bits is None and weights is None:
        return
    if not isinstance(weights, dict):
        yield _error(name, f"weights is {shown(weights)}, not an object")
        return
    if as_count(weights.get("num_bits")) is None or (bits is not None and weights["num_bits"] != bits):
        yield _error(name, f"weights.num_bits is {shown(weights.get('num_bits'))}, expected {bits or 'a number'}")
    kind = weights.get("type")
    if not isinstance(kind, str) or (bits is not None and kind != "float"):
        yield _error(name, f"weights.type is {shown(kind)}, expected {'float' if bits else 'a name'}")
    if bits == 4 and weights.get("group_size") is None:
        yield _error(name, "weights.group_size is not set, NVFP4 has 16")


def _inputs(name: str, inputs: object, bits: int | None) -> Iterator[Finding]:
    """Of ModelOpt's algorithms that are known in full, inputs have the type of the weights."""
    if not isinstance(inputs, dict) or not inputs or bits is None:
        return
    if inputs.get("num_bits") != bits:
        yield _error(name, f"input_activations.num_bits is {shown(inputs.get('num_bits'))}, expected {bits}")
    if inputs.get("type", "float") != "float":
        yield _error(name, f"input_activations.type is {shown(inputs['type'])}, expected float")


def kv_cache_algo(inventory: Inventory) -> Iterator[Finding]:
    """`kv_cache_quant_algo` is a name, or null for none, in both files."""
    if inventory.scheme.method != "modelopt":
        return
    config = as_object(inventory.checkpoint.config.get("quantization_config"))
    file = as_object(as_object(inventory.checkpoint.hf_quant_config).get("quantization"))
    for where, holder in (("config.json", config), ("hf_quant_config.json", file)):
        value = holder.get("kv_cache_quant_algo")
        if value is not None and not isinstance(value, str):
            message = f"is {shown(value)}, neither a name nor null"
            yield error(Check.CONFIG_GROUPS, f"{where} kv_cache_quant_algo", message)


def _error(group: str, message: str) -> Finding:
    return error(Check.CONFIG_GROUPS, f"config.json config_groups{group}", message)


RULES = (config_groups, kv_cache_algo)
