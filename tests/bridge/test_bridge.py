"""docs/megatron_bridge.md, run as it stands with small models: all its ways end in the bytes of our own import."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from typer.testing import CliRunner

import quantplug
import quantplug.plugins
from quantplug.cli import app
from quantplug.megatron import cpu
from tests.export.checkpoints import files_of, load, one_rank

pytest.importorskip("megatron.bridge", reason="this stack has no Megatron-Bridge")

PAGE = Path(__file__).parents[2] / "docs" / "megatron_bridge.md"
BLOCK = re.compile(r"```(python|bash)\n(.*?)```", re.DOTALL)
NAME = "Qwen/Qwen3-30B-A3B"
# What a machine without a GPU needs of a provider.
ON_A_CPU = {
    "provider.finalize()": 'provider.moe_token_dispatcher_type = "allgather"\n'
    "provider.gradient_accumulation_fusion = False\nprovider.finalize()",
    "wrap_with_ddp=False": "wrap_with_ddp=False, use_cpu_initialization=True",
}
FORMAT = "w4a16_nvfp4"


def run_page(source: Path) -> dict[str, Any]:
    """Runs every block of the page in the current directory; gives what its Python has defined."""
    text = PAGE.read_text().replace(NAME, str(source))
    for written, needed in ON_A_CPU.items():
        assert written in text
        text = text.replace(written, needed)
    defined: dict[str, Any] = {"received": {}}
    for language, block in BLOCK.findall(text):
        if language == "python":
            with cpu.construction() if "provide_distributed_model" in block else cpu.checkpointing():
                exec(block, defined)
        else:
            for command, *arguments in map(str.split, block.splitlines()):
                assert command in ("quantplug", "vllm")
                if command == "quantplug":
                    result = CliRunner().invoke(app, arguments)
                    assert result.exit_code == 0, result.output
    return defined


@pytest.fixture(scope="module", params=["tiny_qwen3_moe_dir", "tiny_qwen3_dir"])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    source: Path = request.getfixturevalue(request.param)
    directory = tmp_path_factory.mktemp("bridge")
    with pytest.MonkeyPatch.context() as patch, one_rank():
        patch.chdir(directory)
        # Bridge asks CUDA for its random numbers, also where it does not save them.
        patch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
        defined = run_page(source)
        own = load(source)
        mtq.quantize(own, quantplug.quant_cfg(FORMAT, source))
        quantplug.export_mcore_gpt_to_hf(own, source, export_dir=directory / "own")
        yield {**defined, "own": own, "source": source, "directory": directory}


@pytest.mark.parametrize("way", ["out-from-checkpoint", "out-from-model", "out-from-quantizers"])
def test_an_export_has_the_bytes_of_our_import(ran: dict[str, Any], way: str) -> None:
    own = files_of(ran["directory"] / "own")
    assert any(name.endswith(".safetensors") for name in own)
    assert files_of(ran["directory"] / way) == own


def test_a_refit_has_the_tensors_of_our_import(ran: dict[str, Any]) -> None:
    own = dict(quantplug.export_hf_weights_quant(ran["own"], ran["source"], quant_format=FORMAT))
    assert own.keys() == ran["received"].keys()
    assert [name for name, tensor in ran["received"].items() if not torch.equal(own[name], tensor)] == []


@pytest.mark.parametrize("saved", ["ckpt", "ckpt-quantized"])
def test_what_bridge_saved_loads_as_our_import(ran: dict[str, Any], saved: str) -> None:
    model = quantplug.build_model(ran["source"])
    report = quantplug.load_checkpoint(model, ran["directory"] / saved)
    assert not report.aside
    own = {**dict(ran["own"].named_parameters()), **dict(ran["own"].named_buffers())}
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    amaxes = {name for name in own if name.endswith("_amax")}
    assert found.keys() == (own.keys() if saved == "ckpt-quantized" else own.keys() - amaxes)
    vocabulary = report.vocabulary[0] if report.vocabulary else None
    for name, tensor in found.items():
        rows = vocabulary if name in ("embedding.word_embeddings.weight", "output_layer.weight") else None
        assert torch.equal(tensor[:rows], own[name][:rows]) if tensor.dim() else tensor == own[name], name
