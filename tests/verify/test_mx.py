"""MXFP8 as ModelOpt writes it and as we do: judged by rules and a decoder of the checker's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from modelopt.torch.export.convert_hf_config import _quant_algo_to_group_config

from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.verify import Severity, verify_checkpoint
from tests.verify.conftest import Surgery

Open = Callable[[str], Surgery]
DOWN = "model.layers.1.mlp.experts.2.down_proj"


def errors_of(directory: Path, source: Path | None = None) -> set[str]:
    return {str(check) for check in verify_checkpoint(directory, source).checks(Severity.ERROR)}


def test_modelopts_own_export_is_right_and_ours_has_its_bytes(pristine: dict[str, Path], tmp_path: Path) -> None:
    report = verify_checkpoint(pristine["mxfp8"], pristine["source"])
    assert not report.checks(Severity.ERROR)
    assert all(0.02 < error.relative_error < 0.03 for error in report.errors_by_tensor)
    quantize_checkpoint(pristine["source"], tmp_path / "ours", "mxfp8")
    assert verify_checkpoint(tmp_path / "ours", pristine["source"]).ok
    ours, theirs = Surgery(tmp_path / "ours"), Surgery(pristine["mxfp8"])
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in theirs.tensors.items():
        assert torch.equal(ours.tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert ours.quantization["quant_algo"] == theirs.quantization["quant_algo"] == "MXFP8"
    assert ours.quantization["group_size"] == theirs.quantization["group_size"] == 32
    # A group of this algorithm as ModelOpt spells it where it mixes several.
    group = ours.quantization_config["config_groups"]["group_0"]
    assert _quant_algo_to_group_config("MXFP8", 32) == {key: group[key] for key in ("weights", "input_activations")}


def exponents(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Surgery], None]:
    def spoil(surgery: Surgery) -> None:
        name = f"{DOWN}.weight_scale"
        surgery.tensors[name] = change(surgery.tensors[name].clone())

    return spoil


def one_exponent(value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(scales: torch.Tensor) -> torch.Tensor:
        scales[5, 1] = value
        return scales

    return change


WITHOUT_SOURCE: dict[str, tuple[Callable[[Surgery], Any], str]] = {
    "an exponent is NaN": (exponents(one_exponent(255)), "finite"),
    "a code is NaN": (lambda it: it.set_byte(f"{DOWN}.weight", 70, 0xFF), "finite"),
    "exponents are lost": (lambda it: it.drop(f"{DOWN}.weight_scale"), "tensor-layout"),
    "exponents of 16": (exponents(lambda t: t.repeat_interleave(2, 1)), "tensor-layout"),
    "exponents are floats": (exponents(lambda t: torch.exp2(t.float() - 127)), "tensor-layout"),
    "an input scale beside": (lambda it: it.tensors.update({f"{DOWN}.input_scale": torch.ones(())}), "weight-only"),
    "groups of 16": (lambda it: it.quantization.update(group_size=16), "alignment"),
    "another algorithm": (lambda it: it.quantization_config.update(quant_algo="FP8"), "config-agreement"),
}
BESIDE_THE_SOURCE: dict[str, Callable[[Surgery], Any]] = {
    "an exponent is one more": exponents(lambda t: one_exponent(int(t[5, 1]) + 1)(t)),
    "an exponent is one less": exponents(lambda t: one_exponent(int(t[5, 1]) - 1)(t)),
    "all exponents are one more": exponents(lambda t: t + 1),
    "exponents of two rows change places": exponents(lambda t: t.flip(0)),
    "exponents move by one block": exponents(lambda t: t.roll(1, dims=1)),
    "exponents are swizzled": exponents(lambda t: t.view(4, 32, -1).transpose(0, 1).reshape(t.shape)),
    "exponents without their bias": exponents(lambda t: t - 127),
    "codes of a row are zero": lambda it: it.tensors.update({f"{DOWN}.weight": _without_a_row(it)}),
}


def _without_a_row(surgery: Surgery) -> torch.Tensor:
    codes = surgery.tensors[f"{DOWN}.weight"].clone()
    codes.view(torch.uint8)[3] = 0
    return codes


@pytest.mark.parametrize("case", WITHOUT_SOURCE)
def test_what_is_wrong_by_itself_is_found_by_itself(case: str, open_copy: Open) -> None:
    spoil, check = WITHOUT_SOURCE[case]
    surgery = open_copy("mxfp8")
    spoil(surgery)
    surgery.close()
    assert check in errors_of(surgery.directory)


@pytest.mark.parametrize("case", BESIDE_THE_SOURCE)
def test_what_the_values_show_is_found_beside_the_source(case: str, open_copy: Open, pristine: dict[str, Path]) -> None:
    surgery = open_copy("mxfp8")
    BESIDE_THE_SOURCE[case](surgery)
    surgery.close()
    assert errors_of(surgery.directory, pristine["source"]) & {"error-bound", "gain", "value-bound", "source-values"}
