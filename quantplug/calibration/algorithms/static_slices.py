"""Static NVFP4 blocks in slices of weights: what ModelOpt refuses to calibrate, as its states have no place for them.

ModelOpt 0.47 and 0.48 stop in `max_calibrate` where a tensor parallel linear has such blocks: they save the amaxes
of one slice as those of all. Our reductions make the amax above the blocks that of the whole weight (`sync`), and our
wrappers refuse or place what is saved (`plugins.dense`, `plugins.megatron`); so the check is off while we collect.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from modelopt.torch.quantization.plugins import megatron

_CHECK = "_check_nvfp4_static_tp_supported"


@contextmanager
def slices_are_calibrated() -> Iterator[None]:
    """Inside of it ModelOpt's check says nothing."""
    before = vars(megatron)[_CHECK]
    setattr(megatron, _CHECK, lambda _: None)
    try:
        yield
    finally:
        setattr(megatron, _CHECK, before)
