"""Rules on exclude lists (row 10): exact names, nothing that matches too little or too much."""

from collections.abc import Iterator

from quantplug.export.verify import excludes, names
from quantplug.export.verify.checks import Check
from quantplug.export.verify.modules import Inventory, Module
from quantplug.export.verify.report import Finding, Severity, error, warning

_SHOWN = 4


def _listed(modules: list[str]) -> str:
    more = f" and {len(modules) - _SHOWN} more" if len(modules) > _SHOWN else ""
    return ", ".join(modules[:_SHOWN]) + more


def _known(inventory: Inventory) -> list[str]:
    """Modules on disk, and the head that tied embeddings leave out."""
    tied = inventory.checkpoint.config.get("tie_word_embeddings") is True
    return [*inventory.modules, *(["lm_head"] if tied and "lm_head" not in inventory.modules else [])]


def patterns(inventory: Inventory) -> Iterator[Finding]:
    """Each pattern names something, and no more than it seems to."""
    known = _known(inventory)
    for pattern in inventory.scheme.excludes:
        if pattern.startswith("re:") and inventory.scheme.method != "compressed-tensors":
            yield error(Check.EXCLUDE_PATTERN, pattern, "vLLM and SGLang ignore re: patterns; write the names")
        elif pattern.startswith("re:") and not excludes.is_valid_expression(pattern.removeprefix("re:")):
            yield error(Check.EXCLUDE_PATTERN, pattern, "is not a regular expression")
        elif not excludes.hits(inventory.scheme.matcher, pattern, known):
            severity = Severity.ERROR if inventory.scheme.method == "modelopt" else Severity.WARNING
            yield Finding(severity, Check.EXCLUDE_PATTERN, pattern, "matches no module on disk")
        elif inventory.scheme.method == "modelopt":
            yield from _breadth(inventory, pattern)


def _breadth(inventory: Inventory, pattern: str) -> Iterator[Finding]:
    merged = [group.fused for group in inventory.fused_groups]
    hit = excludes.hits(inventory.scheme.matcher, pattern, [*inventory.modules, *merged])
    reason = excludes.overreach(pattern, hit)
    if reason is not None:
        message = f"{reason}; it hits {_listed(hit)}: write exact names or prefix.*"
        yield error(Check.EXCLUDE_PATTERN, pattern, message)
    elif "*" not in pattern:
        yield from _plain_name(inventory, pattern, merged)


def _plain_name(inventory: Inventory, pattern: str, merged: list[str]) -> Iterator[Finding]:
    if pattern not in inventory.modules and any(name.startswith(f"{pattern}.") for name in inventory.modules):
        message = f"names a parent: TensorRT-LLM and SGLang want the whole name, write {pattern}.*"
        yield warning(Check.EXCLUDE_PATTERN, pattern, message)
    swallowed = [name for name in merged if pattern in name and not name.startswith(f"{pattern}.")]
    if swallowed:
        message = f"is part of the name {_listed(swallowed)}, which vLLM then leaves unquantized too"
        yield warning(Check.EXCLUDE_PATTERN, pattern, message)


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
            yield from _must_be_plain(inventory, module, "the head", severity)
        elif names.is_embedding(module.name) and module.quantized:
            yield error(Check.EXCLUDE_MISSING, module.name, "an embedding, yet quantized: no server reads that")


def _must_be_plain(inventory: Inventory, module: Module, what: str, severity: Severity) -> Iterator[Finding]:
    if module.excluded:
        return
    if module.quantized:
        yield Finding(severity, Check.EXCLUDE_MISSING, module.name, f"{what}, yet quantized")
    elif module.promised is not None and inventory.scheme.method != "fp8":
        message = f"{what}, plain on disk but on no exclude list: servers expect it quantized"
        yield error(Check.EXCLUDE_MISSING, module.name, message)


RULES = (patterns, sensitive)
