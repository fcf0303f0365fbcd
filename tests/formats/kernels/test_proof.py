"""Kernels prove themselves before they are used: those that round otherwise, anywhere, do not pass."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantplug.formats import kernels
from quantplug.formats.kernels import cpu, cuda, reference
from quantplug.formats.kernels.one_by_one import one_by_one
from quantplug.formats.kernels.proof import gives_the_bits_of_the_reference
from tests.formats.weights import DTYPES

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("right", [cpu, reference])
def test_right_kernels_pass(right: Any, dtype: torch.dtype) -> None:
    assert gives_the_bits_of_the_reference(right, dtype, CPU)


def with_fault(name: str, fault: Callable[..., Any]) -> Any:
    return SimpleNamespace(**{**vars(reference), name: fault})


def reciprocal_nvfp4(
    weight: torch.Tensor, weight_scale_2: torch.Tensor, codes: torch.Tensor, block_scales: torch.Tensor
) -> None:
    """Multiplies with the reciprocal of the scale, as GPUs like to."""
    reference.pack_nvfp4(weight, weight_scale_2, codes, block_scales)
    blocks = weight.float().reshape(*block_scales.shape, 16)
    quotients = blocks * (1 / (block_scales.float() * weight_scale_2)).unsqueeze(-1)
    codes.copy_(reference.e2m1.pack_pairs(reference.e2m1.encode(quotients).flatten(-2)))


def reciprocal_fp8(weight: torch.Tensor, weight_scale: torch.Tensor, codes: torch.Tensor) -> None:
    codes.copy_(reference.saturate_to_e4m3(weight.float() * (1 / weight_scale)))


def rounded_twice(weight: torch.Tensor, codes: torch.Tensor, block_scales: torch.Tensor) -> None:
    reference.pack_fp8_block(weight, codes, block_scales)
    block_scales.copy_(block_scales.bfloat16())


def flushed(codes: torch.Tensor, weight_scale: torch.Tensor, values: torch.Tensor) -> None:
    reference.unpack_fp8(codes, weight_scale, values)
    values[values.abs() < 7 * 2.0**-66] = 0  # What is of E4M3's subnormals, under the smallest of the scales.


def without_the_last(weight: torch.Tensor) -> torch.Tensor:
    return reference.amax(weight[:-1, :1])


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("pack_nvfp4", reciprocal_nvfp4),
        ("pack_nvfp4_group", one_by_one(reciprocal_nvfp4)),
        ("pack_fp8", reciprocal_fp8),
        ("pack_fp8_group", one_by_one(reciprocal_fp8)),
        ("pack_fp8_block", rounded_twice),
        ("unpack_fp8", flushed),
        ("amax", without_the_last),
    ],
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
