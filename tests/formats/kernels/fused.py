"""`a * b + c` in FP32, rounded once, as CPUs and GPUs have it and neither NumPy nor Triton's interpreter does."""

from typing import Any

import numpy as np
from numba import types, vectorize
from numba.core.typing import Signature
from numba.extending import intrinsic


@intrinsic  # type: ignore[misc]
def fused(typing_context: Any, a: Any, b: Any, c: Any) -> tuple[Signature, Any]:
    """For compiled code: LLVM's own operation."""

    def generate(context: Any, builder: Any, signature: Signature, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@vectorize([types.float32(types.float32, types.float32, types.float32)])  # type: ignore[misc]
def _elementwise(a: Any, b: Any, c: Any) -> Any:
    return fused(a, b, c)


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Of FP32 arrays, broadcast."""
    return np.asarray(_elementwise(a, b, c))
