"""Weights to pack: what hypothesis may draw, and random ones with heavy tails."""

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

SPECIAL = (0.0, -0.0, 0.25, -0.75, 1.25, -1.75, 2.5, -3.5, 5.0, 6.0, 448.0, 2.0**-9, 2.0**-126, -(2.0**-149))


@st.composite
def weights(draw: st.DrawFn, in_features: tuple[int, ...] = (16, 48)) -> torch.Tensor:
    """Any finite weight of 1 to 3 rows: ties, zeros of both signs, subnormals and the extremes of its dtype."""
    dtype = draw(st.sampled_from(DTYPES))
    largest = torch.finfo(dtype).max
    elements = st.one_of(
        st.floats(-6, 6, width=16), st.sampled_from(SPECIAL), st.floats(-largest, largest, width=32, allow_nan=False)
    )
    shape = (draw(st.integers(1, 3)), draw(st.sampled_from(in_features)))
    values = draw(hnp.arrays(np.float32, shape, elements=elements))
    return torch.from_numpy(values).to(dtype)


def heavy_tailed(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Student-t-like values whose rows span several powers of two."""
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator) / torch.rand(shape, generator=generator).clamp(min=1e-2)
    return (values * torch.logspace(-4, 0, shape[0])[:, None]).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that -0.0 differs from 0.0 and NaN equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
