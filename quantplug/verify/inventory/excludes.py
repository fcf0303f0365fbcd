"""Which modules an exclude list keeps unquantized, as the servers read it.

ModelOpt's lists hold names and shell wildcards (in vLLM 0.33 a plain name also hits every name it is part of).
compressed-tensors' hold exact names and `re:` expressions; DeepSeek's `modules_to_not_convert` names or parts of names.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from itertools import takewhile

Matcher = Callable[[str, str], bool]  # (pattern, module) -> does the pattern name the module


def matches_modelopt(pattern: str, module: str) -> bool:
    """Exact name, parent of the module, or shell wildcard; `re:` matches nothing, as in vLLM and SGLang."""
    if pattern.startswith("re:"):
        return False
    if "*" in pattern or "?" in pattern:
        # fnmatch takes brackets for sets of characters; in the names of modules there is nothing of the kind.
        return fnmatchcase(module, pattern.replace("[", "[[]"))
    return module == pattern or module.startswith(f"{pattern}.")


def matches_compressed_tensors(pattern: str, module: str) -> bool:
    """Exact name, or a regular expression from the start of the name (`re:.*lm_head`).

    A parent's name stands for what is below it only where that is a layer's experts, of which servers build one module.
    By which names they look that up is a rule of its own (`exclude-missing`).
    """
    if pattern.startswith("re:"):
        expression = _expression(pattern.removeprefix("re:"))
        return expression is not None and expression.match(module) is not None
    return module == pattern or (pattern.endswith(".experts") and module.startswith(f"{pattern}."))


def matches_fp8(pattern: str, module: str) -> bool:
    """Whole components anywhere in the name: `lm_head`, `gate`, `model.layers.0.self_attn`."""
    return f".{pattern}." in f".{module}."


@lru_cache(maxsize=256)
def _expression(text: str) -> re.Pattern[str] | None:
    try:
        return re.compile(text)
    # A pattern is text from a stranger: what cannot be compiled matches nothing, and is a finding elsewhere.
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


def _stretches(module: str, sizes: Iterable[int]) -> Iterator[str]:
    """The runs of so many whole components of a name: with 1 and 2, `a.b.c` gives a, b, c, a.b and b.c."""
    components = module.split(".")
    for size in sizes:
        yield from (".".join(components[first : first + size]) for first in range(len(components) - size + 1))


_WILD = frozenset("*?")
_Ends = tuple[str, str]  # the components before the first wildcard, and the last component; empty where it is wild


@dataclass(frozen=True)
class PatternList:
    """Patterns and the way their tool reads them.

    Lists of large models have hundreds of names, and tens of thousands of modules to hold against them. So each module
    looks up what could name it: names by its own prefixes, wildcards by the components they begin and end with. Time
    grows with the modules and with what is found, not with modules times patterns.
    """

    patterns: tuple[str, ...]
    matcher: Matcher

    def names(self, module: str) -> bool:
        return next(self.matching(module), None) is not None

    def matching(self, module: str) -> Iterator[str]:
        """The patterns that name a module, each once."""
        # Runs of components may begin anywhere in a name, so each run of a length that some pattern has is looked up.
        if self.matcher is matches_fp8:
            yield from self._names.intersection(_stretches(module, self._sizes))
            return
        prefixes = list(_prefixes(module))
        yield from (prefix for prefix in prefixes if prefix in self._names and self.matcher(prefix, module))
        last = module.rpartition(".")[2]
        # What stands before a wildcard is a prefix of the name, and of no name at all for one that begins with it.
        for key in ((begin, end) for begin in (*prefixes, "") for end in dict.fromkeys((last, ""))):
            yield from (pattern for pattern in self._wild.get(key, ()) if self.matcher(pattern, module))

    def hits(self, modules: Iterable[str]) -> Mapping[str, list[str]]:
        """Each pattern that names one of the modules or more, with these, in their order."""
        found: dict[str, list[str]] = {}
        for module in modules:
            for pattern in self.matching(module):
                found.setdefault(pattern, []).append(module)
        return found

    def is_name(self, pattern: str) -> bool:
        """The pattern stands for one module and what is below it."""
        return self.matcher is not matches_fp8 and not self._is_wild(pattern)

    def _is_wild(self, pattern: str) -> bool:
        return self.matcher is not matches_fp8 and (
            pattern.startswith("re:") or (self.matcher is matches_modelopt and not _WILD.isdisjoint(pattern))
        )

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(pattern for pattern in self.patterns if not self._is_wild(pattern))

    @cached_property
    def _sizes(self) -> frozenset[int]:
        return frozenset(pattern.count(".") + 1 for pattern in self._names)

    @cached_property
    def _wild(self) -> Mapping[_Ends, tuple[str, ...]]:
        found: dict[_Ends, dict[str, None]] = {}
        for pattern in self.patterns:
            if self._is_wild(pattern):
                found.setdefault(_ends(pattern), {})[pattern] = None
        return {ends: tuple(patterns) for ends, patterns in found.items()}


def _ends(pattern: str) -> _Ends:
    """What a wildcard's names begin and end with, as whole components; a regular expression may match anything."""
    if pattern.startswith("re:"):
        return "", ""
    components = pattern.split(".")
    begin = takewhile(lambda component: _WILD.isdisjoint(component), components)
    last = components[-1]
    return ".".join(begin), last if _WILD.isdisjoint(last) else ""


class NamesByPart:
    """Names found by what they contain from the beginning of one of their components on."""

    def __init__(self, names: Iterable[str]) -> None:
        self._ends = sorted((end, name) for name in names for end in _suffixes(name))

    def containing(self, part: str) -> list[str]:
        """The names that hold this part and go on in the same component: `b.c` is in `a.b.cd`, not in `a.b.c.d`."""
        found: dict[str, None] = {}
        # Sorted by end, all ends that begin with the part are neighbours: no name is looked at in vain.
        for place in range(bisect_left(self._ends, (part, "")), len(self._ends)):
            end, name = self._ends[place]
            if not end.startswith(part):
                break
            if not end.startswith(f"{part}."):
                found[name] = None
        return list(found)


def _suffixes(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.partition(".")[2]


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
    # `layers.1*` is meant for layer 1, and names 10 to 19 as well.
    if body[-1:].isdigit():
        return f"also names {body}0 to {body}9"
    beyond = [module for module in hit if module[len(body) : len(body) + 1] not in ("", ".")]
    return f"goes beyond the name {body}" if beyond else None
