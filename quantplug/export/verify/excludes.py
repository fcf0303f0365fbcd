"""Which modules an exclude list keeps unquantized, as the servers read it.

ModelOpt's lists hold names and shell wildcards (in vLLM 0.33 a plain name also hits
every name it is part of).
compressed-tensors holds names and `re:` expressions; DeepSeek's `modules_to_not_convert` names or parts of names.
"""

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import lru_cache

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


def hits(matcher: Matcher, pattern: str, modules: Iterable[str]) -> list[str]:
    return [module for module in modules if matcher(pattern, module)]


def overreach(pattern: str, hit: Iterable[str]) -> str | None:
    """Why a ModelOpt wildcard is broader than an exact name, `prefix.*` or `*.name`; None when it is not.

    Args:
        hit: The names on disk, and the servers' merged names, that the pattern matches.
    """
    body = pattern.removesuffix("*")
    if "*" in body.removeprefix("*") or "?" in pattern:
        return "has a wildcard inside"
    if body.startswith("*") and (pattern.endswith("*") or not body.startswith("*.")):
        return "may begin and end anywhere in a name"
    if not pattern.endswith("*") or body.endswith("."):
        return None
    if body[-1:].isdigit():
        return f"also names {body}0 to {body}9"
    beyond = [module for module in hit if module[len(body) : len(body) + 1] not in ("", ".")]
    return f"goes beyond the name {body}" if beyond else None
