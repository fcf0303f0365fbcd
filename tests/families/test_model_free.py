"""Every family without a model: the same bytes as by way of Megatron-Core."""

from collections.abc import Callable
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest

from quantplug import export_mcore_gpt_to_hf
from quantplug.checkpoint.source_config import read_source_config
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.mappings.families import find_family
from quantplug.plugins.rules import rules_for_high_precision
from quantplug.verify import verify_checkpoint
from tests.export.checkpoints import SCHEMES, load, one_rank, read, same_bytes

# Hidden 160 and expert width 96 do not divide by 128: FP8 in blocks has a checkpoint of its own in tests/export.
FORMATS = ("w4a16_nvfp4", "w8a16_fp8")


def by_megatron(source: Path, scheme: str, out: Path) -> Path:
    """As the examples quantize: what servers load in high precision stays so, and multi-token prediction."""
    config = read_source_config(source)
    family = find_family(config.architecture)
    rules = rules_for_high_precision(family, family.dimensions(config.values), bits=4 if "nvfp4" in scheme else 8)
    with one_rank():
        model = mtq.quantize(load(source), {**SCHEMES[scheme], "quant_cfg": [*SCHEMES[scheme]["quant_cfg"], *rules]})
        export_mcore_gpt_to_hf(model, source, out)
    return out


@pytest.mark.parametrize("format_name", FORMATS)
def test_the_bytes_are_those_of_the_way_through_megatron(
    family: str, format_name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = quantize_checkpoint(checkpoint(family), out, format_name)
    exported = by_megatron(checkpoint(family), format_name, tmp_path / "by_megatron")
    expected, found = read(exported), read(out)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bytes(found[name], expected[name])] == []
    assert {path.name for path in out.iterdir()} == {path.name for path in exported.iterdir()}
    for path in exported.glob("*.json"):
        assert (out / path.name).read_text() == path.read_text(), path.name
    assert result.tensors == len(expected)
    assert verify_checkpoint(out, checkpoint(family)).ok


def test_multi_token_prediction_is_quantized_on_demand(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    quantize_checkpoint(checkpoint("glm4_moe"), tmp_path / "out", "w4a16_nvfp4", quantize_mtp=True)
    scaled = {name for name in read(tmp_path / "out") if name.endswith(".weight_scale_2")}
    assert "model.layers.3.mlp.experts.0.gate_proj.weight_scale_2" in scaled
    assert "model.layers.3.eh_proj.weight_scale_2" not in scaled
    assert verify_checkpoint(tmp_path / "out", checkpoint("glm4_moe")).ok
