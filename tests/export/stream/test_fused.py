"""A caller's function on experts that Hugging Face has in one tensor, transposed: each expert's matrix is given alone.

The oracle quantizes the source's own tensors, expert by expert.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantplug import export_hf_weights_quant
from tests.export.blockwise import E4M3_LARGEST, blockwise_fp8
from tests.export.checkpoints import linear_weights, load, read, same_bytes

pytestmark = pytest.mark.usefixtures("single_rank")

BLOCK = (32, 64)
Codes = tuple[torch.Tensor, torch.Tensor]


def _quantized(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight.float() / scale).to(torch.float8_e4m3fn)


def one_scale(weight: torch.Tensor, block: tuple[int, int]) -> Codes:
    scale = weight.float().abs().max() / E4M3_LARGEST
    return _quantized(weight, scale), scale


def one_scale_with_an_axis(weight: torch.Tensor, block: tuple[int, int]) -> Codes:
    codes, scale = one_scale(weight, block)
    return codes, scale.reshape(1)


def scale_of_a_row(weight: torch.Tensor, block: tuple[int, int]) -> Codes:
    scale = weight.float().abs().amax(dim=1, keepdim=True) / E4M3_LARGEST
    return _quantized(weight, scale), scale


def two_levels(weight: torch.Tensor, block: tuple[int, int]) -> Codes:
    """Scales [out / 32, in / 32, 2]: in each block a largest and a smallest value."""
    tiles = weight.float().unflatten(1, (-1, 32)).unflatten(0, (-1, 32))
    scale = torch.stack([tiles.amax(dim=(1, 3)), tiles.amin(dim=(1, 3))], dim=-1)
    return weight.to(torch.float8_e4m3fn), scale


FUNCTIONS = [blockwise_fp8, one_scale, one_scale_with_an_axis, scale_of_a_row, two_levels]


def stored(per_expert: list[torch.Tensor]) -> torch.Tensor:
    """Matrices and tables of block scales the other way round, as the weights are; what has one axis has no other."""
    turned = [tensor.transpose(0, 1) if tensor.ndim > 1 else tensor for tensor in per_expert]
    return torch.stack(
        [tensor.contiguous().view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor for tensor in turned]
    )


def expected(
    quant_fn: Callable[..., Codes], source: dict[str, torch.Tensor], block: tuple[int, int]
) -> dict[str, torch.Tensor]:
    found = dict(source)
    for name, weight in linear_weights(source).items():
        found[name], found[f"{name}_scale_inv"] = quant_fn(weight, block)
    for name in [name for name in source if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        codes, scales = zip(*(quant_fn(matrix.mT.contiguous(), block) for matrix in source[name]), strict=True)
        found[name] = stored(list(codes)).view(codes[0].dtype)
        found[f"{name}_scale_inv"] = stored(list(scales))
    return found


@pytest.mark.parametrize("quant_fn", FUNCTIONS, ids=lambda quant_fn: quant_fn.__name__)
def test_each_expert_is_quantized_alone_and_stored_with_the_others(
    quant_fn: Callable[..., Codes], tiny_gpt_oss_dir: Path
) -> None:
    source = read(tiny_gpt_oss_dir)
    wanted = expected(quant_fn, source, BLOCK)
    got = dict(export_hf_weights_quant(load(tiny_gpt_oss_dir), tiny_gpt_oss_dir, None, quant_fn, BLOCK))
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not same_bytes(got[name], wanted[name])] == []
