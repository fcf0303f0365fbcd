"""Rules on exclude lists: exact names, nothing that matches too little or too much."""

from collections.abc import Iterator

from quantplug.checkpoint.config.file import ties_embeddings
from quantplug.checkpoint.untrusted.json_reader import as_object, is_texts
from quantplug.mappings.rows import Role
from quantplug.printable import shown
from quantplug.selection.output_layer import UnreadHead, unread_output_layer
from quantplug.verify.checks import Check
from quantplug.verify.inventory import excludes, names
from quantplug.verify.inventory.excludes import NamesByPart, with_parents
from quantplug.verify.inventory.modules import Inventory, Module
from quantplug.verify.inventory.spellings import dialect_of, format_of
from quantplug.verify.report import Finding, Severity, error, warning

_SHOWN = 4
# Under which ModelOpt, compressed-tensors and DeepSeek's form name what is plain.
_LISTS = ("ignore", "exclude_modules", "modules_to_not_convert", "ignored_layers")
# Of compressed-tensors' lists vLLM asks for these linears of the first expert, whatever the checkpoint calls them, and
# by exact comparison (`CompressedTensorsMoEMethod.get_moe_method`, vLLM 0.33).
_FIRST_EXPERT = ("0.gate_proj", "0.up_proj", "0.down_proj")
# SGLang 0.5.23 (`is_layer_excluded` of modelopt_quant.py) holds the last part of such a pattern against that of every
# module's name, in all layers.
_BY_LAST_PART = {
    "q_a_proj": frozenset({"q_a_proj", "kv_a_proj_with_mqa"}),
    "kv_a_proj_with_mqa": frozenset({"q_a_proj", "kv_a_proj_with_mqa"}),
    "q_b_proj": frozenset({"q_b_proj"}),
    "kv_b_proj": frozenset({"kv_b_proj"}),
}


def _listed(modules: list[str]) -> str:
    more = f" and {len(modules) - _SHOWN} more" if len(modules) > _SHOWN else ""
    return ", ".join(modules[:_SHOWN]) + more


def patterns(inventory: Inventory) -> Iterator[Finding]:
    """Each pattern names something, and no more than it seems to."""
    tied = inventory.checkpoint.config.get("tie_word_embeddings") is True
    # ModelOpt excludes a head that is not on disk.
    modules = dict.fromkeys([*inventory.served, *(["lm_head"] if tied else [])])
    known, listed = with_parents(modules) | inventory.merged_plain, inventory.scheme.excludes
    if inventory.scheme.method == "compressed-tensors":
        known |= {name for experts in inventory.expert_groups for name in _asked(experts)}
    # Servers hold patterns against the names they give to merged modules, too.
    merged = dict.fromkeys(group.fused for group in inventory.fused_groups)
    hits = listed.hits(modules | merged)
    parts = NamesByPart(name for name in merged if name not in inventory.merged_plain)
    for pattern in listed.patterns:
        hit = hits.get(pattern, [])
        if pattern.startswith("re:") and inventory.scheme.method != "compressed-tensors":
            yield error(Check.EXCLUDE_PATTERN, pattern, "vLLM and SGLang ignore re: patterns; write the names")
        elif pattern.startswith("re:") and not excludes.is_valid_expression(pattern.removeprefix("re:")):
            yield error(Check.EXCLUDE_PATTERN, pattern, "is not a regular expression")
        elif not (pattern in known if listed.is_name(pattern) else any(name in modules for name in hit)):
            severity = Severity.ERROR if inventory.scheme.method == "modelopt" else Severity.WARNING
            yield Finding(severity, Check.EXCLUDE_PATTERN, pattern, "matches no module on disk")
        elif inventory.scheme.method == "modelopt":
            yield from _plain_name(inventory, pattern, parts) if listed.is_name(pattern) else _wildcard(pattern, hit)


def lists(inventory: Inventory) -> Iterator[Finding]:
    """Lists of what stays plain hold names alone: readers take each for text."""
    config = as_object(inventory.checkpoint.config.get("quantization_config"))
    for key in _LISTS:
        value = config.get(key)
        if value is not None and not is_texts(value):
            others = [item for item in value if not isinstance(item, str)] if isinstance(value, list) else value
            message = f"is not a list of names, but holds {shown(others)}: readers stop"
            yield error(Check.EXCLUDE_PATTERN, f"config.json {key}", message)


def _wildcard(pattern: str, hit: list[str]) -> Iterator[Finding]:
    if reason := excludes.overreach(pattern, hit):
        message = f"{reason}; it hits {_listed(hit)}: write exact names or prefix.*"
        yield error(Check.EXCLUDE_PATTERN, pattern, message)


def _plain_name(inventory: Inventory, pattern: str, parts: NamesByPart) -> Iterator[Finding]:
    if pattern not in inventory.served and pattern not in inventory.merged_plain and pattern != "lm_head":
        message = f"names a parent: TensorRT-LLM and SGLang want the whole name, write {pattern}.*"
        yield warning(Check.EXCLUDE_PATTERN, pattern, message)
    if swallowed := parts.containing(pattern):
        message = f"is part of the name {_listed(swallowed)}, which vLLM then leaves unquantized too"
        yield warning(Check.EXCLUDE_PATTERN, pattern, message)


def latent(inventory: Inventory) -> Iterator[Finding]:
    """Projections of multi-latent attention are on the list in all layers, or by a pattern of their layer."""
    if inventory.scheme.method != "modelopt":
        return
    listed = {names.last(pattern): pattern for pattern in reversed(inventory.scheme.excludes.patterns)}
    for last, alike in _BY_LAST_PART.items():
        also = [module.name for module in inventory.quantized if names.last(module.name) in alike]
        if last in listed and also:
            message = (
                f"SGLang takes it for all layers, and leaves {_listed(also)} unquantized too; "
                "name the layer by a pattern (model.layers.0.*) in both config files"
            )
            yield warning(Check.EXCLUDE_PATTERN, listed[last], message)


def plain_experts(inventory: Inventory) -> Iterator[Finding]:
    """Experts that stay plain are named as vLLM asks for them."""
    if inventory.scheme.method != "compressed-tensors":
        return
    expressions = [pattern for pattern in inventory.scheme.excludes.patterns if pattern.startswith("re:")]
    names_listed = frozenset(inventory.scheme.excludes.patterns)
    for experts, members in inventory.expert_groups.items():
        if not all(inventory.modules[name].excluded and not inventory.modules[name].quantized for name in members):
            continue
        missing = [
            name
            for name in _asked(experts)
            if name not in names_listed
            and not any(excludes.matches_compressed_tensors(pattern, name) for pattern in expressions)
        ]
        if missing:
            message = f"plain, but {', '.join(missing)} are on no exclude list: vLLM asks for these, and expects scales"
            yield error(Check.EXCLUDE_MISSING, experts, message)


def _asked(experts: str) -> list[str]:
    return [f"{experts}.{linear}" for linear in _FIRST_EXPERT]


def sensitive(inventory: Inventory) -> Iterator[Finding]:
    """Routers, the shared expert's gate, head and embeddings are plain, and the config says so."""
    if not inventory.scheme.method:
        return
    for module in inventory.routers():
        yield from _must_be_plain(inventory, module, "a router", Severity.ERROR)
    foreign = inventory.scheme.method == "compressed-tensors"
    for module in inventory.modules.values():
        if names.is_head(module.name):
            severity = Severity.WARNING if foreign else Severity.ERROR
            if not module.quantized or module.excluded:
                yield from _must_be_plain(inventory, module, "the head", severity)
            elif unread := _unread_head(inventory, module):
                message = f"the head, yet quantized: {unread.words}"
                yield (
                    warning(Check.SGLANG, module.name, message)
                    if unread.by_sglang_alone
                    else error(Check.EXCLUDE_MISSING, module.name, message)
                )
        elif names.is_embedding(module.name) and module.quantized:
            yield error(Check.EXCLUDE_MISSING, module.name, "an embedding, yet quantized: no server reads that")


def _unread_head(inventory: Inventory, module: Module) -> UnreadHead | None:
    """Why servers do not read a quantized head: by `get_quant_method` of vLLM 0.32 and SGLang 0.5.23."""
    method = inventory.scheme.method
    if names.last(module.name) != "lm_head":
        return UnreadHead("servers load one of multi-token prediction in 16 bits")
    if ties_embeddings(inventory.checkpoint.config):
        return UnreadHead("config.json ties it to the embedding, which servers look rows up in")
    if (dialect := dialect_of(method)) and (unread := unread_output_layer(dialect, format_of(method, module.layout))):
        return unread
    if not inventory.scheme.is_named(module.name):
        return UnreadHead(f"a group of Linear means no head to servers; name {module.name} in its targets")
    rows = () if inventory.known is None else inventory.known.family.mappings
    return next((UnreadHead(row.unserved) for row in rows if row.role is Role.OUTPUT_LAYER and row.unserved), None)


def _must_be_plain(inventory: Inventory, module: Module, what: str, severity: Severity) -> Iterator[Finding]:
    if module.excluded:
        return
    if module.quantized:
        yield Finding(severity, Check.EXCLUDE_MISSING, module.name, f"{what}, yet quantized")
    elif module.promised is not None and inventory.scheme.method != "fp8":
        message = f"{what}, plain on disk but on no exclude list: servers expect it quantized"
        yield error(Check.EXCLUDE_MISSING, module.name, message)


RULES = (patterns, lists, latent, plain_experts, sensitive)
