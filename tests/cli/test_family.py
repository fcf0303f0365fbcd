"""A family from a file, or from an installed package: MiniMax-M2 as docs/families.md has it, without a Megatron model.

The checkpoint is transformers' own. Its q_norm is as long as all heads together are.
"""

import json
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

from quantplug.checkpoint.config.file import in_megatrons_words
from quantplug.errors import ArgumentError, UnsupportedModelError
from quantplug.mappings import families, installed
from quantplug.mappings.families import find_family
from quantplug.mappings.families.llama import LLAMA
from tests.cli.shell import run
from tests.families.cases import draw

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(families, "_REGISTERED", {})
    installed.installed_families.cache_clear()
    yield
    installed.installed_families.cache_clear()


@pytest.fixture
def family_file(tmp_path: Path) -> Path:
    (example,) = (block for block in DOCUMENT.read_text().split("```python\n") if "MiniMaxM2ForCausalLM" in block)
    (tmp_path / "minimax_m2.py").write_text(example.split("```")[0])
    return tmp_path / "minimax_m2.py"


@pytest.fixture
def minimax(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts_per_tok": 2}
    model = MiniMaxM2ForCausalLM(MiniMaxM2Config(vocab_size=256, bos_token_id=1, eos_token_id=2, **sizes, **heads))
    draw(dict(model.named_parameters()))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_a_file_s_family_is_quantized_and_verified(minimax: Path, family_file: Path, tmp_path: Path) -> None:
    family = ("--family", family_file)
    command = ("quantize", minimax, tmp_path / "out", "--format", "w4a16_nvfp4")
    assert run(*command)[0] == 2
    assert run("models", minimax, *family)[1].count("family: minimax_m2") == 1
    assert run(*command, *family)[0] == 0
    code, output = run("verify", tmp_path / "out", "--source", minimax, *family)
    assert (code, "OK: 0 errors" in output) == (0, True), output
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.0.block_sparse_moe.gate" in ignored
    assert not any("experts" in name for name in ignored)


def test_a_wrong_shape_of_a_family_s_own_is_found(minimax: Path, family_file: Path, tmp_path: Path) -> None:
    """So what verify says of q_norm above is no silence."""
    text = family_file.read_text().replace("sizes.num_attention_heads * sizes.head_dim", "sizes.head_dim")
    (tmp_path / "wrong.py").write_text(text)
    command = ("quantize", minimax, tmp_path / "out", "--format", "w4a16_nvfp4")

    code, output = run(*command, "--family", tmp_path / "wrong.py")
    assert code == 2
    assert "q_norm.weight of shape [128], the config says [32]" in output

    assert run(*command, "--family", family_file)[0] == 0
    code, output = run("verify", tmp_path / "out", "--family", tmp_path / "wrong.py", "--limit", "0")
    assert code == 1
    assert "q_norm" in output


def test_a_model_that_megatron_has_not_is_refused_by_name(minimax: Path, family_file: Path) -> None:
    assert run("models", "--family", family_file)[0] == 0
    family = find_family("MiniMaxM2ForCausalLM")

    with pytest.raises(UnsupportedModelError, match="has no Megatron model") as caught:
        in_megatrons_words(json.loads((minimax / "config.json").read_text()), family, minimax)

    assert "quantplug quantize" in caught.value.remedy


@pytest.mark.parametrize("content", [None, "x = 1\n"])
def test_a_file_that_is_not_there_or_registers_nothing_exits_2(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "family.py").write_text(content)

    code, output = run("models", "--family", tmp_path / "family.py")

    assert code == 2
    assert "family.py" in output
    assert "register_family" in output


def offer(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    """A mock of what is installed: to install a package takes a package index."""
    entries = [EntryPoint(f"name{place}", value, installed.GROUP) for place, value in enumerate(values)]
    monkeypatch.setattr(installed, "entry_points", lambda group: entries if group == installed.GROUP else [])


def test_an_installed_package_s_family_is_known(
    minimax: Path, family_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = family_file.read_text().replace("register_family(\n    Family(", "MINIMAX = (\n    Family(")
    (tmp_path / "minimax_package.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    offer(monkeypatch, "minimax_package:MINIMAX")

    assert run("quantize", minimax, tmp_path / "out", "--format", "fp8_dynamic")[0] == 0
    assert run("verify", tmp_path / "out", "--source", minimax)[0] == 0


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("absent_package:FAMILY", "cannot be loaded: No module named 'absent_package'"),
        ("quantplug.mappings.families.llama:ABSENT", "cannot be loaded"),
        ("pathlib:Path", "is a type, not a quantplug.mappings.table.Family"),
        ("quantplug.mappings.families.llama:LLAMA", f"serves {LLAMA.architectures[0]}, which is served already"),
    ],
)
def test_a_package_s_family_that_cannot_be_used_is_named(
    value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, value)

    with pytest.raises(ArgumentError, match="entry points") as caught:
        find_family("LlamaForCausalLM")

    (offender,) = caught.value.offenders
    assert offender.parameter == f"name0 = {value}"
    assert reason in offender.reason
