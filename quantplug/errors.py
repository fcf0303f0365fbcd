"""The closed set of errors a user of quantplug can meet.

Every one names all offenders at once, says why, and ends with the way out. A check collects `Offender`s and raises
once; nothing is raised for the first of many.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from quantplug.printable import printable

# A message of more lines helps nobody, and a hostile index makes a million of them; `offenders` has them all.
MOST_SHOWN = 1000


@dataclass(frozen=True)
class Offender:
    """One thing that is wrong, and where it is.

    Attributes:
        parameter: Name of the parameter, tensor, module, file or setting.
        reason: What is wrong with it, in a few words.
        expert: Global expert id, where the parameter belongs to an expert.
        rank: Global rank on which it was found; None where that is not known, or there is only one.
    """

    parameter: str
    reason: str
    expert: int | None = None
    rank: int | None = None

    def __str__(self) -> str:
        expert = "" if self.expert is None else f" (expert {self.expert})"
        rank = "" if self.rank is None else f" on rank {self.rank}"
        # Names come from files of strangers, and an error is printed to a terminal.
        return f"{printable(self.parameter)}{expert}{rank}: {printable(self.reason)}"


class QuantplugError(Exception):
    """Base of every error that quantplug raises for a user's input; its text holds no control codes.

    Args:
        problem: One sentence that says what cannot be done.
        offenders: All places where it went wrong.
        remedy: One sentence that says what to do about it.
        shown: How many of the offenders the text names: few, where the problem says already what is wrong with all.
    """

    def __init__(
        self, problem: str, offenders: Sequence[Offender] = (), remedy: str = "", *, shown: int = MOST_SHOWN
    ) -> None:
        self.problem = problem
        # Kept whole, for programs and for agreement between ranks; only the text is cut.
        self.offenders = tuple(offenders)
        self.remedy = remedy
        self.shown = shown
        lines = [printable(problem), *(f"  - {offender}" for offender in self.offenders[:shown])]
        if len(self.offenders) > shown:
            lines.append(f"  - and {len(self.offenders) - shown} more")
        if remedy:
            lines.append(f"What to do: {printable(remedy)}")
        super().__init__("\n".join(lines))


class ArgumentError(QuantplugError):
    """An argument of a call has a value that the call does not take."""


class SourceError(QuantplugError):
    """The Hugging Face checkpoint to read from is missing, incomplete or not of a kind we read."""


class DestinationError(QuantplugError):
    """The export directory cannot be written without overwriting something."""


class WriteError(QuantplugError):
    """The disk refused what was written; what is finished is kept, and the same export run again goes on from there."""


class UnforeseenError(QuantplugError):
    """A rank failed in a way that no check foresaw: a bug, or a machine that ran out of something."""


class RankLostError(QuantplugError):
    """A rank ended while the others still counted on it."""


class CheckpointError(QuantplugError):
    """A Megatron checkpoint lacks quantizer state, or belongs to another model."""


class UnsupportedModelError(QuantplugError):
    """The architecture, or a setting of it, is not one we convert."""


class UnsupportedQuantizationError(QuantplugError):
    """A quantizer is configured in a way that no output format of ours expresses."""


class CalibrationError(QuantplugError):
    """A quantizer has no amax, or one that is not a finite number of at least zero."""


class WeightError(QuantplugError):
    """A weight holds NaN or Inf."""


class ShapeError(QuantplugError):
    """A shape does not divide as its format or its shards need."""


class MappingError(QuantplugError):
    """Names do not agree: a tensor unknown, missing or extra, or a rule that matches nothing."""


class TopologyError(QuantplugError):
    """The parallel layout is one that the called function does not serve."""
