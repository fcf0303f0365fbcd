"""How far the calibration of weights is: ModelOpt has no callback for it, but each weight passes its quantizer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from quantplug.calibration.quantizers import weights_to_calibrate
from quantplug.progress import Progress


@contextmanager
def reporting(chunks: Sequence[nn.Module], progress: Progress) -> Iterator[None]:
    """Calls `progress("Calibrating", done, total)` once for each weight of this rank that ModelOpt calibrates inside.

    Forwards of calibration data, which pass the same quantizers again, are not counted.
    """
    # Emptied as they report: what is no longer in it is passed again by data, and adds nothing.
    waiting = {quantizer for _, _, quantizer in weights_to_calibrate(chunks)}
    total = len(waiting)

    def report(quantizer: nn.Module, *_: object) -> None:
        if quantizer in waiting:
            waiting.remove(quantizer)
            progress("Calibrating", total - len(waiting), total)

    handles = [quantizer.register_forward_hook(report) for quantizer in waiting]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
