"""GPT-OSS's experts in MXFP4, as published and as we write them: judged by a decoder of the checker's own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx

from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.verify import Severity, verify_checkpoint
from tests.made_once import MadeOnce
from tests.verify.conftest import Surgery

DOWN = "model.layers.1.mlp.experts.down_proj"
PUBLISHED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


@pytest.fixture(scope="module")
def exported(fused: dict[str, Path], made_once: MadeOnce) -> Path:
    return made_once("verify_mxfp4", lambda out: quantize_checkpoint(fused["source"], out, "mxfp4"))


@pytest.fixture
def surgery(exported: Path, tmp_path: Path) -> Surgery:
    opened = Surgery(shutil.copytree(exported, tmp_path / "copy"))
    for path in opened.directory.glob("*.safetensors*"):
        path.unlink()
    return opened


def errors_of(directory: Path, source: Path | None = None) -> set[str]:
    return {str(check) for check in verify_checkpoint(directory, source).checks(Severity.ERROR)}


def test_a_good_export_is_clean_with_and_without_its_source(exported: Path, fused: dict[str, Path]) -> None:
    assert verify_checkpoint(exported).ok
    report = verify_checkpoint(exported, fused["source"])
    assert report.ok
    # Two projections of four experts in two layers, each by itself.
    assert len(report.errors_by_tensor) == 2 * 4 * 2
    assert all(0.09 < error.relative_error < 0.13 for error in report.errors_by_tensor)
    assert all(error.bound == pytest.approx(0.25) for error in report.errors_by_tensor)


@pytest.mark.parametrize("rule", [ScaleCalculationMode.FLOOR, ScaleCalculationMode.RCEIL, ScaleCalculationMode.EVEN])
def test_a_published_one_is_clean_whichever_way_its_exponents_are_rounded(
    rule: ScaleCalculationMode, surgery: Surgery, fused: dict[str, Path]
) -> None:
    source = Surgery(fused["source"]).tensors
    for name in [name for name in source if name.endswith(("gate_up_proj", "down_proj"))]:
        scales, codes = to_mx(source[name].mT.contiguous(), torch.float4_e2m1fn_x2, 32, rule)
        surgery.tensors[f"{name}_blocks"] = codes.view(torch.uint8).unflatten(-1, (-1, 16))
        surgery.tensors[f"{name}_scales"] = scales.view(torch.uint8)
    surgery.quantization_config["modules_to_not_convert"] = PUBLISHED
    surgery.close()
    assert errors_of(surgery.directory) == set()
    assert errors_of(surgery.directory, fused["source"]) == set()


def test_against_a_source_that_is_in_mxfp4_itself(exported: Path, tmp_path: Path) -> None:
    quantize_checkpoint(exported, tmp_path / "again", "mxfp4")
    report = verify_checkpoint(tmp_path / "again", exported)
    assert report.ok
    assert all(error.relative_error == 0 for error in report.errors_by_tensor)


def changed(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Surgery], None]:
    def spoil(surgery: Surgery) -> None:
        name = f"{DOWN}_{suffix}"
        surgery.tensors[name] = change(surgery.tensors[name].clone()).contiguous()

    return spoil


def one(value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[2, 5, 1] = value
        return tensor

    return change


def _one_layer_plain(surgery: Surgery) -> None:
    surgery.drop("layers.0.mlp.experts.down_proj_")
    surgery.tensors["model.layers.0.mlp.experts.down_proj"] = torch.ones(4, 96, 160, dtype=torch.bfloat16)
    surgery.tensors["model.layers.0.mlp.experts.down_proj_bias"] = torch.ones(4, 160, dtype=torch.bfloat16)


def _row_less(exponents: torch.Tensor) -> torch.Tensor:
    exponents[2, 5] -= 1
    return exponents


BY_ITSELF: dict[str, tuple[Callable[[Surgery], Any], str]] = {
    "an exponent is NaN": (changed("scales", one(255)), "finite"),
    "exponents are lost": (lambda it: it.drop(f"{DOWN}_scales"), "tensor-layout"),
    "blocks are lost": (lambda it: it.drop(f"{DOWN}_blocks"), "coverage"),
    "exponents of 16": (changed("scales", lambda t: t.repeat_interleave(2, 2)), "tensor-layout"),
    "exponents are floats": (changed("scales", lambda t: torch.exp2(t.float() - 127)), "tensor-layout"),
    "blocks are not cut": (changed("blocks", lambda t: t.flatten(2)), "tensor-layout"),
    "blocks of 8 bytes": (changed("blocks", lambda t: t.reshape(*t.shape[:2], -1, 8)), "tensor-layout"),
    "blocks are turned": (changed("blocks", lambda t: t.transpose(1, 2)), "architecture"),
    "an expert is lost": (changed("blocks", lambda t: t[:3]), "architecture"),
    "experts of a layer are plain": (_one_layer_plain, "coverage"),
    "a bias is lost": (lambda it: it.drop(f"{DOWN}_bias"), "architecture"),
    "a quantized head": (
        lambda it: it.tensors.update({"lm_head.weight": torch.ones(515, 80, dtype=torch.uint8)}),
        "coverage",
    ),
    "another method": (lambda it: it.quantization_config.update(quant_method="mxfp3"), "not-judged"),
}
BESIDE_THE_SOURCE: dict[str, Callable[[Surgery], Any]] = {
    "a code is another": changed("blocks", lambda t: t ^ 0x70),
    "nibbles change places": changed("blocks", lambda t: (t >> 4) | (t << 4)),
    "blocks of zeros": changed("blocks", torch.zeros_like),
    "a block of zeros": changed("blocks", lambda t: torch.where(torch.arange(t.shape[1])[:, None, None] == 7, 0, t)),
    "experts change places": changed("blocks", lambda t: t.flip(0)),
    "an exponent is one more": changed("scales", lambda t: one(int(t[2, 5, 1]) + 1)(t)),
    "exponents of a row are one less": changed("scales", _row_less),
    "all exponents are one more": changed("scales", lambda t: t + 1),
    "exponents move by one block": changed("scales", lambda t: t.roll(1, dims=2)),
    "gate and up lie apart": lambda it: _apart(it, f"{DOWN.replace('down', 'gate_up')}_blocks"),
}


def _apart(surgery: Surgery, name: str) -> None:
    blocks = surgery.tensors[name]
    surgery.tensors[name] = torch.cat((blocks[:, 0::2], blocks[:, 1::2]), dim=1)


@pytest.mark.parametrize("case", BY_ITSELF)
def test_what_is_wrong_by_itself_is_found_by_itself(case: str, surgery: Surgery) -> None:
    spoil, check = BY_ITSELF[case]
    spoil(surgery)
    surgery.close()
    assert check in errors_of(surgery.directory)


@pytest.mark.parametrize("case", BESIDE_THE_SOURCE)
def test_what_the_values_show_is_found_beside_the_source(case: str, surgery: Surgery, fused: dict[str, Path]) -> None:
    BESIDE_THE_SOURCE[case](surgery)
    surgery.close()
    assert errors_of(surgery.directory, fused["source"]) & {"error-bound", "gain"}


def test_half_of_one_block_is_found_where_all_others_are_rounded(surgery: Surgery, fused: dict[str, Path]) -> None:
    changed("scales", lambda t: one(int(t[2, 5, 1]) - 1)(t))(surgery)
    surgery.close()
    assert errors_of(surgery.directory, fused["source"]) == {"value-bound"}


def test_of_another_architecture_no_reader_knows_it(pristine: dict[str, Path], tmp_path: Path) -> None:
    opened = Surgery(shutil.copytree(pristine["w4a16"], tmp_path / "copy"))
    opened.config["quantization_config"] = {"quant_method": "mxfp4"}
    opened.hf_quant_config = None
    opened.close()
    assert "coverage" in errors_of(opened.directory)
    assert json.loads((opened.directory / "config.json").read_text())["architectures"] == ["Qwen3MoeForCausalLM"]
