"""Something else by a name of Megatron's, for as long as it takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def replaced(module: ModuleType, name: str, stand_in: object) -> Iterator[None]:
    """On while a module of Megatron's has something else by this name."""
    before = vars(module)[name]
    setattr(module, name, stand_in)
    try:
        yield
    finally:
        setattr(module, name, before)
