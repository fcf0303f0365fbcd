"""Pickles read as plain data: the same data that Python's own reader makes, and nothing runs."""

import argparse
import collections
import enum
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantplug.checkpoint.untrusted.pickles import Made, Named, Outside, UnusablePickleError, read_pickle
from tests.checkpoint.torch_dist.written import Touching

PATH = f"{Path.__module__}.Path"  # A module of its own in Python 3.13.
SHARED = [1]
PLAIN: dict[str, Any] = {
    "scalars": [None, True, False, 0, 255, 256, 65536, -1, 2**40, -(2**70), 1.5, float("inf"), "ä", b"\xff", ""],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "nested": {"a": {"b": [{"c": (1, [2])}]}, ("x", 1): 3},
    "sets": {1, "two"},
    "shared": [SHARED, SHARED],
    "long text": "x" * 100_000,
}


class Mode(enum.Enum):
    FAST = "fast"


class Slots:
    __slots__ = ("size",)

    def __init__(self) -> None:
        self.size = 3


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", PLAIN.values(), ids=PLAIN.keys())
def test_plain_data_is_what_python_reads(value: Any, protocol: int) -> None:
    # Bytes of the oldest protocols are text and a call to encode it.
    if protocol < 3 and isinstance(value, list):
        value = [each for each in value if not isinstance(each, bytes)]
    # Those of sets a call of `set`.
    if protocol < 4 and isinstance(value, set):
        value = sorted(map(str, value))

    assert read_pickle(pickle.dumps(value, protocol)) == value


SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=5) | st.binary(max_size=5)
KEYS = SCALARS | st.tuples(SCALARS, SCALARS)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    sequences = st.lists(inner, max_size=5)
    return sequences | sequences.map(tuple) | st.dictionaries(KEYS, inner, max_size=5)


@given(value=st.recursive(SCALARS, containers, max_leaves=40), protocol=st.integers(3, pickle.HIGHEST_PROTOCOL))
def test_any_plain_data_is_what_python_reads(value: Any, protocol: int) -> None:
    # Twice, so that memory is read as well as written.
    assert read_pickle(pickle.dumps([value, value], protocol)) == [value, value]


def test_one_list_that_is_there_twice_is_one_list() -> None:
    first, second = read_pickle(pickle.dumps([SHARED, SHARED]))

    assert first is second


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_would_be_called_stays_a_record(protocol: int, tmp_path: Path) -> None:
    content = pickle.dumps(Touching(tmp_path / "ran"), protocol)

    made = read_pickle(content)

    assert isinstance(made, Made)
    assert (made.of.rpartition(".")[2], made.arguments) == ("open", (str(tmp_path / "ran"), "w"))
    assert not (tmp_path / "ran").exists()
    # Python's own reader does call it, or this would prove nothing.
    pickle.loads(content).close()
    assert (tmp_path / "ran").exists()


def test_objects_keep_their_state() -> None:
    namespace, mode, slots = read_pickle(pickle.dumps((argparse.Namespace(layers=2), Mode.FAST, Slots())))

    assert (namespace.of, namespace.state) == ("argparse.Namespace", {"layers": 2})
    assert mode.arguments == ("fast",)
    assert slots.state == (None, {"size": 3})


def test_kinds_of_containers_keep_their_items() -> None:
    ordered, queue = read_pickle(pickle.dumps((collections.OrderedDict(a=1), collections.deque([1, 2]))))

    assert ordered.items == [("a", 1)]
    assert queue.items == [1, 2]


def test_classes_stay_names() -> None:
    assert read_pickle(pickle.dumps([Path, Path])) == [Named(PATH)] * 2


def test_what_lies_outside_is_told_by_its_place() -> None:
    assert read_pickle(b"\x80\x02K\x07Q.").place == 7
    assert isinstance(read_pickle(b"P7\n."), Outside)


def test_only_names_that_are_allowed_may_stand_in_it() -> None:
    content = pickle.dumps([argparse.Namespace(), Path])

    with pytest.raises(UnusablePickleError, match=f"names {re.escape(PATH)}, which is no part of such a file"):
        read_pickle(content, {"argparse.Namespace"})
    assert read_pickle(content, {"argparse.Namespace", PATH})


def deep_tuple(levels: int) -> bytes:
    return b")" + b"\x85" * levels


MADE_UP = {
    "nothing": b"",
    "no end": b"\x80\x04K\x01",
    "text": b"{}",
    "an empty stack": b"\x80\x04.",
    "a mark that is not there": b"\x80\x04t.",
    "memory that is not there": b"\x80\x04h\x05.",
    "a call of a number": b"\x80\x04K\x01)R.",
    "a state for a class": b"\x80\x04cos\nsystem\n}b.",
    "keys for a number": b"\x80\x04K\x01K\x02K\x03s.",
    "elements for a number": b"\x80\x04K\x01K\x02a.",
    "an odd number of keys": b"\x80\x04}(K\x01u.",
    "a list for a key": b"\x80\x04}]K\x01s.",
    # Hashed by Python's own reader these would end the process, or never end.
    "a deep tuple for a key": b"\x80\x04}" + deep_tuple(100_000) + b"K\x01s.",
    "a tuple shared many times for a key": b"\x80\x04})" + b"2\x86" * 60 + b"K\x01s.",
    "a name of numbers": b"\x80\x04K\x01K\x02\x93.",
    "an extension": b"\x80\x04\x82\x01.",
    "more bytes than there are": b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.",
}


@pytest.mark.parametrize("content", MADE_UP.values(), ids=MADE_UP.keys())
def test_what_is_made_up_is_refused(content: bytes) -> None:
    with pytest.raises(UnusablePickleError):
        read_pickle(content)


def test_a_place_in_memory_costs_no_more_than_its_entry() -> None:
    # Python's own reader makes room for all places before it: 32 GiB.
    assert read_pickle(b"\x80\x04K\x07r\xff\xff\xff\xff0j\xff\xff\xff\xff.") == 7


# Buffers outside of the pickle, registered extensions, and what the oldest protocol calls by a name in one instruction.
@pytest.mark.parametrize("name", ["NEXT_BUFFER", "READONLY_BUFFER", "EXT1", "EXT2", "EXT4", "INST"])
def test_instructions_that_no_checkpoint_needs_are_refused_by_name(name: str) -> None:
    code = next(code for code in pickletools.opcodes if code.name == name).code.encode("latin-1")

    with pytest.raises(UnusablePickleError, match=name):
        read_pickle(b"(" + code + b"os\nsystem\n.")
