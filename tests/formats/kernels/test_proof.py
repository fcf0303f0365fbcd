"""Kernels prove themselves before they are used: those that round otherwise, anywhere, do not pass."""

import logging
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantplug.formats import kernels
from quantplug.formats.codes import E2M1, E4M3, INT4
from quantplug.formats.encoding import (
    FP8_BLOCK_ENCODING,
    FP8_ENCODING,
    FP8_ROW_ENCODING,
    INT4_32_ENCODING,
    INT4_ENCODING,
    MXFP4_ENCODING,
    MXFP8_ENCODING,
    NVFP4_ENCODING,
    Encoding,
)
from quantplug.formats.kernels import reference
from quantplug.formats.kernels.cpu import kernels as cpu
from quantplug.formats.kernels.cuda import kernels as cuda
from quantplug.formats.kernels.proof import gives_the_bits_of_the_reference
from quantplug.formats.kernels.protocol import Encoded
from tests.formats.weights import DTYPES

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("right", [cpu, reference])
def test_right_kernels_pass(right: Any, dtype: torch.dtype) -> None:
    assert gives_the_bits_of_the_reference(right, dtype, CPU)


def with_fault(name: str, fault: Callable[..., Any]) -> Any:
    return SimpleNamespace(**{**vars(reference), name: fault})


def packing_with_fault(encoding: Encoding, fault: Callable[[torch.Tensor, Encoded], None]) -> Callable[..., None]:
    """The reference, but for what is done to each weight of one encoding afterwards."""

    def pack(given: Encoding, weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
        reference.pack(given, weights, encoded)
        if given == encoding:
            for weight, of_weight in zip(weights, encoded.of_each(), strict=True):
                fault(weight, of_weight)

    return pack


def reciprocal_nvfp4(weight: torch.Tensor, encoded: Encoded) -> None:
    """Multiplies with the reciprocal of the scale, as GPUs like to."""
    blocks = weight.float().reshape(*encoded.block_scales.shape, 16)
    quotients = blocks * (1 / (encoded.block_scales.float() * encoded.tensor_scales)).unsqueeze(-1)
    encoded.codes.copy_(E2M1.encode(quotients.flatten(-2)))


def reciprocal_int4(weight: torch.Tensor, encoded: Encoded) -> None:
    groups = weight.float().reshape(*encoded.block_scales.shape, -1)
    encoded.codes.copy_(INT4.encode((groups * (1 / encoded.block_scales.float()).unsqueeze(-1)).flatten(-2)))


def truncated(weight: torch.Tensor, encoded: Encoded) -> None:
    """The BF16 scale made by leaving bits away."""
    groups = weight.float().reshape(*encoded.block_scales.shape, -1).abs().amax(-1) / 7.5
    encoded.block_scales.copy_((groups.view(torch.int32) >> 16 << 16).view(torch.float32))


def reciprocal_fp8(weight: torch.Tensor, encoded: Encoded) -> None:
    encoded.codes.copy_(E4M3.encode(weight.float() * (1 / encoded.tensor_scales)))


def rounded_twice(weight: torch.Tensor, encoded: Encoded) -> None:
    encoded.block_scales.copy_(encoded.block_scales.bfloat16())


def floored(weight: torch.Tensor, encoded: Encoded) -> None:
    """The exponent of the largest block alone is rounded down, as [MX] 6.3 has it."""
    encoded.block_scales.view(-1)[encoded.block_scales.view(-1).argmax()] -= 1


def first_alone(encoding: Encoding, weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    """Packs the first weight of a group in place of each."""
    reference.pack(encoding, [weights[0]] * len(weights), encoded)


def flushed(encoding: Encoding, encoded: Encoded, values: torch.Tensor) -> None:
    reference.unpack(encoding, encoded, values)
    if encoding == FP8_ENCODING:
        values[values.abs() < 7 * 2.0**-66] = 0  # What is of E4M3's subnormals, under the smallest of the scales.


def without_the_last(weight: torch.Tensor) -> torch.Tensor:
    return reference.amax(weight[:-1, :1])


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("pack", packing_with_fault(NVFP4_ENCODING, reciprocal_nvfp4)),
        ("pack", packing_with_fault(FP8_ENCODING, reciprocal_fp8)),
        ("pack", packing_with_fault(FP8_ROW_ENCODING, rounded_twice)),
        ("pack", packing_with_fault(FP8_BLOCK_ENCODING, rounded_twice)),
        ("pack", packing_with_fault(MXFP4_ENCODING, floored)),
        ("pack", packing_with_fault(MXFP8_ENCODING, floored)),
        ("pack", packing_with_fault(INT4_ENCODING, reciprocal_int4)),
        ("pack", packing_with_fault(INT4_32_ENCODING, truncated)),
        ("pack", first_alone),
        ("unpack", flushed),
        ("amax", without_the_last),
    ],
    ids=["nvfp4", "fp8", "fp8_row", "fp8_block", "mxfp4", "mxfp8", "int4", "int4_32", "group", "unpack", "amax"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_that_round_otherwise_do_not(name: str, fault: Callable[..., Any], dtype: torch.dtype) -> None:
    assert not gives_the_bits_of_the_reference(with_fault(name, fault), dtype, CPU)


@pytest.fixture
def chosen() -> Callable[[], Any]:
    """Asks anew which kernels a GPU gets; what is asked is a CPU, which stands for it."""
    kernels._cuda_kernels.cache_clear()
    yield lambda: kernels._cuda_kernels(torch.bfloat16, CPU)
    kernels._cuda_kernels.cache_clear()


def test_a_gpu_gets_those_of_triton_that_pass(chosen: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "gives_the_bits_of_the_reference", lambda *arguments: True)
    assert chosen() is cuda


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (lambda *arguments: False, "round otherwise"),
        (lambda *arguments: (_ for _ in ()).throw(RuntimeError("no compiler")), "RuntimeError: no compiler"),
    ],
)
def test_a_gpu_gets_the_reference_where_they_do_not(
    outcome: Callable[..., bool],
    said: str,
    chosen: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(kernels, "gives_the_bits_of_the_reference", outcome)
    with caplog.at_level(logging.WARNING):
        assert chosen() is reference
    assert said in caplog.text
    assert "to the same bytes but slower" in caplog.text


def test_a_gpu_without_triton_for_it_gets_the_reference(chosen: Callable[[], Any]) -> None:
    """Here there is no driver that Triton could ask: its own RuntimeError."""
    assert chosen() is reference
