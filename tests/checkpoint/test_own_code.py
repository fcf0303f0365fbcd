"""Code that a source brings: refused on every way unless it is trusted, carried over then, run by none of ours."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantplug import export_mcore_gpt_to_hf
from quantplug.checkpoint.config.source import read_source_config
from quantplug.cli import app
from quantplug.errors import SourceError, UnsupportedModelError
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from tests.export.checkpoints import load, one_rank
from tests.export.refusals import refused

CODE = "raise AssertionError('was run')\n"


@pytest.fixture(params=["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def with_code(request: pytest.FixtureRequest, sources: Callable[[str], Path], tmp_path: Path) -> tuple[Path, str]:
    """A checkpoint with code beside it, and the file that names it."""
    source = tmp_path / "source"
    source.mkdir()
    for path in sources("dense").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "modeling_own.py").write_text(CODE)
    path = source / request.param
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, "auto_map": {"AutoModelForCausalLM": "modeling_own.Model"}}))
    return source, request.param


def test_it_is_refused_without_a_model(with_code: tuple[Path, str], tmp_path: Path) -> None:
    source, file = with_code
    with refused(SourceError, tmp_path) as caught:
        quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    assert [offender.parameter for offender in caught.value.offenders] == [str(source / file)]
    assert "modeling_own.Model" in str(caught.value)
    assert "--trust-remote-code" in str(caught.value)


def test_what_a_tokenizer_names_is_said(sources: Callable[[str], Path], tmp_path: Path) -> None:
    """Kimi-K2's, whose second entry stands for a fast tokenizer that there is not."""
    shutil.copytree(sources("dense"), tmp_path / "source")
    content = {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}}
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(content))
    with refused(SourceError, tmp_path) as caught:
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", "w4a16_nvfp4")
    assert "auto_map names tokenization_kimi.TikTokenTokenizer\n" in str(caught.value)


def test_code_of_an_architecture_that_is_not_served_is_no_matter(with_code: tuple[Path, str], tmp_path: Path) -> None:
    """To trust it would lead to another refusal."""
    source, _ = with_code
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["MiniMaxM2ForCausalLM"]}))
    for read in (
        lambda: quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4"),
        lambda: read_source_config(source),
    ):
        with pytest.raises(UnsupportedModelError, match="MiniMaxM2ForCausalLM"):
            read()


def test_it_is_refused_through_megatron(
    with_code: tuple[Path, str], sources: Callable[[str], Path], tmp_path: Path
) -> None:
    source, file = with_code
    with one_rank():
        model = load(sources("dense"))
        with refused(SourceError, tmp_path) as caught:
            export_mcore_gpt_to_hf(model, source, tmp_path / "out")
    assert [offender.parameter for offender in caught.value.offenders] == [str(source / file)]


def test_trusted_it_is_carried_over_and_not_run(with_code: tuple[Path, str], tmp_path: Path) -> None:
    source, file = with_code
    arguments = ["quantize", str(source), str(tmp_path / "out"), "--format", "w8a16_fp8", "--trust-remote-code"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "modeling_own.py").read_text() == CODE
    assert json.loads((tmp_path / "out" / file).read_text())["auto_map"]
