"""A directory with an adapter of PEFT, alone or beside a model: every command says what it is and what to do."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantplug import quantize_checkpoint
from quantplug.checkpoint.config.file import read_config_file
from quantplug.checkpoint.side_files import choose_side_files
from quantplug.errors import SourceError
from quantplug.verify import Severity, VerifyReport, verify_checkpoint
from quantplug.verify.checks import Check
from tests.cli.shell import run

BASE = "owner/base"


def put_adapter(directory: Path) -> Path:
    """The files that `save_pretrained` of a `PeftModel` writes."""
    directory.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": BASE, "r": 2, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 160)}
    save_file(lora, directory / "adapter_model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    return put_adapter(tmp_path / "it's alone")


@pytest.fixture
def beside(tiny_qwen3_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_qwen3_dir, tmp_path / "beside")
    return put_adapter(tmp_path / "beside")


def said_of_adapter(report: VerifyReport) -> list[tuple[Severity, str]]:
    return [
        (it.severity, it.message)
        for it in report.findings
        if it.check is Check.FILES and it.subject == "adapter_config.json"
    ]


def commands(directory: Path, tmp_path: Path) -> list[str]:
    assert run("models", directory, "--json", tmp_path / "said.json")[0] == 0
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["adapter"] == f"LORA adapter (PEFT) of {BASE}"
    lines: list[str] = said["commands"]
    for line in lines:
        program, *arguments = shlex.split(line)
        if program == "python":
            compile(arguments[1], "command", "exec")
    return lines


def test_an_adapter_alone_is_quantized_by_what_merges_it(alone: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=rf"no model\.\n.*adapter_config.json: is of a LORA adapter.*{BASE}"
    ) as caught:
        quantize_checkpoint(alone, tmp_path / "out", "w4a16_nvfp4")
    assert "merge_and_unload" in caught.value.remedy

    merge, quantize = commands(alone, tmp_path)
    assert "AutoPeftModelForCausalLM" in merge
    assert repr(str(alone)) in shlex.split(merge)[2]
    assert quantize.startswith("quantplug quantize MERGED ")


def test_a_model_with_an_adapter_is_not_quantized_before_they_are_apart(beside: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"adapter_model\.safetensors: is an adapter") as caught:
        quantize_checkpoint(beside, tmp_path / "out", "w4a16_nvfp4")
    assert "Move the adapter" in caught.value.remedy
    assert "index" not in caught.value.remedy

    apart, merge, quantize = commands(beside, tmp_path)
    assert apart == f"mkdir {beside}/adapter && mv {beside}/adapter_* {beside}/adapter"
    assert "PeftModel.from_pretrained" in merge
    assert quantize.startswith("quantplug quantize MERGED ")
    (beside / "adapter").mkdir()
    for path in beside.glob("adapter_*"):
        path.rename(beside / "adapter" / path.name)
    assert quantize_checkpoint(beside, tmp_path / "out", "w4a16_nvfp4").directory == tmp_path / "out"


def test_an_adapter_without_weights_of_its_model_is_one_alone(beside: Path, tmp_path: Path) -> None:
    (beside / "model.safetensors").unlink()

    merge, _ = commands(beside, tmp_path)

    assert "AutoPeftModelForCausalLM" in merge


def test_verify_tells_of_adapters(alone: Path, beside: Path, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny_qwen3_dir, tmp_path / "out", "w4a16_nvfp4")
    assert said_of_adapter(verify_checkpoint(tmp_path / "out", tiny_qwen3_dir)) == []

    ((severity, message),) = said_of_adapter(verify_checkpoint(alone))
    assert severity is Severity.ERROR
    assert "and no model" in message
    ((severity, message),) = said_of_adapter(verify_checkpoint(tmp_path / "out", beside))
    assert severity is Severity.ERROR
    assert message.startswith("in the source: a LORA adapter")
    put_adapter(tmp_path / "out")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()  # transformers stops without it, and servers do not look.
    ((severity, message),) = said_of_adapter(verify_checkpoint(tmp_path / "out", tiny_qwen3_dir))
    assert severity is Severity.ERROR
    assert "move it out" in message
    assert commands(tmp_path / "out", tmp_path)[1:] == [f"quantplug verify {tmp_path / 'out'}"]


@pytest.mark.parametrize("text", ["{", "[]"])
def test_an_adapters_config_that_cannot_be_read_is_told(text: str, beside: Path) -> None:
    (beside / "adapter_config.json").write_text(text)

    ((severity, message),) = said_of_adapter(verify_checkpoint(beside))

    assert severity is Severity.ERROR
    assert "JSON" in message


def test_an_adapter_is_not_carried_into_an_export(beside: Path) -> None:
    # Where a trainer's weights are exported, those of the Hugging Face directory may be absent, and an adapter there.
    chosen = choose_side_files(beside, code=False)

    assert not any(name.startswith("adapter_") for name in chosen.carried)
    assert "adapter" in chosen.left_out["adapter_config.json"]


def test_what_is_neither_model_nor_adapter_is_told_as_before(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no Hugging Face checkpoint"):
        read_config_file(tmp_path)
