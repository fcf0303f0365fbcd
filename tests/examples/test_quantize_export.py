"""The two commands of the README on one rank, with a checkpoint between them; tools/demo.sh runs them by torchrun."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor

from examples.evaluate import tokenized
from examples.make_tiny_model import Architecture, Dtype, make_tiny_model
from quantplug.verify import verify_checkpoint
from tests.calibration.largest_inputs import largest_inputs
from tests.export.checkpoints import group_amaxes, linear_weights, read, same_bytes
from tests.ranks import Ended, run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"


Source = Callable[[str], Path]


def forked(script: str, *options: str | Path) -> Ended:
    return run_ranks(1, EXAMPLES / script, *options)


def make(directory: Path, architecture: Architecture) -> Path:
    make_tiny_model(directory, architecture, False, seed=5, layers=2, experts=4, dtype=Dtype.BFLOAT16)
    return directory


def quantize_and_export(source: Path, work: Path, *options: str) -> Path:
    quantized = forked(
        "quantize.py", "--hf-model-id", source, "--megatron-save-path", work / "Q", "--stats-json", work / "s", *options
    )
    assert quantized.ok, quantized.output
    assert "Quantization Statistics" in quantized.output
    exported = forked(
        "export.py", "--hf-model-id", source, "--megatron-load-path", work / "Q", "--export-dir", work / "out"
    )
    assert exported.ok, exported.output
    return work / "out"


@pytest.mark.slow
def test_nvfp4_of_experts_is_modelopts_of_the_source(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", Architecture.QWEN3_MOE)
    options = ("--export-quant-cfg", "nvfp4", "--weight-only", "--kv-cache", "fp8_cast")
    exported = read(quantize_and_export(source, tmp_path, *options))
    original = read(source)
    amaxes = group_amaxes(original)
    for name, weight in linear_weights(original).items():
        if amaxes[name] == 0:
            continue
        scale = torch.tensor(amaxes[name]) / torch.tensor(2688.0)
        packed, block_scales, _ = NVFP4QTensor.quantize(weight, 16, weights_scaling_factor_2=scale)
        module = name.removesuffix(".weight")
        assert same_bytes(exported[name], packed._quantized_data), name
        assert same_bytes(exported[f"{module}.weight_scale"], block_scales), name
        assert same_bytes(exported[f"{module}.weight_scale_2"], scale), name
    assert verify_checkpoint(tmp_path / "out", source).ok
    config = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert config["quantization"]["kv_cache_quant_algo"] == "FP8"

    rows = json.loads((tmp_path / "s").read_text())
    assert "linear_fc1" in json.dumps(rows)


def test_fp8_of_a_dense_model(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", Architecture.QWEN3)
    exported = read(quantize_and_export(source, tmp_path, "--export-quant-cfg", "fp8", "--weight-only"))
    original = read(source)
    for name, amax in group_amaxes(original).items():
        scale = torch.tensor(amax) / torch.tensor(448.0)
        assert same_bytes(exported[name], (original[name].float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn))
    assert verify_checkpoint(tmp_path / "out", source).ok


def test_an_unsupported_architecture_is_refused_at_once(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", Architecture.QWEN3)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchForCausalLM"]}))
    result = forked("quantize.py", "--hf-model-id", source, "--megatron-save-path", tmp_path / "Q", "--weight-only")
    assert result.statuses == (1,)
    assert "UnsupportedModelError" in result.output
    assert "Qwen3MoeForCausalLM" in result.output
    assert not (tmp_path / "Q").exists()


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="with a GPU it runs there")
def test_activations_are_calibrated_on_a_text_without_a_gpu(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", Architecture.QWEN3_MOE)
    (tmp_path / "text").write_text("In the beginning was the Word, and the Word was with God. " * 40)
    data = ("--calib-dataset", tmp_path / "text", "--calib-size", 4, "--calib-seq-length", 32)
    moments = tmp_path / "moments"
    options = ("--export-quant-cfg", "fp8", "--cold-experts", "layer_max", "--moments", moments, *data)
    exported = read(quantize_and_export(source, tmp_path, *options))
    scales = {name: float(tensor) * 448 for name, tensor in exported.items() if name.endswith(".input_scale")}
    tokens = tokenized(source, tmp_path / "text")[: 4 * 32].view(4, 32)
    largest = largest_inputs(source, tokens)
    linears = {"o_proj": "self_attn.o_proj", "down_proj": "experts.down_proj", "up_proj": "experts.gate_up_proj"}
    for layer in range(2):
        for linear, theirs in linears.items():
            (ours,) = {it for name, it in scales.items() if f"layers.{layer}." in name and f".{linear}." in name}
            assert ours == pytest.approx(largest(layer, theirs), rel=1e-5), (layer, linear)
    by_inputs = verify_checkpoint(tmp_path / "out", source, moments=moments)
    assert by_inputs.ok, by_inputs.findings
    assert all(kind.input_error is not None for kind in by_inputs.errors_by_kind)
    rows = json.loads((tmp_path / "s").read_text())["rows"]
    assert {row["weighted"] for row in rows if row["parameter"].endswith("linear_fc2.input_quantizer")} == {False}


def test_a_text_without_a_whole_sequence_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", Architecture.QWEN3)
    (tmp_path / "text").write_text("abc")
    options = ("--export-quant-cfg", "nvfp4", "--calib-dataset", tmp_path / "text")
    result = forked("quantize.py", "--hf-model-id", source, "--megatron-save-path", tmp_path / "Q", *options)
    assert result.statuses == (1,)
    assert "has 3 tokens, not the 512 of a sequence" in " ".join(result.output.split())
    assert not (tmp_path / "Q").exists()


def test_a_recipe_without_data(tmp_path: Path) -> None:
    """Experts in NVFP4 with a constant scale of their inputs, and a KV cache in FP8 by cast, as NVIDIA publishes."""
    source = make(tmp_path / "hf", Architecture.QWEN3_MOE)
    recipe = "nvfp4_experts_only_input_scale1-kv_fp8_cast"
    exported = read(quantize_and_export(source, tmp_path, "--recipe", recipe))
    scales = {name: tensor.item() for name, tensor in exported.items() if name.endswith(".input_scale")}
    assert set(scales.values()) == {1.0}
    assert all(".mlp.experts." in name for name in scales)
    assert verify_checkpoint(tmp_path / "out", source).ok


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="with a GPU it calibrates")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--recipe", "nvfp4_default-kv_none-gptq"), "wants gptq"),
        (("--recipe", "nvfp4_weight_only-kv_fp16", "--kv-cache", "fp8_cast"), "--kv-cache: is given beside --recipe"),
        (("--recipe", "no_such_recipe"), "There is no such recipe"),
    ],
)
def test_a_recipe_that_cannot_be_run_here(options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    source = make(tmp_path / "hf", Architecture.QWEN3)
    result = forked("quantize.py", "--hf-model-id", source, "--megatron-save-path", tmp_path / "Q", *options)
    assert result.statuses == (1,)
    assert said in " ".join(result.output.split())
    assert not (tmp_path / "Q").exists()


def test_an_export_without_a_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", Architecture.QWEN3)
    result = forked(
        "export.py", "--hf-model-id", source, "--megatron-load-path", tmp_path / "Q", "--export-dir", tmp_path / "out"
    )
    assert result.statuses == (1,)
    assert "CheckpointError" in result.output
    assert "Traceback" not in result.output.split("CheckpointError")[0]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_source_with_code_of_its_own_is_quantized_where_that_is_trusted(sources: Source, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    shutil.copytree(sources("dense"), source)
    (source / "modeling_own.py").write_text("raise AssertionError('was run')\n")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Model"}
    (source / "config.json").write_text(json.dumps(config))
    options = ("--hf-model-id", source, "--megatron-save-path", tmp_path / "Q", "--weight-only")

    refused = forked("quantize.py", *options)
    trusted = forked("quantize.py", *options, "--trust-remote-code")

    assert not refused.ok
    assert "auto_map" in refused.output
    assert trusted.ok, trusted.output
