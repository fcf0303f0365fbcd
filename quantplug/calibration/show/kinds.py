"""The rows of a calibration table by layer and kind of module, and those of them that are unlike the others.

A model of 48 layers with 128 experts has 12,384 quantizers, and 192 lines of this.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median

from quantplug.calibration.statistics import AmaxSource, CalibrationTable, StatisticsRow

OUTLIER = 8.0
"""How many times the median of its peers an amax is, or how small a part of it, to be named: three powers of two, of
which E4M3 as a scale of blocks has about seventeen and E2M1 itself less than three (OCP Microscaling Formats 1.0)."""

FEWEST_PEERS = 4
"""Of fewer the median says nothing."""


@dataclass(frozen=True)
class ModulesOfLayer:
    """The quantizers of one module of a layer: one, or those of all its experts.

    Attributes:
        name: The parameter's name, with `*` in place of the experts' numbers.
        rows: At least one.
    """

    name: str
    rows: tuple[StatisticsRow, ...]

    @cached_property
    def amaxes(self) -> tuple[float, ...]:
        """Those that are finite numbers, ascending."""
        return tuple(sorted(row.amax for row in self.rows if row.amax is not None and math.isfinite(row.amax)))

    @property
    def median(self) -> float | None:
        return median(self.amaxes) if self.amaxes else None

    @property
    def spread(self) -> float | None:
        """The largest amax over the smallest, of several; None of fewer, and where one is 0."""
        return self.amaxes[-1] / self.amaxes[0] if len(self.amaxes) > 1 and self.amaxes[0] > 0 else None

    @property
    def tokens(self) -> tuple[int, ...]:
        """What each expert saw, ascending; nothing where that was not counted."""
        return tuple(sorted(row.tokens for row in self.rows if row.tokens is not None))

    @property
    def cold(self) -> int:
        """How many of its experts saw no token."""
        return sum(row.is_cold for row in self.rows)

    @property
    def sources(self) -> dict[AmaxSource, int]:
        """How many of its rows have each source."""
        counts = {source: sum(row.source is source for row in self.rows) for source in AmaxSource}
        return {source: count for source, count in counts.items() if count}


@dataclass(frozen=True)
class Outlier:
    """A row that is unlike its peers.

    Attributes:
        reason: In words that go on after its name.
        distance: How far from its peers it is, in powers of two; infinite where that is no question of degree.
    """

    row: StatisticsRow
    reason: str
    distance: float


def by_layer_and_kind(table: CalibrationTable) -> list[ModulesOfLayer]:
    """All rows of a table, in its order."""
    found: defaultdict[str, list[StatisticsRow]] = defaultdict(list)
    for row in table.rows:
        found[replace(row.key, expert=None).name].append(row)
    return [ModulesOfLayer(name, tuple(rows)) for name, rows in found.items()]


def outliers(table: CalibrationTable) -> list[Outlier]:
    """Rows that cannot be exported, or whose amax is far from those of their peers; the farthest first.

    An expert is held against the experts of its layer, another module against the same module of all layers.
    """
    found = [outlier for peers in _peers(table.rows) for outlier in _unlike(peers)]
    return sorted(found, key=lambda outlier: -outlier.distance)


def _peers(rows: Iterable[StatisticsRow]) -> Iterable[list[StatisticsRow]]:
    found: defaultdict[tuple[str, int | None], list[StatisticsRow]] = defaultdict(list)
    for row in rows:
        found[row.key.module, row.key.layer if row.expert is not None else None].append(row)
    return found.values()


def _unlike(peers: Sequence[StatisticsRow]) -> Iterator[Outlier]:
    usual = [row.amax for row in peers if row.amax is not None and math.isfinite(row.amax) and row.amax > 0]
    middle = median(usual) if len(usual) >= FEWEST_PEERS else None
    for row in peers:
        if row.source is AmaxSource.MISSING:
            yield Outlier(row, "has no amax", math.inf)
        elif row.amax is not None and not (math.isfinite(row.amax) and row.amax > 0):
            yield Outlier(row, f"is {row.amax:g}", math.inf)
        elif row.amax is not None and middle is not None:
            times = row.amax / middle
            if not 1 / OUTLIER <= times <= OUTLIER:
                reason = f"is {row.amax:.4e}, {times:.3g} times the median of its peers"
                yield Outlier(row, reason, abs(math.log2(times)))
