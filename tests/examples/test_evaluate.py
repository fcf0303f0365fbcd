"""What the example measures: nothing of a checkpoint against itself, and the order in which searches are better."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

from examples.evaluate import Predictions, decode, measured, tensors_of, tokenized
from quantplug import quantize_checkpoint

Sources = Callable[[str], Path]


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))


def test_searched_scales_lose_less_weight_and_a_source_nothing(
    sources: Sources, ids: torch.Tensor, tmp_path: Path
) -> None:
    source = sources("moe")
    plain = tensors_of(source)
    reference = Predictions.of(source, plain, ids)
    itself = measured(source, plain, reference, source, ids)
    assert (itself.weights, itself.divergence, set(itself.layers)) == (0.0, 0.0, {0.0})
    errors = []
    for scales in ("max", "four_over_six", "mse"):
        quantize_checkpoint(source, tmp_path / scales, "w4a16_nvfp4", scales=scales)
        found = measured(tmp_path / scales, plain, reference, source, ids)
        assert found.divergence > 0
        assert len(found.layers) == 2
        assert min(found.layers) > 0
        errors.append(found.weights)
    assert errors == sorted(errors, reverse=True)


def test_its_decoder_is_torchaos(sources: Sources, tmp_path: Path) -> None:
    quantize_checkpoint(sources("moe"), tmp_path / "out", "w4a16_nvfp4")
    stored = tensors_of(tmp_path / "out")
    name = "model.layers.1.self_attn.o_proj.weight"
    scale, scale_2 = stored[f"{name}_scale"], stored[f"{name}_scale_2"]
    theirs = NVFP4Tensor(stored[name], scale, 16, torch.float32, per_tensor_scale=scale_2).dequantize()
    ours = decode(stored, name)
    assert ours is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_bytes_are_tokens_where_there_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"\x00A\xff")
    assert tokenized(tmp_path, tmp_path / "text.txt").tolist() == [0, 65, 255]
