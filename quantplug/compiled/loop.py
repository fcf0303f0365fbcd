"""Loops by name, each with machine code for every kind of arguments that it has been called with."""

import os
import sys
from array import array
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from quantplug.compiled import cache as object_files
from quantplug.compiled.arguments import Argument, ArgumentKind, as_words

_HERE = Path(__file__).parent


class _Code(NamedTuple):
    """Machine code that is there as long as this is."""

    call: Callable[[int], None]
    memory: object


class Loop:
    """A loop over arrays, which it fills; it gives nothing back.

    It is called with contiguous arrays, aligned, of one, two or four dimensions, and with integers and floats. The
    interpreter's lock is let go of meanwhile, so that threads can work on pieces of an array.
    """

    def __init__(self, home: "Home", name: str) -> None:
        self._home, self._name = home, name
        self._codes: dict[tuple[ArgumentKind, ...], _Code] = {}
        self._lock = Lock()

    def __call__(self, *arguments: Argument) -> None:
        """Runs the loop; the first call for a kind of arguments reads its machine code, or compiles it."""
        kinds, words = as_words(arguments)
        code = self._codes.get(kinds) or self._find(kinds)
        in_memory = array("q", words)
        code.call(in_memory.buffer_info()[0])

    def _find(self, kinds: tuple[ArgumentKind, ...]) -> _Code:
        with self._lock:  # Threads come with their pieces at once.
            if kinds not in self._codes:
                self._codes[kinds] = self._home.code(self._name, kinds)
            return self._codes[kinds]


class Home:
    """A module of loops, functions that numba's `njit` has made; it is imported when one of them is to be compiled.

    Args:
        module: Its name.
        sources: The folder of all that its machine code is made of: what its loops call, wherever that is written,
            becomes part of it, and so do constants.
    """

    def __init__(self, module: str, sources: Path) -> None:
        self.module, self._sources = module, sources

    def require(self) -> None:
        """Finds out whether loops can be had here.

        Raises:
            ImportError: numba is not here, or not for this version of Python or NumPy, or told not to compile.
        """
        if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
            raise ImportError("NUMBA_DISABLE_JIT is set: loops are nothing without their machine code")
        if find_spec("numba") is None:
            raise ImportError("numba is not installed")
        # What has compiled a loop here can compile the next one; only where nothing has is that found out.
        if object_files.is_empty_of(self._digest):
            import_module(self.module)

    def loop(self, name: str) -> Loop:
        """One of its functions."""
        return Loop(self, name)

    def code(self, name: str, kinds: Sequence[ArgumentKind]) -> _Code:
        """Machine code of one of its functions, read where it has been compiled before."""
        from quantplug.compiled import machine

        file_name = f"{self._digest}-{sha256(repr((name, kinds)).encode()).hexdigest()[:32]}"
        object_file = object_files.load(file_name)
        if object_file is None:
            from quantplug.compiled.compiler import compiled

            fresh = compiled(vars(import_module(self.module))[name], kinds)
            if fresh.object_file is None:
                return _Code(machine.callable_at(fresh.callback.address), fresh.callback)
            object_file = fresh.object_file
            object_files.save(file_name, object_file)
        loaded = machine.Loaded(object_file)
        return _Code(machine.callable_at(loaded.address), loaded)

    def sources(self) -> list[Path]:
        """The files of which another word makes it other code."""
        return [file for folder in (_HERE, self._sources) for file in sorted(folder.rglob("*.py"))]

    @cached_property
    def _digest(self) -> str:
        """Of all that machine code depends on, but the loop itself."""
        sources = [sha256(file.read_bytes()).hexdigest() for file in self.sources()]
        return sha256(repr((_surroundings(), self.module, sources)).encode()).hexdigest()[:32]


@cache
def _surroundings() -> tuple[object, ...]:
    """Releases, machine and settings of the compiler."""
    from quantplug.compiled import machine

    releases = [version(name) for name in ("numba", "llvmlite", "numpy")]
    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith("NUMBA_"))
    return (*releases, sys.implementation.cache_tag, machine.processor(), settings)
