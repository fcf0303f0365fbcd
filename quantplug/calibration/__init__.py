"""Calibration: every amax of a quantized model, reduced over all ranks, and the table that says where each comes from.

`calibrate` does it in one call; a `CalibrationPolicy` chooses where there is a choice (`ExpertWeights`, `ColdExperts`).
`gather_statistics` reads the table of all ranks, `print_statistics` shows it and `save_plot` draws it, which needs
matplotlib. `CalibrationTable` is plain data: `save` and `load` need no Megatron-Core.
"""

from typing import TYPE_CHECKING

from quantplug.lazy import attributes_from

__all__ = [
    "AmaxSource",
    "CalibrationPolicy",
    "CalibrationRecord",
    "CalibrationTable",
    "ColdExperts",
    "ExpertWeights",
    "StatisticsRow",
    "calibrate",
    "gather_statistics",
    "print_statistics",
    "save_plot",
]

_HOMES = {
    "AmaxSource": "quantplug.calibration.statistics",
    "CalibrationPolicy": "quantplug.calibration.policy",
    "CalibrationRecord": "quantplug.calibration.run",
    "CalibrationTable": "quantplug.calibration.statistics",
    "ColdExperts": "quantplug.calibration.policy",
    "ExpertWeights": "quantplug.calibration.policy",
    "StatisticsRow": "quantplug.calibration.statistics",
    "calibrate": "quantplug.calibration.run",
    "gather_statistics": "quantplug.calibration.collect",
    "print_statistics": "quantplug.calibration.show.render",
    "save_plot": "quantplug.calibration.show.plots",
}

# Type checkers read the imports; at run time each name is looked up when it is first used.
if TYPE_CHECKING:
    from quantplug.calibration.collect import gather_statistics
    from quantplug.calibration.policy import CalibrationPolicy, ColdExperts, ExpertWeights
    from quantplug.calibration.run import CalibrationRecord, calibrate
    from quantplug.calibration.show.plots import save_plot
    from quantplug.calibration.show.render import print_statistics
    from quantplug.calibration.statistics import AmaxSource, CalibrationTable, StatisticsRow
else:
    __getattr__ = attributes_from(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
