"""Whether a weight can be quantized at all: NaN and Inf have no code, and one of them spoils every scale above it."""

import torch

from quantplug.formats.scales import weight_amax


def first_nonfinite(weight: torch.Tensor) -> str | None:
    """How many NaN and Inf a non-empty weight holds in FP32 and the index of the first; None when it is finite.

    Finite weights cost one reduction. The reason reads `3 NaN, 1 Inf; first at [2, 17]`.
    """
    # The amax keeps NaN and Inf, so one pass clears a whole weight. Only a broken one is copied to FP32 and counted.
    if torch.isfinite(weight_amax(weight)):
        return None
    values = weight.detach().float()
    counts = ((int(values.isnan().sum()), "NaN"), (int(values.isinf().sum()), "Inf"))
    found = ", ".join(f"{count} {kind}" for count, kind in counts if count)
    first = torch.unravel_index((~values.isfinite()).flatten().byte().argmax(), values.shape)
    return f"{found}; first at {[int(index) for index in first]}"
