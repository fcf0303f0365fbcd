"""The rows of a calibration table in the order of a plot: layer by expert, or layer by layer."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from quantplug.calibration.statistics import CalibrationTable, StatisticsRow


@dataclass(frozen=True)
class ExpertGrid:
    """The rows of one module of every expert.

    Attributes:
        module: As in `ParamKey`.
        layers: Global ids of the layers that have such a module, ascending; a dense layer is not among them.
        experts: Global ids of the experts, ascending.
        rows: By layer and expert. Not all need be there: one rank's table has its own experts only.
    """

    module: str
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    rows: dict[tuple[int, int], StatisticsRow]


def expert_grids(table: CalibrationTable) -> list[ExpertGrid]:
    """One grid for each module that every expert has, in the order of the table."""
    grids = []
    for module, rows in _by_module(table.rows, lambda row: row.key.layer is not None and row.expert is not None):
        # Neither is None here, which the predicate above has seen to and a type checker cannot know.
        cells = {(row.key.layer or 0, row.expert or 0): row for row in rows}
        layers, experts = (tuple(sorted({cell[axis] for cell in cells})) for axis in range(2))
        grids.append(ExpertGrid(module, layers, experts, cells))
    return grids


def layer_rows(table: CalibrationTable) -> list[tuple[str, list[StatisticsRow]]]:
    """For each module that a layer has once: its name and its rows, by layer."""
    modules = _by_module(table.rows, lambda row: row.key.layer is not None and row.expert is None)
    return [(module, sorted(rows, key=lambda row: row.key.layer or 0)) for module, rows in modules]


def label(module: str) -> str:
    """A module's name without what all of a plot have in common."""
    return module.removeprefix("decoder.layers.*.").removesuffix(".weight*").removesuffix(".weight")


def _by_module(
    rows: Iterable[StatisticsRow], belongs: Callable[[StatisticsRow], bool]
) -> list[tuple[str, list[StatisticsRow]]]:
    found: dict[str, list[StatisticsRow]] = {}
    for row in filter(belongs, rows):
        found.setdefault(row.key.module, []).append(row)
    return list(found.items())
