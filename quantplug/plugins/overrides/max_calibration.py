"""ModelOpt's `max` calibration with our reductions: what plain `mtq.quantize` and `mtq.calibrate` run.

The mode keeps its name and its config, so that the state of a model it calibrated is ModelOpt's own. Other algorithms
that begin with a `max` calibration of their own (mse, awq, smoothquant) reduce as ModelOpt does.
"""

from modelopt.torch.quantization.mode import CalibrateModeRegistry, MaxCalibrateModeDescriptor

from quantplug.calibration.run import max_calibrate

MODE = "max_calibrate"


class QuantplugMaxCalibration(MaxCalibrateModeDescriptor):
    """The mode `max_calibrate`."""

    _calib_func = max_calibrate


def register_max_calibration() -> None:
    """Registers the mode, in place of ModelOpt's own; again changes nothing."""
    # Registered under the same name, so it must be taken out first; a second call finds ours and leaves it.
    if not isinstance(CalibrateModeRegistry[MODE], QuantplugMaxCalibration):
        CalibrateModeRegistry.remove_mode(MODE)
        CalibrateModeRegistry.register_mode(QuantplugMaxCalibration)
