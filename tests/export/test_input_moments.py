"""The file of moments by the names of an export, and a verdict that knows how large inputs are."""

import json
import re
import shutil
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from quantplug import (
    LayerSpec,
    build_model,
    export_mcore_gpt_to_hf,
    verify_checkpoint,
)
from quantplug.cli.report import print_report
from quantplug.errors import ArgumentError, SourceError
from quantplug.html_report import write_html
from quantplug.verify import Severity, VerifyReport, judge
from quantplug.verify.source.input_moments import InputMoments
from tests.calibration.local_model import run
from tests.export.checkpoints import one_rank
from tests.logits import transformers_model

PAGE = Path(__file__).parents[2] / "docs" / "verify.md"
OFF = {"quantizer_name": "*input_quantizer", "enable": False}
SWEEP = mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG
STATIC = {**SWEEP, "quant_cfg": [*SWEEP["quant_cfg"], OFF]}
LARGE = (3, 17, 40)
READERS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight", "gate.weight")


def with_large_columns(made: Path, directory: Path) -> Path:
    """The same function with columns of weights times 32 behind norms that make their inputs as much smaller."""
    shutil.copytree(made, directory)
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            tensor[list(LARGE)] /= 32
        elif name.endswith(READERS):
            tensor[:, list(LARGE)] *= 32
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


@dataclass(frozen=True)
class Made:
    """An export of clipped weights, its source and the moments of its inputs."""

    source: Path
    out: Path
    moments: Path

    def judged(self) -> VerifyReport:
        return verify_checkpoint(self.out, self.source, moments=self.moments)


def make(plain: Path, scratch: Path, algorithm: str) -> Made:
    made = Made(with_large_columns(plain, scratch / "source"), scratch / "out", scratch / "moments.safetensors")
    with one_rank():
        model = build_model(made.source, import_weights=True, layer_spec=LayerSpec.LOCAL, dtype=torch.float32)
        mtq.quantize(model, {**STATIC, "algorithm": algorithm}, run)
        export_mcore_gpt_to_hf(model, made.source, export_dir=made.out)
        # As the page says it: its one block of code.
        (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
        names = {"model": model, "source": made.source, "forward_loop": run}
        exec(block.replace("moments.safetensors", str(made.moments)), names)
    return made


@pytest.fixture(scope="module")
def whole(tiny_qwen3_moe_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tiny_qwen3_moe_dir, tmp_path_factory.mktemp("moments"), "weighted_mse")


@pytest.fixture
def made(whole: Made, tmp_path: Path) -> Made:
    """A copy, to be spoilt."""
    shutil.copytree(whole.out, tmp_path / "out")
    shutil.copy(whole.moments, tmp_path / "moments.safetensors")
    return Made(whole.source, tmp_path / "out", tmp_path / "moments.safetensors")


def test_what_is_clipped_where_inputs_are_small_is_no_error(made: Made) -> None:
    blind = verify_checkpoint(made.out, made.source)
    assert {str(check) for check in blind.checks(Severity.ERROR)} <= {"error-bound", "gain"}
    assert not blind.ok
    assert all(kind.input_error is None for kind in blind.errors_by_kind)

    judgement = judge(made.out, made.source, moments=made.moments)
    report = judgement.report
    assert report.ok, report.findings
    notes = {finding.subject for finding in report.findings if "of rounding" in finding.message}
    assert notes == {finding.subject for finding in blind.findings if finding.severity is Severity.ERROR}
    printed, page = Console(record=True, width=160, file=StringIO()), made.out.with_name("page.html")
    print_report(report, printed, 20)
    assert "by inputs" in printed.export_text()
    write_html(judgement, page)
    assert '"By inputs"' in page.read_text()
    kinds = {kind["kind"]: kind for kind in json.loads(report.to_json())["errors_by_kind"]}
    assert kinds["self_attn.q_proj"]["input_error"] < 0.5 * kinds["self_attn.q_proj"]["relative_error"]


def test_the_remedy_that_is_named_where_feedback_looks_wrong_works(tiny_qwen3_moe_dir: Path, tmp_path: Path) -> None:
    made = make(tiny_qwen3_moe_dir, tmp_path, "gptq")
    blind = [it for it in verify_checkpoint(made.out, made.source).findings if it.severity is Severity.ERROR]
    assert blind
    assert all("--moments FILE" in finding.message for finding in blind)
    report = made.judged()
    assert report.ok, report.findings
    assert {it.subject for it in report.findings if "of rounding" in it.message} == {it.subject for it in blind}


def test_a_wrong_scale_is_one_all_the_same(made: Made) -> None:
    (file,) = made.out.glob("*.safetensors")
    tensors = load_file(file)
    wrong = "model.layers.1.mlp.experts.3"
    for part in ("gate_proj", "up_proj"):
        tensors[f"{wrong}.{part}.weight_scale_2"] *= 1.15
    save_file(tensors, file, metadata={"format": "pt"})
    found = {finding.subject for finding in made.judged().findings if finding.severity is Severity.ERROR}
    assert found == {f"{wrong}.gate_proj.weight", f"{wrong}.up_proj.weight"}


def test_it_has_what_transformers_multiplies_by_the_names_of_the_export(made: Made) -> None:
    stored = load_file(made.moments)
    (file,) = made.out.glob("*.safetensors")
    quantized = {name.removesuffix("_scale_2") for name in load_file(file) if name.endswith(".weight_scale_2")}
    for suffix in ("input_moments", "input_sketch"):
        ends = {name.removesuffix(f".{suffix}") for name in stored if name.endswith(suffix)}
        assert {f"{name}.weight" for name in ends} == quantized

    model, seen, given = transformers_model(made.source), {}, {}

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], outputs: torch.Tensor, name: str) -> None:
        seen[name] = inputs[0].double().flatten(0, -2).square().mean(0)
        given[name] = outputs.double().flatten(0, -2).square().sum(1).mean().item()

    for name, module in model.named_modules():
        if name.endswith(("q_proj", "o_proj")):
            module.register_forward_hook(partial(note, name=name))
    with torch.no_grad():
        model(torch.arange(48).view(2, 24) * 7 % 500, use_cache=False)
    assert len(seen) == 4
    for name, expected in seen.items():
        torch.testing.assert_close(stored[f"{name}.input_moments"].double(), expected, rtol=1e-4, atol=0)
        weight, sketch = model.get_submodule(name).weight.double(), stored[f"{name}.input_sketch"].double()
        assert (weight @ sketch.T).square().sum().item() == pytest.approx(given[name], rel=0.3)


def test_a_file_of_another_model_is_told(made: Made, tmp_path: Path) -> None:
    stored = load_file(made.moments)
    name = "model.layers.0.self_attn.o_proj"
    mine = stored[f"{name}.input_moments"]
    sketch = stored[f"{name}.input_sketch"]
    for wrong in (
        {f"{name}.input_moments": mine[1:].clone()},
        {f"{name}.input_moments": torch.where(mine == mine[0], -mine, mine)},
        {f"{name}.input_sketch": sketch[:, 1:].clone()},
        {f"{name}.input_sketch": sketch / 0},
    ):
        save_file({**stored, **wrong}, made.moments)
        assert InputMoments.open(made.moments).of(name, len(mine)) is None
    findings = [finding for finding in made.judged().findings if finding.check == "input-moments"]
    assert [finding.subject for finding in findings] == [name]
    for content in ({"other": torch.ones(3)}, {}):
        save_file(content, tmp_path / "other.safetensors")
        with pytest.raises(SourceError, match="input_moments"):
            verify_checkpoint(made.out, made.source, moments=tmp_path / "other.safetensors")
    with pytest.raises(SourceError, match="moments"):
        verify_checkpoint(made.out, made.source, moments=tmp_path / "absent")
    with pytest.raises(ArgumentError, match="source"):
        verify_checkpoint(made.out, moments=made.moments)
