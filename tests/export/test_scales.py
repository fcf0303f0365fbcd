"""Scales of blocks that are searched for, in ways that need no data: the bytes of the definition, and refusals."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantplug import export_hf_weights_quant, quantize_checkpoint
from quantplug.errors import ArgumentError
from quantplug.verify import Severity, verify_checkpoint
from tests.export.checkpoints import load, read, same_bytes
from tests.export.refusals import offenders, refused
from tests.formats.test_search import by_definition

Sources = Callable[[str], Path]
LARGEST = {"four_over_six": 6 * 256, "mse": 6 * 448}


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("scales", ["four_over_six", "mse"])
def test_every_weight_has_the_scales_of_the_definition_on_disk_and_in_a_stream(
    scales: str, sources: Sources, tmp_path: Path
) -> None:
    source = sources("moe")
    quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4", scales=scales)
    plain, found = read(source), read(tmp_path / "out")
    packed = [name for name in plain if found[name].dtype == torch.uint8]
    assert any("experts" in name for name in packed)
    for name in packed:
        # q, k and v, or gate and up, share the scale of the largest of them: none asks for a larger one.
        scale_2 = found[f"{name}_scale_2"]
        amax = scale_2.item() * LARGEST[scales]
        assert plain[name].float().abs().max().item() <= amax * (1 + 1e-6)
        codes, of_definition = by_definition(plain[name], amax, scales)
        assert abs(of_definition / scale_2.numpy() - 1) < 1e-6
        if of_definition == scale_2.numpy():
            assert found[f"{name}_scale"].view(torch.uint8).flatten().tolist() == codes.tolist(), name
    assert verify_checkpoint(tmp_path / "out", source).ok
    streamed = dict(export_hf_weights_quant(load(source), source, quant_format="w4a16_nvfp4", scales=scales))
    assert streamed.keys() == found.keys()
    assert [name for name in found if not same_bytes(streamed[name], found[name])] == []


def test_an_input_scale_is_that_of_the_format_whatever_the_search(sources: Sources, tmp_path: Path) -> None:
    for scales in ("max", "four_over_six"):
        quantize_checkpoint(sources("moe"), tmp_path / scales, "nvfp4", input_scale=1.0, scales=scales)
    found = read(tmp_path / "four_over_six")
    assert {value.item() for name, value in found.items() if name.endswith("input_scale")} == {1.0}


@pytest.mark.parametrize(
    ("quant_format", "scales", "says"),
    [
        ("w8a16_fp8", "mse", "w4a16_nvfp4"),
        ("fp8_blockwise", "four_over_six", "w4a16_nvfp4"),
        ("w4a16_nvfp4", "mce", "mse"),
    ],
)
def test_formats_without_such_scales_are_refused(
    quant_format: str, scales: str, says: str, sources: Sources, tmp_path: Path
) -> None:
    source = sources("moe")
    with refused(ArgumentError, tmp_path) as caught:
        quantize_checkpoint(source, tmp_path / "out", quant_format, scales=scales)
    assert offenders(caught) == {("scales", None)}
    assert says in caught.value.remedy


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_wrong_scale_is_found_among_searched_ones(factor: float, sources: Sources, tmp_path: Path) -> None:
    quantize_checkpoint(sources("moe"), tmp_path / "out", "w4a16_nvfp4", scales="mse")
    (path,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(path)
    scales = tensors["model.layers.1.self_attn.o_proj.weight_scale"]
    scales[3] = (scales[3].float() * factor).to(scales.dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    report = verify_checkpoint(tmp_path / "out", sources("moe"))
    assert {finding.subject for finding in report.findings if finding.severity is Severity.ERROR} == {
        "model.layers.1.self_attn.o_proj.weight"
    }
