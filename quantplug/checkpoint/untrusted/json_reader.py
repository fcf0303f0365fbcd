"""Narrowing of JSON that somebody else wrote: the value when it is of the wanted type, else an empty one.

A checker that meets `"ignore": 7` says so in a finding of its own; nothing here raises.
"""

from collections.abc import Mapping
from typing import Any

Json = Mapping[str, Any]


def as_object(value: object) -> Json:
    return value if isinstance(value, dict) else {}


def as_text(value: object) -> str:
    return value if isinstance(value, str) else ""


def as_count(value: object) -> int | None:
    """A whole number of at least zero; JSON's true and false are none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def as_texts(value: object) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
