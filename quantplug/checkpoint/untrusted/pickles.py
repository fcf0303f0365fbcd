"""What a pickle would make, as plain data: nothing that it names is imported, called or made.

Checkpoints of trainers are pickles (`.metadata`, `common.pt`, settings of quantizers), and a pickle may name any
function to be called. Here its instructions are read by the standard library's disassembler (`pickletools.genops`,
which runs none of them) and carried out on plain containers; a class or a function stays the name that it is, and what
would have been made of it is a record of its arguments and state.
"""

import pickle
import pickletools
from collections.abc import Callable, Container, Hashable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from quantplug.printable import shown

_MOST_LISTS = 4


@dataclass(frozen=True)
class Named:
    """A class or a function that a pickle names.

    Attributes:
        name: Its module and its name, such as `torch.Size`.
    """

    name: str


@dataclass(eq=False, slots=True)
class Made:
    """What would have been made by calling something that a pickle names.

    Attributes:
        of: Name of the class or function.
        arguments: What it would have been called with.
        state: What `__setstate__` would have been given; None if nothing.
        items: What would have been put into it afterwards, as pairs of a dict or elements of a list.
    """

    of: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Outside:
    """What lies outside of the pickle, such as the data of a tensor.

    Attributes:
        place: What the pickle says of it.
    """

    place: Any


class UnusablePickleError(ValueError):
    """A pickle that no reader of pickles would take, or that has more than data; the text is the reason."""


def only_one(value: Any) -> Any:
    """What lists of one element hold: an object is kept as a list, with one for every rank that had it.

    A list may hold itself: no more of them are opened than a writer makes.
    """
    for _ in range(_MOST_LISTS):
        if not isinstance(value, list) or len(value) != 1:
            break
        value = value[0]
    return value


def said(value: Any) -> str:
    """A value of a pickle in a few words. To spell out a container may take for ever, as it may hold another often."""
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number of too many digits"
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return shown(value)
    name = value.of if isinstance(value, Made) else value.name if isinstance(value, Named) else type(value).__name__
    return f"a {name}"[:100]


def read_pickle(content: bytes, allowed: Container[str] | None = None) -> Any:
    """What a pickle holds: plain values and containers, and `Named`, `Made` and `Outside` in them.

    Containers may be shared, and may be in themselves: whoever walks them must look at no more than he expects. Keys of
    dicts and elements of sets are flat.

    Args:
        allowed: Names of the classes and functions that it may name; None for any.

    Raises:
        UnusablePickleError: It is damaged, names something that is not allowed, or has instructions that no checkpoint
            needs.
    """
    try:
        return _run(content, _Machine(allowed))
    except UnusablePickleError:
        raise
    # A pickle that is cut or made up: the disassembler says so, or what is taken from the stack is not there.
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UnusablePickleError(f"is no pickle that can be read: {type(error).__name__}: {error}"[:300]) from error


_OPCODES = {ord(code.code): code for code in pickletools.opcodes}
_STOP = ord(pickle.STOP)
# What an index of a large model consists of, nearly all of it: 13 million instructions for 168,000 chunks.
_MEMOIZE, _BINGET, _LONG_BINGET = ord(pickle.MEMOIZE), ord(pickle.BINGET), ord(pickle.LONG_BINGET)
_BININT1, _BININT2 = ord(pickle.BININT1), ord(pickle.BININT2)
_EMPTY_TUPLE, _TUPLE1, _TUPLE2 = ord(pickle.EMPTY_TUPLE), ord(pickle.TUPLE1), ord(pickle.TUPLE2)
_MARK, _EMPTY_DICT, _SETITEMS = ord(pickle.MARK), ord(pickle.EMPTY_DICT), ord(pickle.SETITEMS)
_CALLS, _BUILD = frozenset({ord(pickle.REDUCE), ord(pickle.NEWOBJ)}), ord(pickle.BUILD)


def _run(content: bytes, machine: "_Machine") -> Any:
    """Carries out instructions up to the last one, and gives what it leaves.

    The frequent ones by their codes, from the most frequent on, as a call for each would take five times as long; all
    others, and whatever is unusual of these, by `_Machine.do` from what the disassembler says of them.
    """
    stream, at = BytesIO(content), 0
    memory: dict[int, Any] = machine.memory
    stack: list[Any] = machine.stack
    while True:
        code = content[at]
        at += 1
        if code == _MEMOIZE:
            memory[len(memory)] = stack[-1]
        elif code == _BINGET:
            stack.append(memory[content[at]])
            at += 1
        elif code == _LONG_BINGET:
            stack.append(memory[int.from_bytes(content[at : at + 4], "little")])
            at += 4
        elif code == _BININT2:
            stack.append(content[at] | content[at + 1] << 8)
            at += 2
        elif code == _TUPLE1:
            stack[-1] = (stack[-1],)
        elif code == _TUPLE2:
            last = stack.pop()
            stack[-1] = (stack[-1], last)
        elif code == _EMPTY_TUPLE:
            stack.append(())
        elif code == _BININT1:
            stack.append(content[at])
            at += 1
        elif code == _EMPTY_DICT:
            stack.append({})
        elif code in _CALLS and type(stack[-1]) is tuple and type(stack[-2]) is Named:
            arguments, called = stack.pop(), stack.pop()
            stack.append(Made(called.name, arguments, None, []))
        elif code == _BUILD and type(stack[-2]) is Made:
            state = stack.pop()
            stack[-1].state = state
        elif code == _MARK:
            machine.mark()
            stack = machine.stack
        elif code == _SETITEMS:
            pairs = machine.take_marked()
            stack = machine.stack
            machine.put(pairs)
        elif code == _STOP:
            return stack.pop()
        else:
            opcode = _OPCODES[code]
            stream.seek(at)
            argument = None if opcode.arg is None else opcode.arg.reader(stream)
            at = stream.tell()
            machine.do(opcode.name, argument)
            stack = machine.stack


_PUSHED_ARGUMENTS = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_FLAT = (str, bytes, int, float, bool, type(None), Named, Made)


class _Machine:
    """The stack and the memory that a pickle's instructions work on."""

    def __init__(self, allowed: Container[str] | None) -> None:
        self.stack: list[Any] = []
        self._allowed = allowed
        self.memory: dict[int, Any] = {}
        self._below_marks: list[list[Any]] = []  # As in Python's own reader: a mark puts the stack aside.

    def do(self, name: str, argument: Any) -> None:
        if name in _PUSHED_ARGUMENTS:
            self.push(argument)
        elif name in _CONSTANTS:
            self.push(_CONSTANTS[name])
        elif name.endswith("GET"):
            self.push(self.memory[argument])
        elif name == "MEMOIZE":
            self.memory[len(self.memory)] = self.stack[-1]
        elif name.endswith("PUT"):
            self.memory[argument] = self.stack[-1]
        elif name in _INSTRUCTIONS:
            _INSTRUCTIONS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise UnusablePickleError(f"has the instruction {name}, which no checkpoint needs")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def take(self, count: int) -> list[Any]:
        """The last values of the stack, the last one last."""
        return [self.stack.pop() for _ in range(count)][::-1]

    def mark(self) -> None:
        self._below_marks.append(self.stack)
        self.stack = []

    def take_marked(self) -> list[Any]:
        """All that lies above the last mark."""
        above = self.stack
        self.stack = self._below_marks.pop()
        return above

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.take_marked()

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name that is no text")
        full = f"{module}.{name}"
        if self._allowed is not None and full not in self._allowed:
            raise UnusablePickleError(f"names {full}, which is no part of such a file")
        self.push(Named(full))

    def make(self, called: Any, arguments: Any, keywords: Any = None) -> None:
        if not isinstance(called, Named) or not isinstance(arguments, tuple):
            raise TypeError("a call of what is no name")
        self.push(Made(called.name, arguments if keywords is None else (*arguments, keywords)))

    def make_marked(self) -> None:
        called, *arguments = self.take_marked()
        self.make(called, tuple(arguments))

    def set_state(self, state: Any) -> None:
        made = self.stack[-1]
        if not isinstance(made, Made):
            raise TypeError("a state for what has none")
        made.state = state

    def put(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Made):
            target.items.extend(zip(pairs[::2], pairs[1::2], strict=True))
        elif isinstance(target, dict):
            target.update(_dict_of(pairs))
        else:
            raise TypeError("keys for what is no dict")

    def extend(self, elements: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Made):
            target.items.extend(elements)
        elif isinstance(target, list):
            target.extend(elements)
        else:
            raise TypeError("elements for what is no list")

    def add(self, elements: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, set):
            raise TypeError("elements for what is no set")
        target.update(map(_flat, elements))


def _dict_of(pairs: list[Any]) -> dict[Hashable, Any]:
    keys = pairs[::2]
    # Nearly all are names of fields.
    if not all(type(key) is str for key in keys):
        keys = [_flat(key) for key in keys]
    return dict(zip(keys, pairs[1::2], strict=True))


def _flat(key: Any) -> Hashable:
    """A key that is hashed in one step: nested tuples may be made so deep, or so often shared, that it never ends."""
    if isinstance(key, _FLAT) or (isinstance(key, tuple) and all(isinstance(each, _FLAT) for each in key)):
        hashable: Hashable = key
        return hashable
    raise TypeError("a key that is not flat")


_INSTRUCTIONS: Mapping[str, Callable[[_Machine, Any], object]] = {
    "MARK": lambda it, _: it.mark(),
    "POP": lambda it, _: it.pop(),
    "POP_MARK": lambda it, _: it.take_marked(),
    "DUP": lambda it, _: it.push(it.stack[-1]),
    "EMPTY_LIST": lambda it, _: it.push([]),
    "EMPTY_DICT": lambda it, _: it.push({}),
    "EMPTY_SET": lambda it, _: it.push(set()),
    "TUPLE1": lambda it, _: it.push(tuple(it.take(1))),
    "TUPLE2": lambda it, _: it.push(tuple(it.take(2))),
    "TUPLE3": lambda it, _: it.push(tuple(it.take(3))),
    "TUPLE": lambda it, _: it.push(tuple(it.take_marked())),
    "LIST": lambda it, _: it.push(it.take_marked()),
    "DICT": lambda it, _: it.push(_dict_of(it.take_marked())),
    "FROZENSET": lambda it, _: it.push(set(map(_flat, it.take_marked()))),
    "APPEND": lambda it, _: it.extend(it.take(1)),
    "APPENDS": lambda it, _: it.extend(it.take_marked()),
    "SETITEM": lambda it, _: it.put(it.take(2)),
    "SETITEMS": lambda it, _: it.put(it.take_marked()),
    "ADDITEMS": lambda it, _: it.add(it.take_marked()),
    "GLOBAL": lambda it, named: it.name(*named.split(" ", 1)),
    "STACK_GLOBAL": lambda it, _: it.name(*it.take(2)),
    "REDUCE": lambda it, _: it.make(*it.take(2)),
    "NEWOBJ": lambda it, _: it.make(*it.take(2)),
    "NEWOBJ_EX": lambda it, _: it.make(*it.take(3)),
    "OBJ": lambda it, _: it.make_marked(),
    "BUILD": lambda it, _: it.set_state(*it.take(1)),
    "PERSID": lambda it, place: it.push(Outside(place)),
    "BINPERSID": lambda it, _: it.push(Outside(*it.take(1))),
}
