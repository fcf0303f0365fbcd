"""When slices may be quantized apart: only where the function gives the same, which it is tried on."""

import pytest
import torch

from quantplug.errors import UnsupportedQuantizationError
from quantplug.export.stream.quant_fn import QuantFn, QuantFunction
from tests.export.blockwise import blockwise_fp8
from tests.export.live_bytes import LiveBytes

BLOCK = (16, 32)
CPU = torch.device("cpu")


def two_levels(weight: torch.Tensor, block_size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Block scales that are rounded to fractions of the whole tensor's: their shape says nothing of it."""
    codes, scale = blockwise_fp8(weight, block_size)
    step = scale.max() / 448
    return codes, (scale / step).to(torch.float8_e4m3fn).float() * step


def whole_tensor(weight: torch.Tensor, block_size: tuple[int, int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.float().abs().max() / 448
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale


def function(quant_fn: QuantFn, block_size: tuple[int, int] | None = BLOCK) -> QuantFunction:
    return QuantFunction(quant_fn, block_size, torch.bfloat16, CPU)


@pytest.mark.parametrize(
    ("quant_fn", "block_size", "shape", "axis", "apart"),
    [
        (blockwise_fp8, BLOCK, (64, 96), 0, True),
        (blockwise_fp8, BLOCK, (64, 128), 1, True),
        (blockwise_fp8, BLOCK, (64, 100), 0, True),  # A partial block at the end of the other axis.
        (blockwise_fp8, BLOCK, (48, 96), 0, False),  # 24 rows a slice.
        (blockwise_fp8, BLOCK, (64, 96), 1, False),  # 48 columns a slice.
        (two_levels, BLOCK, (64, 96), 0, False),
        (whole_tensor, BLOCK, (64, 96), 0, False),
        (whole_tensor, None, (64, 96), 0, False),
    ],
)
def test_slices_are_quantized_apart_only_where_it_is_the_same(quant_fn, block_size, shape, axis, apart) -> None:
    assert function(quant_fn, block_size).packs_apart(shape, axis, 2) is apart


def test_a_trial_leaves_the_random_numbers_of_a_training_alone() -> None:
    state = torch.get_rng_state()
    function(blockwise_fp8).packs_apart((64, 96), 0, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trial_holds_one_weight_and_what_is_made_of_it() -> None:
    shape = (4096, 2048)

    tried = function(lambda weight, block: (weight.to(torch.float8_e4m3fn), weight[::16, ::32].float()))
    weight_bytes = 2 * 4096 * 2048
    for axis in (0, 1):
        with LiveBytes() as live:
            assert tried.packs_apart(shape, axis, 4)
        assert live.peak <= 1.8 * weight_bytes


def test_outputs_are_what_pack_gives() -> None:
    tried = function(whole_tensor, None)
    weight = torch.randn(6, 10).to(torch.bfloat16)
    packed = tried.pack(weight).tensors
    assert [(spec.name, spec.shape, spec.dtype) for spec in tried.outputs((6, 10))] == [
        (name, tuple(tensor.shape), tensor.dtype) for name, tensor in packed.items()
    ]


@pytest.mark.parametrize("returned", [None, torch.ones(2, 2), (torch.ones(2), 1.0), (torch.ones(1),) * 3])
def test_anything_but_two_tensors_is_refused(returned: object) -> None:
    with pytest.raises(UnsupportedQuantizationError, match=r"does not return two tensors .* for \[32, 64\]"):
        function(lambda weight, block: returned).outputs((32, 64))
