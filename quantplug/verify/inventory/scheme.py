"""The quantization a checkpoint's configs claim, in one form for all dialects."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain

from quantplug.checkpoint.untrusted.json_reader import Json, as_count, as_object, as_text, as_texts
from quantplug.verify.checks import Check
from quantplug.verify.inventory.checkpoint import Checkpoint
from quantplug.verify.inventory.excludes import PatternList, matches_compressed_tensors, matches_fp8, matches_modelopt
from quantplug.verify.inventory.layouts import (
    F32,
    FLOATS,
    MODELOPT_FP8,
    MODELOPT_FP8_PER_CHANNEL,
    MODELOPT_MXFP8,
    MODELOPT_NVFP4,
    MODELOPT_W4A16_NVFP4,
    Fp8Layout,
    Int4Layout,
    Layout,
    Mxfp4Layout,
    Nvfp4Layout,
    UnjudgedLayout,
)
from quantplug.verify.inventory.names import last
from quantplug.verify.report import Finding, error

MODELOPT_LAYOUTS: Mapping[str, Layout | UnjudgedLayout] = {
    "NVFP4": MODELOPT_NVFP4,
    "W4A16_NVFP4": MODELOPT_W4A16_NVFP4,
    "FP8": MODELOPT_FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": MODELOPT_FP8_PER_CHANNEL,
    "MXFP8": MODELOPT_MXFP8,
    **{
        name: UnjudgedLayout(name)
        for name in ("FP8_PB_WO", "MXFP4", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "NVFP4_AWQ", "W4A16_AWQ",
                     "W4A8_AWQ", "INT4_AWQ", "W8A16", "W8A8_SQ_PER_CHANNEL", "NVFP4_SVDQUANT")
    },
}  # fmt: skip
ModuleLayout = Layout | UnjudgedLayout | None


@dataclass(frozen=True)
class DeclaredScheme:
    """What the configs say about every module.

    Attributes:
        method: `modelopt`, `fp8`, `compressed-tensors`; empty without a quantization config that we know.
        label: Method and algorithm, for people.
        excludes: The modules kept unquantized.
        layout_of: What the config promises for a module that no pattern excludes; None for unquantized.
        kv_cache: The name of the KV cache quantization; empty for none.
        is_named: Whether a module is quantized by its name, and not as one of a class.
    """

    method: str
    label: str
    excludes: PatternList
    layout_of: Callable[[str], ModuleLayout]
    kv_cache: str = ""
    is_named: Callable[[str], bool] = lambda module: True


def read_scheme(checkpoint: Checkpoint) -> tuple[DeclaredScheme, list[Finding]]:
    """The scheme of a checkpoint and the findings that keep it from being known."""
    config = as_object(checkpoint.config.get("quantization_config"))
    # In the order in which readers look: config.json first, hf_quant_config.json where it says nothing.
    config = _nested(config) or config or _nested(as_object(checkpoint.hf_quant_config))
    method = as_text(config.get("quant_method"))
    if not config:
        message = "has no quantization_config: nothing says that, or how, this checkpoint is quantized"
        return _unquantized(), [error(Check.NO_QUANTIZATION, "config.json", message)]
    if method == "modelopt":
        return _modelopt(config), []
    if method == "fp8":
        return _fp8(config), []
    if method == "compressed-tensors":
        return _compressed_tensors(config), []
    if method == "mxfp4":
        return _mxfp4(config), []
    message = f"not judged: quant_method {method or 'missing'!r} is none of modelopt, fp8, compressed-tensors, mxfp4"
    return _unquantized(method or "unknown"), [error(Check.NOT_JUDGED, "config.json", message)]


def _nested(file: Json) -> Json:
    """The form of hf_quant_config.json, which old ModelOpt also wrote into config.json; empty if it is not."""
    quantization = as_object(file.get("quantization"))
    if not quantization:
        return {}
    return {**quantization, "quant_method": "modelopt", "ignore": quantization.get("exclude_modules")}


def _unquantized(label: str = "unquantized") -> DeclaredScheme:
    """Nothing is promised of any module, and the rules on promises have nothing to say."""
    return DeclaredScheme("", label, PatternList((), matches_modelopt), lambda module: None)


def modelopt_kv_cache(config: Json) -> str:
    """The KV cache algorithm by name, from a config.json (dict or string) or hf_quant_config.json (string)."""
    scheme = config.get("kv_cache_scheme")
    if isinstance(scheme, dict):
        # vLLM 0.32 (`get_kv_cache_quant_algo_string`) has no defaults: of anything else it makes a cache of 16 bits.
        bits = as_count(scheme.get("num_bits")) if scheme.get("type") == "float" else None
        if bits == 8 and scheme.get("dynamic") is not False:
            return "unknown"
        return {8: "FP8", 4: "NVFP4"}.get(bits or 0, "unknown")
    return as_text(scheme) or as_text(config.get("kv_cache_quant_algo"))


def _modelopt(config: Json) -> DeclaredScheme:
    algo = as_text(config.get("quant_algo"))
    patterns = as_texts(config.get("ignore")) or as_texts(config.get("exclude_modules"))
    kv_cache = modelopt_kv_cache(config)
    if algo == "MIXED_PRECISION":
        layout_of = _mixed_layouts(as_object(config.get("quantized_layers")))
    else:
        layout = MODELOPT_LAYOUTS.get(algo.upper(), UnjudgedLayout(algo or "no quant_algo"))
        layout_of = _same_for_all(layout)
    return DeclaredScheme("modelopt", f"modelopt {algo}", PatternList(patterns, matches_modelopt), layout_of, kv_cache)


def _same_for_all(layout: ModuleLayout) -> Callable[[str], ModuleLayout]:
    return lambda module: layout


def _mixed_layouts(layers: Json) -> Callable[[str], ModuleLayout]:
    """Listed by its own name, or as one of a layer's experts; what is not listed is unquantized."""
    algos = {name: as_text(as_object(entry).get("quant_algo")) for name, entry in layers.items()}

    def layout_of(module: str) -> ModuleLayout:
        # Of experts servers build one module, which may be listed by itself; a key stands for no other parent (vLLM
        # 0.33, `_resolve_quant_algo`).
        name = module if module in algos else _experts_of(module)
        if name not in algos:
            return None
        return MODELOPT_LAYOUTS.get(algos[name], UnjudgedLayout(algos[name] or "no quant_algo"))

    return layout_of


def _experts_of(module: str) -> str:
    """The module of all experts that one is below; empty for what is none's."""
    experts, dot, _ = module.rpartition(".experts.")
    return f"{experts}.experts" if dot else ""


def _fp8(config: Json) -> DeclaredScheme:
    """DeepSeek's form: E4M3 blocks with `weight_scale_inv`, a multiplier despite its name; or one scale a tensor."""
    inputs = "input_scale" if config.get("activation_scheme") == "static" else None
    block = config.get("weight_block_size")
    patterns = as_texts(config.get("modules_to_not_convert")) or as_texts(config.get("ignored_layers"))
    layout: Layout | UnjudgedLayout
    if isinstance(block, list) and len(block) == 2 and all(as_count(size) for size in block):
        layout = Fp8Layout("FP8_BLOCK", "weight_scale_inv", (block[0], block[1]), F32, inputs)
    elif block is None:
        layout = Fp8Layout("FP8", "weight_scale", None, F32, inputs)
    else:
        layout = UnjudgedLayout(f"fp8 with weight_block_size {block!r}")
    return DeclaredScheme("fp8", layout.name, PatternList(patterns, matches_fp8), _same_for_all(layout))


def _mxfp4(config: Json) -> DeclaredScheme:
    """GPT-OSS's own: experts alone are quantized, whatever else the list of plain modules holds."""
    # OpenAI's list has shell patterns of parents (`model.layers.*.self_attn`). Readers quantize no such module anyhow.
    listed = as_texts(config.get("modules_to_not_convert"))
    patterns = PatternList(tuple(name for name in listed if "*" not in name), matches_fp8)
    layout = Mxfp4Layout()
    return DeclaredScheme("mxfp4", "MXFP4", patterns, lambda module: layout if last(module) == "experts" else None)


def _compressed_tensors(config: Json) -> DeclaredScheme:
    default_format = as_text(config.get("format"))
    groups = [as_object(group) for group in as_object(config.get("config_groups")).values()]
    layouts = [(as_texts(group.get("targets")), _group_layout(group, default_format)) for group in groups]
    classes = [layout for targets, layout in layouts if any(map(_is_class, targets))]
    by_name = [
        (PatternList(tuple(target for target in targets if not _is_class(target)), matches_compressed_tensors), layout)
        for targets, layout in layouts
    ]

    def layout_of(module: str) -> ModuleLayout:
        """The first group that names the module; a class name (`Linear`) speaks for all that is left."""
        named = (layout for targets, layout in by_name if targets.names(module))
        # compressed-tensors lets a name overrule a class.
        return next(chain(named, classes), None)

    def is_named(module: str) -> bool:
        return any(targets.names(module) for targets, _ in by_name)

    kv_cache = "FP8" if as_count(as_object(config.get("kv_cache_scheme")).get("num_bits")) == 8 else ""
    ignored = PatternList(as_texts(config.get("ignore")), matches_compressed_tensors)
    label = f"compressed-tensors {default_format}"
    return DeclaredScheme("compressed-tensors", label, ignored, layout_of, kv_cache, is_named)


def _is_class(target: str) -> bool:
    """`Linear` and its like; module names begin in lower case."""
    return target[:1].isupper() and "." not in target


def _group_layout(group: Json, default_format: str) -> Layout | UnjudgedLayout:
    weights, inputs = as_object(group.get("weights")), as_object(group.get("input_activations"))
    file_format = as_text(group.get("format")) or default_format
    if file_format == "nvfp4-pack-quantized" and as_count(weights.get("group_size")) == 16:
        suffix = "input_global_scale" if inputs and inputs.get("dynamic") is not True else None
        name = "NVFP4" if inputs else "NVFP4A16"
        return Nvfp4Layout(name, "weight_packed", "weight_global_scale", True, suffix)
    if file_format == "pack-quantized" and _is_int4(weights) and not inputs:
        return Int4Layout("INT4", as_count(weights.get("group_size")) or 0)
    is_fp8 = as_text(weights.get("type")) == "float" and as_count(weights.get("num_bits")) == 8
    strategy = as_text(weights.get("strategy"))
    block = _ct_block(weights.get("block_structure"))
    # The strategy names what shares a scale: the tensor, a row (channel) or a block.
    blocks: Mapping[str, tuple[int, int] | None] = {"tensor": None, "channel": (1, 0), "block": block}
    if file_format in ("float-quantized", "naive-quantized") and is_fp8 and strategy in blocks:
        suffix = "input_scale" if inputs and inputs.get("dynamic") is False else None
        return Fp8Layout(f"FP8 ({strategy})", "weight_scale", blocks[strategy], FLOATS, suffix, weight_only=not inputs)
    return UnjudgedLayout(file_format or "compressed-tensors without a format")


def _is_int4(weights: Json) -> bool:
    """Whether a group's weights are what llm-compressor's W4A16 makes: in groups, symmetric, columns in their order."""
    is_plain = weights.get("symmetric") is not False and not weights.get("actorder") and not weights.get("dynamic")
    kind = as_text(weights.get("type")), as_count(weights.get("num_bits")), as_text(weights.get("strategy"))
    # Codes of a row fill whole integers only in multiples of eight.
    size = as_count(weights.get("group_size")) or 0
    return is_plain and kind == ("int", 4, "group") and size > 0 and size % 8 == 0


def _ct_block(value: object) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2 and all(as_count(size) for size in value):
        return value[0], value[1]
    return 128, 128
