"""Rules on single modules: what is on disk is what the config promises, in the right shapes and dtypes."""

from collections.abc import Iterator

from quantplug.checkpoint.untrusted.json_reader import as_object, as_text
from quantplug.mappings.shapes.kinds import kind_of
from quantplug.selection.policy import Policy, Reason, decide
from quantplug.verify.checks import Check
from quantplug.verify.inventory import names
from quantplug.verify.inventory.checkpoint import ITEM_BYTES
from quantplug.verify.inventory.layouts import (
    KV_SUFFIXES,
    WEIGHT_SUFFIXES,
    Fp8Layout,
    Mxfp4Layout,
    Nvfp4Layout,
    UnjudgedLayout,
    is_plain,
    scale_names,
)
from quantplug.verify.inventory.modules import Inventory, Module
from quantplug.verify.inventory.spellings import code_bits
from quantplug.verify.report import Finding, error, note, warning

# Linears below which servers look for the scales of a KV cache.
_CACHED = frozenset({"k_proj", "v_proj", "qkv_proj"})
# What a KV cache can be in, as ModelOpt calls it.
_CACHES = frozenset({"FP8", "NVFP4"})


def coverage(inventory: Inventory) -> Iterator[Finding]:
    """Excluded modules are plain, all other Linears quantized."""
    if not inventory.scheme.method:
        return
    special = {module.name for module in inventory.routers()}
    for module in inventory.modules.values():
        if module.name in special or names.is_head(module.name) or names.is_embedding(module.name):
            # Whether heads, embeddings and routers should be plain at all is for the rules on exclude lists.
            if module.excluded and module.quantized:
                yield error(Check.COVERAGE, module.name, f"excluded, yet on disk with {_evidence(module)}")
            continue
        # Readers of DeepSeek's form keep these plain by their names, without a word in the config.
        deepseek_plain = inventory.scheme.method == "fp8" and names.last(module.name) in names.DEEPSEEK_PLAIN
        if module.quantized and (module.excluded or module.promised is None):
            why = "excluded" if module.excluded else "not covered by the config"
            yield error(Check.COVERAGE, module.name, f"{why}, yet on disk with {_evidence(module)}")
        elif (
            not module.excluded
            and module.promised is not None
            and module.plain_matrix is not None
            and not deepseek_plain
        ):
            message = (
                f"a plain {module.plain_matrix.dtype} matrix, neither excluded nor quantized: servers expect scales"
            )
            yield error(Check.COVERAGE, module.name, message)
        elif module.quantized and module.tensors.keys().isdisjoint(WEIGHT_SUFFIXES):
            yield error(Check.COVERAGE, module.name, f"has {_evidence(module)} but no weight")


def _evidence(module: Module) -> str:
    scales = sorted(scale_names(module.tensors))
    return ", ".join(scales) if scales else f"a weight of {module.tensors['weight'].dtype}"


def layout(inventory: Inventory) -> Iterator[Finding]:
    """Each quantized module has its tensors, with the right shapes and dtypes, and no others."""
    for module in inventory.quantized:
        if module.layout is None or module.tensors.keys().isdisjoint(WEIGHT_SUFFIXES):
            continue
        # Without the codes nothing is known of the shapes that scales should have, so they are not judged.
        if module.codes is None:
            wanted = f"{module.name}.{module.layout.codes}"
            yield error(Check.TENSOR_LAYOUT, wanted, f"missing or not a matrix, as {module.layout.name} wants it")
            continue
        yield from _parts(module)
        yield from _strangers(module)


def _parts(module: Module) -> Iterator[Finding]:
    assert module.layout is not None
    assert module.codes is not None
    for suffix, part in module.parts.items():
        name, info = f"{module.name}.{suffix}", module.tensors.get(suffix)
        # vLLM allocates the parameter and fills it from the file; nothing checks whether it was filled.
        if info is None and suffix == module.layout.input_scale:
            message = f"missing: {module.layout.name} quantizes activations, vLLM would use uninitialised memory"
            yield error(Check.INPUT_SCALE, name, message)
        elif info is None:
            yield error(Check.TENSOR_LAYOUT, name, f"missing: {module.layout.name} cannot be decoded without it")
        elif problem := part.problem(info):
            yield error(Check.TENSOR_LAYOUT, name, problem)


def _strangers(module: Module) -> Iterator[Finding]:
    assert module.layout is not None
    assert module.codes is not None
    wanted = module.parts.keys()
    for suffix in sorted(set(scale_names(module.tensors)) - wanted):
        name = f"{module.name}.{suffix}"
        if suffix in ("input_scale", "input_global_scale") and module.layout.input_scale is None:
            message = f"{module.layout.name} here is weight-only, yet there is an activation scale"
            yield error(Check.WEIGHT_ONLY, name, message)
        else:
            yield error(Check.TENSOR_LAYOUT, name, f"not a tensor of {module.layout.name}")


def alignment(inventory: Inventory) -> Iterator[Finding]:
    """`in_features` hold whole blocks."""
    for module in inventory.quantized:
        if module.layout is not None and module.codes is not None and module.layout.shape_problem(module.codes):
            yield error(Check.ALIGNMENT, module.name, module.layout.shape_problem(module.codes) or "")


def kv_cache(inventory: Inventory) -> Iterator[Finding]:
    """Scales of a quantized KV cache are there exactly when the config says so."""
    claimed = inventory.scheme.kv_cache
    present = {
        module.name: suffix for module in inventory.modules.values() for suffix in KV_SUFFIXES & module.tensors.keys()
    }
    # Readers load what the config speaks of, and drop or stumble over the rest.
    if not claimed and inventory.scheme.method:
        for name, suffix in present.items():
            yield error(
                Check.KV_SCALES, f"{name}.{suffix}", "a KV cache scale, but no config speaks of a quantized KV cache"
            )
    if claimed and claimed not in _CACHES:
        yield error(Check.NOT_JUDGED, "kv_cache_scheme", f"not judged: KV cache in {claimed}")
    if claimed not in _CACHES:
        return
    if claimed == "NVFP4":
        message = "NVFP4, which vLLM and TensorRT-LLM take up; SGLang keeps 16 bits unless --kv-cache-dtype nvfp4"
        yield note(Check.KV_SCALES, "kv_cache_scheme", message)
    if not present:
        message = f"{claimed} without scales: servers cast keys and values with a scale of 1.0"
        yield note(Check.KV_SCALES, "kv_cache_scheme", message)
        return
    config = as_object(inventory.checkpoint.config.get("quantization_config"))
    if claimed == "NVFP4" and as_text(config.get("quant_algo")) == "MIXED_PRECISION":
        message = "NVFP4 with scales, which vLLM leaves aside in MIXED_PRECISION: it takes 1.0"
        yield error(Check.KV_SCALES, "kv_cache_scheme", message)
    for name, suffix in present.items():
        # Beside an attention's linears there is no weight; servers rename what lies below these alone.
        if names.last(name) not in _CACHED and not inventory.modules[name].tensors.keys().isdisjoint(WEIGHT_SUFFIXES):
            yield error(
                Check.KV_SCALES, f"{name}.{suffix}", "a KV cache scale of a linear that makes no keys or values"
            )
    # Draft layers without scales cast with 1.0, as ModelOpt's recipes leave them: it changes what they propose alone.
    drafts = inventory.known.numbered_mtp if inventory.known is not None else range(0)
    for name in inventory.modules:
        place, attention = names.layer(name), name.rpartition(".")[0]
        if names.last(name) == "k_proj" and place is not None:
            own = {attention, f"{attention}.k_proj", f"{attention}.v_proj"}
            if place[1] not in drafts or not own.isdisjoint(present):
                yield from _kv_scales(inventory, attention)


def _kv_scales(inventory: Inventory, attention: str) -> Iterator[Finding]:
    """ModelOpt puts the scales below k_proj and v_proj, compressed-tensors beside them; servers read both."""
    is_modelopt, tensors = inventory.scheme.method == "modelopt", inventory.checkpoint.tensors
    for letter in "kv":
        below, beside = f"{attention}.{letter}_proj.{letter}_scale", f"{attention}.{letter}_scale"
        own, other = (below, beside) if is_modelopt else (beside, below)
        # The place of the method comes first; the other one counts only where the first is empty.
        name = own if own in tensors or other not in tensors else other
        info = tensors.get(name)
        if own in tensors and other in tensors:
            yield error(Check.KV_SCALES, own, f"there beside {other}: readers keep whichever they come to last")
        elif info is None:
            yield error(Check.KV_SCALES, name, "missing, and others are there: servers fall back to a scale of 1.0")
        elif info.shape not in ((), (1,)) or (is_modelopt and info.dtype != "F32") or not is_plain(info):
            yield error(Check.KV_SCALES, name, f"{info.dtype} {list(info.shape)}, expected an F32 scalar")


def scalar_shape(inventory: Inventory) -> Iterator[Finding]:
    """ModelOpt's per-tensor scales have no axes; said once for each kind."""
    if inventory.scheme.method != "modelopt":
        return
    found: dict[str, list[str]] = {}
    for module in inventory.quantized:
        for suffix in module.layout.scalars if module.layout is not None else ():
            info = module.tensors.get(suffix)
            if info is not None and info.shape == (1,):
                found.setdefault(f"{kind_of(module.name)}.{suffix}", []).append(info.name)
    # A checkpoint of one tool has it in every module or in none: one line says it.
    for kind, tensors in found.items():
        message = f"{len(tensors)} tensors have the shape [1], ModelOpt's have []: a server that copies a scalar stops"
        yield warning(Check.SCALAR_SHAPE, kind, message)


def unjudged(inventory: Inventory) -> Iterator[Finding]:
    """Formats and names that this checker does not know: said once each, since nothing was proved about them."""
    formats: dict[str, list[str]] = {}
    for module in inventory.modules.values():
        if isinstance(module.promised, UnjudgedLayout) and module.quantized and not module.excluded:
            formats.setdefault(module.promised.name, []).append(module.name)
    for name, modules in sorted(formats.items()):
        message = f"not judged: {len(modules)} modules in {name}, beginning with {modules[0]}"
        yield error(Check.NOT_JUDGED, name, message)
    for info in inventory.checkpoint.tensors.values():
        if info.dtype not in ITEM_BYTES:
            yield error(Check.NOT_JUDGED, info.name, f"not judged: dtype {info.dtype}")
        elif len(info.shape) == 3 and names.split(info.name)[0].endswith(".experts"):
            yield error(
                Check.NAMES,
                info.name,
                "experts fused in one tensor: quantized loaders want one module an expert",
            )


def transformers_reader(inventory: Inventory) -> Iterator[Finding]:
    """What transformers 5.23 opens without complaint and computes wrongly."""
    label = inventory.scheme.label
    layouts = {(module.layout, names.expert(module.name) is not None) for module in inventory.quantized}
    if any(isinstance(part, Nvfp4Layout) and part.codes == "weight_packed" and expert for part, expert in layouts):
        message = "transformers 5.23 drops weight_global_scale of NVFP4 experts without a word; serve it elsewhere"
        yield warning(Check.TRANSFORMERS, label, message)
    has_scales = any(KV_SUFFIXES & module.tensors.keys() for module in inventory.modules.values())
    if inventory.scheme.method == "compressed-tensors" and inventory.scheme.kv_cache and not has_scales:
        message = "a KV cache without scales: transformers 5.14 multiplies with memory that nobody has filled"
        yield warning(Check.TRANSFORMERS, label, message)
    listed = as_object(inventory.checkpoint.config.get("quantization_config")).get("modules_to_not_convert")
    if inventory.scheme.method == "fp8" and isinstance(listed, list):
        # Without a list it leaves the head as it is. With one it goes by that (`get_modules_to_not_convert`).
        for module in inventory.modules.values():
            if names.last(module.name) == "lm_head" and not module.quantized and not module.excluded:
                message = "plain, and modules_to_not_convert does not name it: transformers 5.14 takes it for FP8"
                yield warning(Check.TRANSFORMERS, module.name, message)
    if inventory.scheme.method == "modelopt" and any(isinstance(part, Fp8Layout) for part, _ in layouts):
        yield note(
            Check.TRANSFORMERS, label, "transformers 5.23 loads the FP8 codes without their scales; serve it elsewhere"
        )


def min_bits(inventory: Inventory) -> Iterator[Finding]:
    """Linears in fewer bits than every server reads, said once for each kind, as the policy of our exports has it."""
    kept = {bits: _kept_modules(inventory, bits) for bits in (4, 8)}
    said: set[str] = set()
    for module in inventory.quantized:
        bits = 8 if module.layout is None else code_bits(module.layout)
        # Where we have no table of the architecture, MLA's projection is known by its name.
        reads_packed = bits == 4 and names.last(module.name) == names.TAKEN_APART
        subject, words = kind_of(module.name), kept[bits].get(module.name)
        if (words is not None or reads_packed) and subject not in said:
            said.add(subject)
            message = words or "SGLang takes it apart and reads the packed bytes as weights"
            yield warning(Check.MIN_BITS, subject, f"quantized in {bits} bits: {message}; keep it in more")


def _kept_modules(inventory: Inventory, bits: int) -> dict[str, str]:
    """Modules that a format of so many bits should leave as they are, with the reason of the one policy."""
    known = inventory.known
    if known is None:
        return {}
    # Layers of multi-token prediction are quantized or not by choice, and read either way.
    decisions = decide(
        (key for _, key in known.family.expected(known.dims)), known.family, Policy(bits, quantize_mtp=True)
    )
    return {
        name.removesuffix(".weight"): decision.kept.words
        for key, decision in decisions.items()
        if decision.kept is not None and decision.kept.reason is Reason.BITS
        for name in decision.row.hf_names(key, known.dims)
    }


def served_experts(inventory: Inventory) -> Iterator[Finding]:
    """Quantized experts in a form that no server loads; said once for each kind. Found by running vLLM 0.32."""
    seen: set[str] = set()
    for module in inventory.quantized:
        subject, message = kind_of(module.name), _not_served(module)
        if message is not None and subject not in seen:
            seen.add(subject)
            yield error(Check.SERVED_EXPERTS, subject, message)


def _not_served(module: Module) -> str | None:
    if isinstance(module.layout, Mxfp4Layout):
        return None
    if module.transposed is not None and "bias" in module.tensors:
        return (
            "experts in one tensor, with biases, as GPT-OSS has them: servers read these in MXFP4 or BF16 alone; vLLM "
            "stops at the biases in NVFP4 and FP8, and skips the scales of FP8 blocks; leave the experts out"
        )
    is_expert = module.transposed is not None or names.expert(module.name) is not None
    if is_expert and isinstance(module.layout, Fp8Layout) and module.layout.weight_only:
        return (
            "experts in FP8 without quantized activations: vLLM stops ('NoneType' object has no attribute "
            "'num_bits'); use fp8_dynamic, fp8_blockwise or w4a16_nvfp4, or leave the experts out"
        )
    # `CompressedTensorsW8A8Fp8MoEMethod` of vLLM 0.33 asks for it.
    if is_expert and isinstance(module.layout, Fp8Layout) and module.layout.per_row and module.layout.input_scale:
        return "experts in FP8 with a scale a row and a static scale of inputs: vLLM wants inputs by token, dynamic"
    return None


RULES = (
    coverage, layout, alignment, scalar_shape, kv_cache, unjudged, transformers_reader, min_bits, served_experts,
)  # fmt: skip
