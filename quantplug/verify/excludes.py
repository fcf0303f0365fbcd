"""Which modules an exclude list keeps unquantized, as the servers read it.

ModelOpt's lists hold names and shell wildcards (in vLLM 0.33 a plain name also hits every name it is part of).
compressed-tensors' hold names and `re:` expressions; DeepSeek's `modules_to_not_convert` names or parts of names.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache

Matcher = Callable[[str, str], bool]  # (pattern, module) -> does the pattern name the module


def matches_modelopt(pattern: str, module: str) -> bool:
    """Exact name, parent of the module, or shell wildcard; `re:` matches nothing, as in vLLM and SGLang."""
    if pattern.startswith("re:"):
        return False
    if "*" in pattern or "?" in pattern:
        return fnmatchcase(module, pattern.replace("[", "[[]"))
    return module == pattern or module.startswith(f"{pattern}.")


def matches_compressed_tensors(pattern: str, module: str) -> bool:
    """Exact name or parent, or a regular expression from the start of the name (`re:.*lm_head`)."""
    if pattern.startswith("re:"):
        expression = _expression(pattern.removeprefix("re:"))
        return expression is not None and expression.match(module) is not None
    return module == pattern or module.startswith(f"{pattern}.")


def matches_fp8(pattern: str, module: str) -> bool:
    """Whole components anywhere in the name: `lm_head`, `gate`, `model.layers.0.self_attn`."""
    return f".{pattern}." in f".{module}."


@lru_cache(maxsize=256)
def _expression(text: str) -> re.Pattern[str] | None:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return None


def is_valid_expression(text: str) -> bool:
    return _expression(text) is not None


def with_parents(modules: Iterable[str]) -> frozenset[str]:
    """The names and every prefix of theirs that ends before a dot."""
    return frozenset(prefix for module in modules for prefix in _prefixes(module))


def _prefixes(module: str) -> Iterator[str]:
    while module:
        yield module
        module = module.rpartition(".")[0]


@dataclass(frozen=True)
class ExcludeList:
    """Patterns and the way their tool reads them.

    Lists of large models have hundreds of names, and tens of thousands of modules to hold against them: plain names are
    looked up, only the others are matched one by one.
    """

    patterns: tuple[str, ...]
    matcher: Matcher

    def excludes(self, module: str) -> bool:
        return not self._names.isdisjoint(_prefixes(module)) or any(self.matcher(p, module) for p in self._others)

    def hits(self, pattern: str, modules: Iterable[str]) -> list[str]:
        return [module for module in modules if self.matcher(pattern, module)]

    def is_name(self, pattern: str) -> bool:
        """The pattern stands for one module and what is below it."""
        return self.matcher is not matches_fp8 and not pattern.startswith("re:") and not set(pattern) & set("*?")

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(pattern for pattern in self.patterns if self.is_name(pattern))

    @cached_property
    def _others(self) -> tuple[str, ...]:
        return tuple(pattern for pattern in self.patterns if pattern not in self._names)


def overreach(pattern: str, hit: Iterable[str]) -> str | None:
    """Why a ModelOpt wildcard is broader than an exact name, `prefix.*`, `*.name` or `a.*.b`; None when it is not.

    Args:
        hit: The names on disk, and the servers' merged names, that the pattern matches.
    """
    components = pattern.split(".")
    if all(component == "*" or not set(component) & set("*?") for component in components):
        return None
    body = pattern.removesuffix("*")
    if set(body) & set("*?"):
        return "may begin, go on or end anywhere in a name"
    if body[-1:].isdigit():
        return f"also names {body}0 to {body}9"
    beyond = [module for module in hit if module[len(body) : len(body) + 1] not in ("", ".")]
    return f"goes beyond the name {body}" if beyond else None
