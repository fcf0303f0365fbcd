"""Vectors of integers, for the few steps that LLVM does not make good vector instructions of by itself.

What is written here is LLVM's own code, which has vectors of any length on any machine: of 16 numbers of 16 bits it
makes one instruction where the machine has registers of 256 bits, and two or more where they are shorter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.np.arrayobj import make_array

_INDEX, _LANE = ir.IntType(64), ir.IntType(32)


@dataclass(frozen=True)
class Lanes:
    """A vector in a function that is being made; a plain number beside it stands for one in each lane.

    Lanes are unsigned, but where a method says otherwise.
    """

    builder: ir.IRBuilder
    value: Any

    @property
    def count(self) -> int:
        return int(self.value.type.count)

    def __and__(self, other: "Lanes | int") -> "Lanes":
        return self._new(self.builder.and_(self.value, self._beside(other)))

    def __or__(self, other: "Lanes | int") -> "Lanes":
        return self._new(self.builder.or_(self.value, self._beside(other)))

    def __add__(self, other: "Lanes | int") -> "Lanes":
        return self._new(self.builder.add(self.value, self._beside(other)))

    def __sub__(self, other: "Lanes | int") -> "Lanes":
        return self._new(self.builder.sub(self.value, self._beside(other)))

    def __rshift__(self, bits: int) -> "Lanes":
        return self._new(self.builder.lshr(self.value, self._beside(bits)))

    def __lshift__(self, bits: int) -> "Lanes":
        return self._new(self.builder.shl(self.value, self._beside(bits)))

    def above(self, other: "Lanes | int") -> "Lanes":
        """What a lane is above the other's; 0 where it is not."""
        return self._called("usub.sat", other)

    def max(self, other: "Lanes | int") -> "Lanes":
        return self._called("umax", other)

    def min(self, other: "Lanes | int") -> "Lanes":
        return self._called("umin", other)

    def where_more(self, other: "Lanes | int", number: int) -> "Lanes":
        """The number where a lane is more than the other's, else 0."""
        return self._chosen(self.builder.icmp_unsigned(">", self.value, self._beside(other)), number)

    def where_more_signed(self, other: "Lanes | int", number: int) -> "Lanes":
        """The same of signed lanes, whose comparison is one instruction everywhere."""
        return self._chosen(self.builder.icmp_signed(">", self.value, self._beside(other)), number)

    def any_more(self, other: "Lanes | int") -> Any:
        """Whether any lane is more than the other's, one bit."""
        more = self.builder.icmp_unsigned(">", self.value, self._beside(other))
        as_bits = self.builder.bitcast(more, ir.IntType(self.count))
        return self.builder.icmp_unsigned("!=", as_bits, ir.Constant(as_bits.type, 0))

    def taken(self, other: "Lanes", lanes: Sequence[int]) -> "Lanes":
        """Lanes of both, of which the other's are counted on from its own."""
        mask = ir.Constant(ir.VectorType(_LANE, len(lanes)), [ir.Constant(_LANE, lane) for lane in lanes])
        return self._new(self.builder.shuffle_vector(self.value, other.value, mask))

    def narrowed(self, bits: int) -> "Lanes":
        """The lower bits of each lane."""
        return self._new(self.builder.trunc(self.value, ir.VectorType(ir.IntType(bits), self.count)))

    def widened(self, bits: int) -> "Lanes":
        """With zeros above."""
        return self._new(self.builder.zext(self.value, ir.VectorType(ir.IntType(bits), self.count)))

    def as_lanes_of(self, bits: int) -> "Lanes":
        """The same bits, as more or fewer lanes."""
        count = self.count * self.value.type.element.width // bits
        return self._new(self.builder.bitcast(self.value, ir.VectorType(ir.IntType(bits), count)))

    def _new(self, value: Any) -> "Lanes":
        return Lanes(self.builder, value)

    def _beside(self, other: "Lanes | int") -> Any:
        return other.value if isinstance(other, Lanes) else _everywhere(self.value.type, other)

    def _chosen(self, condition: Any, number: int) -> "Lanes":
        both = (_everywhere(self.value.type, choice) for choice in (number, 0))
        return self._new(self.builder.select(condition, *both))

    def _called(self, name: str, other: "Lanes | int") -> "Lanes":
        of = self.value.type
        name = f"llvm.{name}.v{of.count}i{of.element.width}"
        function = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(of, [of, of]), name)
        return self._new(self.builder.call(function, [self.value, self._beside(other)]))


@dataclass(frozen=True)
class Memory:
    """That of an array of integers or floats, in a function that is being made; indices count its elements."""

    builder: ir.IRBuilder
    first: Any

    @classmethod
    def of(cls, context: Any, builder: ir.IRBuilder, array_type: Any, array: Any) -> "Memory":
        return cls(builder, make_array(array_type)(context, builder, array).data)

    def at(self, index: Any, offset: int = 0) -> Any:
        """The address of an element."""
        return self.builder.gep(self.first, [self.builder.add(index, ir.Constant(_INDEX, offset))])

    def lanes(self, address: Any, count: int) -> Lanes:
        """That many elements from an address on."""
        element = self.first.type.pointee
        pointer = self.builder.bitcast(address, ir.VectorType(element, count).as_pointer())
        # An array is aligned as its elements are, and no further.
        return Lanes(self.builder, self.builder.load(pointer, align=_bytes(element)))

    def spread(self, address: Any, count: int) -> Lanes:
        """One element in that many lanes."""
        of = ir.VectorType(self.first.type.pointee, count)
        alone = self.builder.insert_element(
            ir.Constant(of, ir.Undefined), self.builder.load(address), ir.Constant(_LANE, 0)
        )
        return Lanes(self.builder, alone).taken(Lanes(self.builder, alone), [0] * count)

    def write(self, lanes: Lanes, address: Any) -> None:
        """Puts lanes, as they are, from an address on."""
        pointer = self.builder.bitcast(address, lanes.value.type.as_pointer())
        self.builder.store(lanes.value, pointer, align=_bytes(self.first.type.pointee))


def _bytes(element: Any) -> int:
    """The size of an element."""
    return 4 if isinstance(element, ir.FloatType) else int(element.width) // 8


def _everywhere(of: Any, number: int) -> Any:
    return ir.Constant(of, [ir.Constant(of.element, number)] * of.count)
