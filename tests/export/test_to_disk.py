"""From Hugging Face to Megatron and back: the source's own bytes are the oracle."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from quantplug import export_mcore_gpt_to_hf
from quantplug.cli import app
from quantplug.errors import QuantplugError
from quantplug.export.live_plan import plan_export
from quantplug.megatron import cpu
from quantplug.megatron.models.build import LayerSpec
from quantplug.plugins import quant_cfg
from tests.export.checkpoints import load, quantize, raw, read, same_bytes

pytestmark = pytest.mark.usefixtures("single_rank")

Sources = Callable[[str], Path]
MODELS = ["moe", "mixed", "dense", "tied"]
SPECS = pytest.mark.parametrize("layer_spec", LayerSpec, ids=["te", "local"])


def assert_same_tensors(exported: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert exported.keys() == expected.keys()
    assert [name for name in expected if not same_bytes(exported[name], expected[name])] == []


@SPECS
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_gives_back_every_byte(name: str, layer_spec: LayerSpec, sources: Sources, tmp_path: Path) -> None:
    result = export_mcore_gpt_to_hf(load(sources(name), layer_spec), sources(name), export_dir=tmp_path / "out")
    exported = read(tmp_path / "out")
    assert_same_tensors(exported, read(sources(name)))
    assert (result.algorithm, result.tensors) == (None, len(exported))
    assert result.nbytes == sum(tensor.nbytes for tensor in exported.values())
    assert ("lm_head.weight" in exported) == (name != "tied")


@SPECS
def test_round_trip_of_an_fp32_model(layer_spec: LayerSpec, sources: Sources, tmp_path: Path) -> None:
    model = load(sources("moe_fp32"), layer_spec, dtype=torch.float32)
    export_mcore_gpt_to_hf(model, sources("moe_fp32"), export_dir=tmp_path / "out", dtype=torch.float32)
    assert_same_tensors(read(tmp_path / "out"), read(sources("moe_fp32")))


def test_a_wider_dtype_holds_the_same_values(sources: Sources, tmp_path: Path) -> None:
    export_mcore_gpt_to_hf(load(sources("moe")), sources("moe"), export_dir=tmp_path / "out", dtype=torch.float32)
    expected = {name: tensor.float() for name, tensor in read(sources("moe")).items()}
    assert_same_tensors(read(tmp_path / "out"), expected)


def test_the_router_may_have_a_dtype_of_its_own(sources: Sources, tmp_path: Path) -> None:
    export_mcore_gpt_to_hf(
        load(sources("moe")), sources("moe"), export_dir=tmp_path / "out", moe_router_dtype=torch.float32
    )
    expected = {
        name: tensor.float() if name.endswith("mlp.gate.weight") else tensor
        for name, tensor in read(sources("moe")).items()
    }
    assert_same_tensors(read(tmp_path / "out"), expected)


def test_the_bias_of_a_router_has_its_dtype(tiny_gpt_oss_dir: Path, tmp_path: Path) -> None:
    config = quant_cfg("w4a16_nvfp4", tiny_gpt_oss_dir, keep_experts=True)
    model = mtq.quantize(load(tiny_gpt_oss_dir), config)
    export_mcore_gpt_to_hf(model, tiny_gpt_oss_dir, export_dir=tmp_path / "out", moe_router_dtype=torch.float32)
    source, out = read(tiny_gpt_oss_dir), read(tmp_path / "out")
    routers = [name for name in source if ".router." in name]
    assert {name.rpartition(".")[2] for name in routers} == {"weight", "bias"}
    assert all(same_bytes(out[name], source[name].float()) for name in routers)
    assert [name for name, tensor in out.items() if tensor.is_floating_point() and tensor.dtype == torch.float32] == [
        name for name in out if name in routers or name.endswith("_scale_2")
    ]
    # A module is named once, by its weight.
    excluded = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {name for name in excluded if "router" in name} == {f"model.layers.{layer}.mlp.router" for layer in range(3)}


def test_signed_zeros_subnormals_and_extremes_come_back(sources: Sources, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text((sources("moe") / "config.json").read_text())
    # Every finite bf16 bit pattern, again and again, over all tensors.
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = patterns[patterns.isfinite()]
    tensors = {
        name: finite.repeat(-(-tensor.numel() // len(finite)))[: tensor.numel()].view(tensor.shape).clone()
        for name, tensor in read(sources("moe")).items()
    }
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    export_mcore_gpt_to_hf(load(source), source, export_dir=tmp_path / "out")
    assert_same_tensors(read(tmp_path / "out"), tensors)


@pytest.mark.parametrize("limit", [1, 30_000, 400_000])
def test_many_files(limit: int, sources: Sources, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = export_mcore_gpt_to_hf(load(sources("moe")), sources("moe"), export_dir=out, max_shard_size=limit)
    expected = read(sources("moe"))
    assert_same_tensors(read(out), expected)

    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert result.shards == len(files) > 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert index["weight_map"].keys() == expected.keys()
    for file in files:
        held = [name for name, holder in index["weight_map"].items() if holder == file]
        size = sum(expected[name].nbytes for name in held)
        assert held
        # A weight's tensors (gate and up; q, k and v) stay together.
        assert (
            size <= limit or len({name.rpartition("mlp.")[0] or name.rpartition("_proj")[0][:-1] for name in held}) == 1
        )


def test_transformers_reads_an_export_in_many_files(sources: Sources, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_mcore_gpt_to_hf(load(sources("mixed")), sources("mixed"), export_dir=out, max_shard_size=100_000)
    tokens = torch.tensor([[1, 5, 522, 31]])
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (sources("mixed"), out)]
    assert raw(logits[0]) == raw(logits[1])


def test_padding_rows_are_cut_whatever_they_hold(sources: Sources, tmp_path: Path) -> None:
    model = load(sources("dense"))
    with torch.no_grad():
        for weight in (model.embedding.word_embeddings.weight, model.output_layer.weight):
            assert weight.shape[0] == 640
            weight[523:] = torch.nan
    export_mcore_gpt_to_hf(model, sources("dense"), export_dir=tmp_path / "out")
    assert_same_tensors(read(tmp_path / "out"), read(sources("dense")))


def snapshot(model: torch.nn.Module) -> dict[str, Any]:
    """Everything a model is: its attributes down to the identity of each, its values, its quantizers' state."""
    buffer = io.BytesIO()
    with cpu.checkpointing():  # TE's extra state synchronizes with the device.
        torch.save(model.state_dict(), buffer)
    seen = {
        f"{name}.{attribute}": id(value)
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
    }
    tensors = {
        name: (id(tensor), tensor.data_ptr(), raw(tensor), tensor.requires_grad, tensor.grad is None)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    return {"attributes": seen, "tensors": tensors, "saved": buffer.getvalue()}


@SPECS
@pytest.mark.parametrize("scheme", [None, "w4a16_nvfp4", "nvfp4", "fp8"])
def test_the_model_is_not_changed(scheme: str | None, layer_spec: LayerSpec, sources: Sources, tmp_path: Path) -> None:
    model = load(sources("moe"), layer_spec)
    if scheme is not None:
        quantize(model, scheme)
    before, rng = snapshot(model), torch.get_rng_state()
    export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.is_grad_enabled()


def test_the_model_is_not_changed_by_an_export_that_fails(sources: Sources, tmp_path: Path) -> None:
    model = quantize(load(sources("moe")), "nvfp4")
    expert = model.get_submodule("decoder.layers.1.mlp.experts.linear_fc1")
    with torch.no_grad():
        expert.weight2[0, 0] = torch.nan
    before = snapshot(model)
    with pytest.raises(QuantplugError):
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    assert snapshot(model) == before

    with torch.no_grad():
        expert.weight2[0, 0] = 0.0
    before = snapshot(model)

    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("Packing") and done == total:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out", progress=stop)
    assert snapshot(model) == before


def test_a_plan_says_what_the_export_writes(sources: Sources, tmp_path: Path) -> None:
    model = quantize(load(sources("mixed")), "nvfp4")
    settings = {"dtype": torch.float32, "max_shard_size": 100_000}
    plan = plan_export(model, sources("mixed"), **settings).plan
    assert list(tmp_path.iterdir()) == []
    export_mcore_gpt_to_hf(model, sources("mixed"), export_dir=tmp_path / "out", **settings)
    exported = read(tmp_path / "out")
    expected = plan.expected()
    assert exported.keys() == expected.keys()
    for name, tensor in exported.items():
        assert (expected[name].shape, expected[name].dtype) == (tuple(tensor.shape), tensor.dtype)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {name: file.name for file in plan.files for name in file.tensors}
    assert plan.digest == plan_export(model, sources("mixed"), **settings).plan.digest


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("moe", "w4a16_nvfp4"),
        ("mixed", "nvfp4"),
        ("dense", "fp8"),
        ("tied", "w8a16_fp8"),
        ("moe_blocks", "fp8_blockwise"),
    ],
)
def test_the_verify_command_passes(name: str, scheme: str, sources: Sources, exports: Callable[..., Path]) -> None:
    result = CliRunner().invoke(app, ["verify", str(exports(name, scheme)), "--source", str(sources(name))])
    assert result.exit_code == 0, result.output
