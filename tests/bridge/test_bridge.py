"""Models that Megatron-Bridge makes and loads, in the stack that has it: exported to the bytes of our own import."""

from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

import quantplug
import quantplug.plugins
from quantplug.megatron import cpu
from quantplug.megatron.parameters import LanguageModel
from tests.export.checkpoints import load

pytest.importorskip("megatron.bridge", reason="this stack has no Megatron-Bridge")
pytestmark = pytest.mark.usefixtures("single_rank")


def bridged(source: Path) -> LanguageModel:
    """As a user of Bridge makes a model: from its provider, with the weights that Bridge reads."""
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(str(source))
    provider = bridge.to_megatron_provider(load_weights=False)
    # What a machine without a GPU needs.
    provider.use_cpu_initialization = True
    provider.moe_token_dispatcher_type = "allgather"
    provider.gradient_accumulation_fusion = False
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    with cpu.construction():
        provider.finalize()
        model = provider.provide().to(torch.bfloat16)
        bridge.load_hf_weights([model])
    return model


@pytest.mark.parametrize("fixture", ["tiny_qwen3_moe_dir", "tiny_qwen3_dir"])
def test_it_is_exported_to_the_bytes_of_our_import(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source: Path = request.getfixturevalue(fixture)
    made = {"bridge": bridged(source), "own": load(source)}
    for name, model in made.items():
        mtq.quantize(model, quantplug.quant_cfg("w4a16_nvfp4", source))
        quantplug.export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / name)
    files = {path.name: path.read_bytes() for path in (tmp_path / "own").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "bridge").iterdir()}
    assert any(name.endswith(".safetensors") for name in files)
    streamed = quantplug.export_hf_weights_quant(made["bridge"], source, quant_format="w4a16_nvfp4")
    own = dict(quantplug.export_hf_weights_quant(made["own"], source, quant_format="w4a16_nvfp4"))
    assert all(torch.equal(own.pop(name), tensor) for name, tensor in streamed)
    assert own == {}
