"""Collecting what is wrong, so that a check raises once with everything it found."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import StrEnum
from typing import Protocol, TypeVar

from quantplug.errors import ArgumentError, Offender, QuantplugError

_Choice = TypeVar("_Choice", bound=StrEnum)


def choice_named(choices: type[_Choice], name: str, argument: str, problem: str) -> _Choice:
    """The one of several choices that has a name.

    Args:
        argument: What the name was given as, for the message.
        problem: What to say where there is none.

    Raises:
        ArgumentError: None has this name.
    """
    # A list: before Python 3.12 `in` an Enum raises TypeError for a plain string.
    if name not in list(choices):
        raise ArgumentError(problem, [Offender(argument, f"is {name!r}")], f"Use one of: {', '.join(choices)}.")
    return choices(name)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a reason that says what an unknown name was perhaps meant to be; empty if nothing is near."""
    near = get_close_matches(name, list(known), n=1)
    return f"; the nearest known name is {near[0]}" if near else ""


class NamedParameter(Protocol):
    """What names a parameter: the canonical key of the model."""

    @property
    def name(self) -> str:
        """Its name with global ids filled in."""

    @property
    def expert(self) -> int | None:
        """Global id of the expert that it belongs to."""


class HeldWeight(Protocol):
    """A weight of the model as a message needs it: a stored one, a live one, or one that is planned."""

    @property
    def key(self) -> NamedParameter:
        """Its key in the model, which names it."""

    @property
    def label(self) -> str:
        """The name by which a user finds it where it comes from."""

    @property
    def rank(self) -> int:
        """A rank that holds it."""


@dataclass(frozen=True)
class Kind:
    """One way an input can be wrong.

    Attributes:
        error: The exception it raises.
        problem: One sentence for all of its offenders.
        remedy: What to do about it.
    """

    error: type[QuantplugError]
    problem: str
    remedy: str


@dataclass
class Findings:
    """Offenders by kind, in the order in which the kinds were met."""

    # Whether ranks are named: not where one process holds everything.
    ranks: bool = True
    found: dict[Kind, list[Offender]] = field(default_factory=dict)

    def add(self, kind: Kind, parameter: str, reason: str, expert: int | None = None, rank: int | None = None) -> None:
        """Notes an offender, and the rank where the check knows of which it is; its own is named by the agreement."""
        offender = Offender(parameter, reason, expert, rank if self.ranks else None)
        # A dict keeps the order of first insertion, which is that in which kinds were met.
        self.found.setdefault(kind, []).append(offender)

    def add_weight(self, kind: Kind, weight: HeldWeight, reason: str) -> None:
        """Notes a weight, on a rank that holds it."""
        self.add(kind, weight.label, reason, weight.key.expert, weight.rank)

    def raise_if_any(self) -> None:
        """Raises one error that lists every offender; of several kinds, the type is that of the first met."""
        if not self.found:
            return
        # Callers catch by class, so that one must be chosen: that of what was met first, as the rest may follow from
        # it. A remedy that several kinds share is said once.
        raise next(iter(self.found)).error(
            " ".join(kind.problem for kind in self.found),
            [offender for offenders in self.found.values() for offender in offenders],
            " ".join(dict.fromkeys(kind.remedy for kind in self.found)),
        )
