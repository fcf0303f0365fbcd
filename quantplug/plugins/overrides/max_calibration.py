"""ModelOpt's `max` calibration with our reductions, and `mse` of static NVFP4 with our search.

The mode keeps its name and its config, so that the state of a model it calibrated is ModelOpt's own. Other algorithms
that begin with a `max` calibration of their own (awq, smoothquant, mse of other formats) reduce as ModelOpt does.
"""

from modelopt.torch.quantization.mode import (
    CalibrateModeRegistry,
    MaxCalibrateModeDescriptor,
    MseCalibrateModeDescriptor,
)

from quantplug.calibration.algorithms.static_scales import mse_calibrate
from quantplug.calibration.run import max_calibrate

MODE, MSE_MODE = "max_calibrate", "mse_calibrate"


class QuantplugMaxCalibration(MaxCalibrateModeDescriptor):
    """The mode `max_calibrate`."""

    _calib_func = max_calibrate


class QuantplugMseCalibration(MseCalibrateModeDescriptor):
    """The mode `mse_calibrate`."""

    _calib_func = mse_calibrate


def register_max_calibration() -> None:
    """Registers the mode, in place of ModelOpt's own; again changes nothing."""
    # Registered under the same name, so it must be taken out first; a second call finds ours and leaves it.
    for mode, ours in ((MODE, QuantplugMaxCalibration), (MSE_MODE, QuantplugMseCalibration)):
        if not isinstance(CalibrateModeRegistry[mode], ours):
            CalibrateModeRegistry.remove_mode(mode)
            CalibrateModeRegistry.register_mode(ours)
