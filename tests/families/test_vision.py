"""Vision-language models: what Megatron does not hold is carried over bit for bit; experts are as servers read them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Llama4Config, Qwen3VLMoeConfig

from quantplug import export_hf_weights_quant, export_mcore_gpt_to_hf
from quantplug.errors import MappingError, SourceError
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.verify import Severity, verify_checkpoint
from tests.export.checkpoints import load, one_rank, quantize, read, same_bytes
from tests.export.refusals import refused
from tests.families.cases import CASES, LLAMA4, QWEN3_VL_MOE, Tensors, save

LAYER = "model.language_model.layers.2"
ODD: Tensors = {
    "model.visual.ids": torch.tensor([3, -(2**40), 7]),
    "model.visual.scalar": torch.tensor(2.5, dtype=torch.float32),
    "model.visual.mask": torch.tensor([[True, False]]),
    "model.visual.wide.weight": torch.randn(3, 5, dtype=torch.float32),
    "model.visual.none.weight": torch.empty(0, 4, dtype=torch.bfloat16),
    "model.visual.codes.weight": torch.randn(4, 6).to(torch.float8_e4m3fn),
    "model.visual.special": torch.tensor([float("nan"), float("inf"), -0.0], dtype=torch.bfloat16),
}


def rewritten(source: Path, directory: Path, change: Callable[[Tensors], object]) -> Path:
    """A copy of a checkpoint with its tensors changed."""
    directory.mkdir()
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text((source / "config.json").read_text())
    return directory


@pytest.fixture
def odd(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint whose vision model has tensors of many types and shapes."""
    return rewritten(checkpoint("qwen3_vl_tied"), tmp_path / "odd", lambda tensors: tensors.update(ODD))


def visual(directory: Path) -> Tensors:
    return {name: tensor for name, tensor in read(directory).items() if name.startswith("model.visual.")}


def test_tensors_of_any_type_are_carried_through_megatron(odd: Path, tmp_path: Path) -> None:
    with one_rank():
        export_mcore_gpt_to_hf(quantize(load(odd), "w4a16_nvfp4"), odd, tmp_path / "out")
    expected, found = visual(odd), visual(tmp_path / "out")
    assert ODD.keys() < found.keys() == expected.keys()
    assert [name for name in expected if not same_bytes(found[name], expected[name])] == []


def test_tensors_of_any_type_are_carried_without_a_model(odd: Path, tmp_path: Path) -> None:
    quantize_checkpoint(odd, tmp_path / "out", "w4a16_nvfp4")
    expected, found = visual(odd), visual(tmp_path / "out")
    assert ODD.keys() < found.keys() == expected.keys()
    assert [name for name in expected if not same_bytes(found[name], expected[name])] == []


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v_moe", "llama4"])
def test_every_weight_of_vision_is_excluded_by_its_name(name: str, export: Callable[..., Path]) -> None:
    directory = export(name, "w4a16_nvfp4")
    config = json.loads((directory / "hf_quant_config.json").read_text())
    tensors = read(directory)
    beginnings = ("model.visual.", "vision_model.", "multi_modal_projector.")
    weights = {
        tensor.removesuffix(".weight")
        for tensor, data in tensors.items()
        if tensor.startswith(beginnings) and tensor.endswith(".weight") and data.dim() > 1
    }
    assert weights
    assert weights <= set(config["quantization"]["exclude_modules"])
    assert not any(set(pattern) & set("*?") for pattern in config["quantization"]["exclude_modules"])


def test_without_the_source_s_weights_an_export_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "config_alone"
    source.mkdir()
    (source / "config.json").write_text((checkpoint("qwen3_vl_tied") / "config.json").read_text())
    with one_rank():
        model = load(checkpoint("qwen3_vl_tied"))
        with refused(SourceError, tmp_path) as caught:
            export_mcore_gpt_to_hf(model, source, tmp_path / "out")
    assert [offender.parameter for offender in caught.value.offenders] == ["model.visual.*"]


def test_a_tensor_of_neither_model_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    stranger = {"model.language_model.layers.0.mlp.extra.weight": torch.ones(4, 4)}
    source = rewritten(checkpoint("qwen3_vl_tied"), tmp_path / "source", lambda tensors: tensors.update(stranger))
    with refused(MappingError, tmp_path) as caught:
        quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    assert [offender.parameter for offender in caught.value.offenders] == list(stranger)


def test_a_stream_has_the_language_model_alone_and_experts_one_by_one(
    checkpoint: Callable[[str], Path], export: Callable[..., Path]
) -> None:
    with one_rank():
        model = load(checkpoint("qwen3_vl_moe"))
        streamed = dict(export_hf_weights_quant(model, checkpoint("qwen3_vl_moe"), quant_format="w4a16_nvfp4"))
    expected = read(export("qwen3_vl_moe", "w4a16_nvfp4"))
    expected = {name: tensor for name, tensor in expected.items() if not name.startswith("model.visual.")}
    assert streamed.keys() == expected.keys()
    assert [name for name in expected if not same_bytes(streamed[name], expected[name])] == []


def test_experts_that_are_not_quantized_are_written_one_by_one_too(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Readers take all experts of a checkpoint in one of the two ways."""
    source, out = checkpoint("qwen3_vl_moe"), tmp_path / "out"
    quantize_checkpoint(source, out, "w4a16_nvfp4", exclude=["model.language_model.layers.0.*"])
    found, stored = read(out), read(source)
    experts = "model.language_model.layers.0.mlp.experts"
    assert f"{experts}.gate_up_proj" not in found
    for expert, matrix in enumerate(stored[f"{experts}.gate_up_proj"].mT):
        gate, up = matrix.chunk(2)
        assert same_bytes(found[f"{experts}.{expert}.gate_proj.weight"], gate)
        assert same_bytes(found[f"{experts}.{expert}.up_proj.weight"], up)
    assert experts in json.loads((out / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert verify_checkpoint(out, source).ok


# --- FP8 in blocks -----------------------------------------------------------------------------------------------

DIVISIBLE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
BLOCKS = {
    "qwen3_vl_moe": Qwen3VLMoeConfig(
        text_config={**QWEN3_VL_MOE.text_config.to_dict(), **DIVISIBLE, "moe_intermediate_size": 128},
        vision_config={**QWEN3_VL_MOE.vision_config.to_dict(), "out_hidden_size": 256},
    ),
    "llama4": Llama4Config(
        text_config={
            **LLAMA4,
            **DIVISIBLE,
            "intermediate_size": 128,
            "intermediate_size_mlp": 256,
            "interleave_moe_layer_step": 2,
        },
        vision_config=CASES["llama4"].config.vision_config.to_dict(),
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_in_fp8_blocks_experts_are_one_by_one(name: str, tmp_path: Path) -> None:
    source = save(replace(CASES[name], config=BLOCKS[name]), tmp_path / "source")
    with one_rank():
        export_mcore_gpt_to_hf(quantize(load(source), "fp8_blockwise"), source, tmp_path / "out")
    quantize_checkpoint(source, tmp_path / "free", "fp8_blockwise")
    exported, free = read(tmp_path / "out"), read(tmp_path / "free")
    (prefix,) = {key.partition(".experts.")[0] for key in exported if ".1." in key and ".experts." in key}
    for linear, shape in (("gate_proj", (128, 256)), ("up_proj", (128, 256)), ("down_proj", (256, 128))):
        assert exported[f"{prefix}.experts.5.{linear}.weight"].shape == torch.Size(shape)
        scales = exported[f"{prefix}.experts.5.{linear}.weight_scale_inv"]
        assert scales.shape == torch.Size([size // 128 for size in shape])
    assert free.keys() == exported.keys()
    assert [key for key in free if not same_bytes(free[key], exported[key])] == []
    assert verify_checkpoint(tmp_path / "out", source).ok


# --- What verify finds -------------------------------------------------------------------------------------------


def swap(one: str, other: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        for suffix in ("weight", "weight_scale"):
            names = f"{one}.{suffix}", f"{other}.{suffix}"
            tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]

    return change


EXPERT = f"{LAYER}.mlp.experts.3"
FC1 = "model.visual.blocks.1.mlp.linear_fc1"
SPOILT: dict[str, tuple[Callable[[Tensors], object], set[tuple[str, str]]]] = {
    "nothing": (lambda tensors: None, set()),
    "a vision tensor is gone": (lambda t: t.pop(f"{FC1}.bias"), {("source-names", f"{FC1}.bias")}),
    "a vision weight is another": (lambda t: t[f"{FC1}.weight"].mul_(-1), {("source-values", f"{FC1}.weight")}),
    "a vision weight is of another type": (
        lambda t: t.update({f"{FC1}.weight": t[f"{FC1}.weight"].float()}),
        {("source-values", f"{FC1}.weight")},
    ),
    "gate and up in each other's place": (
        swap(f"{EXPERT}.gate_proj", f"{EXPERT}.up_proj"),
        {("error-bound", f"{EXPERT}.gate_proj.weight"), ("error-bound", f"{EXPERT}.up_proj.weight")},
    ),
    "two experts in each other's place": (
        swap(f"{EXPERT}.down_proj", f"{LAYER}.mlp.experts.0.down_proj"),
        {("error-bound", f"{EXPERT}.down_proj.weight"), ("error-bound", f"{LAYER}.mlp.experts.0.down_proj.weight")},
    ),
    "an expert is gone": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith(f"{EXPERT}.")],
        {("experts", f"{LAYER}.mlp.experts")}
        | {("source-names", f"{EXPERT}.{linear}_proj.weight") for linear in ("gate", "up", "down")},
    ),
    "one projection of an expert is gone": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith(f"{EXPERT}.up_proj.")],
        {("experts", EXPERT), ("source-names", f"{EXPERT}.up_proj.weight")},
    ),
}


@pytest.mark.parametrize(("spoil", "expected"), SPOILT.values(), ids=SPOILT)
def test_verify_accounts_for_every_tensor_of_the_source(
    spoil: Callable[[Tensors], object],
    expected: set[tuple[str, str]],
    checkpoint: Callable[[str], Path],
    export: Callable[..., Path],
    tmp_path: Path,
) -> None:
    assert told(spoilt(export("qwen3_vl_moe", "w4a16_nvfp4"), spoil, tmp_path), checkpoint("qwen3_vl_moe")) == expected


def spoilt(clean: Path, spoil: Callable[[Tensors], object], directory: Path) -> Path:
    tensors = read(clean)
    spoil(tensors)
    for path in clean.glob("*config.json"):
        (directory / path.name).write_text(path.read_text())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def told(directory: Path, source: Path | None = None) -> set[tuple[str, str]]:
    """Check and subject of every error."""
    findings = verify_checkpoint(directory, source).findings
    return {(str(found.check), found.subject) for found in findings if found.severity is Severity.ERROR}


def test_experts_in_both_ways_are_found(export: Callable[..., Path], tmp_path: Path) -> None:
    name = f"{LAYER}.mlp.experts.down_proj"
    together = {name: torch.ones(6, 96, 160, dtype=torch.bfloat16)}
    directory = spoilt(export("qwen3_vl_moe", "w4a16_nvfp4"), lambda tensors: tensors.update(together), tmp_path)
    assert ("experts", name) in told(directory)


@pytest.mark.parametrize(
    ("text_config", "subject"),
    [
        (None, "config.json text_config num_hidden_layers"),
        ([], "config.json text_config num_hidden_layers"),
        ({"num_hidden_layers": "two"}, "config.json text_config num_hidden_layers"),
        ({"mlp_only_layers": 3}, "config.json text_config mlp_only_layers"),
    ],
)
def test_sizes_that_cannot_be_read_are_found(
    text_config: object, subject: str, export: Callable[..., Path], tmp_path: Path
) -> None:
    for path in export("qwen3_vl_moe", "w4a16_nvfp4").iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((tmp_path / "config.json").read_text())
    given = {**config["text_config"], **text_config} if isinstance(text_config, dict) else text_config
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": given}))
    assert ("architecture", subject) in told(tmp_path)


@pytest.mark.parametrize("stage", ["Checking", "Packing"])
def test_what_is_carried_over_may_not_change_meanwhile(stage: str, odd: Path, tmp_path: Path) -> None:
    """A live model is read once and from memory; what lies beside it is read from a file, and twice."""
    left = [name := "model.visual.wide.weight"]

    def progress(said: str, done: int, total: int) -> None:
        if left and said.startswith(stage) and done == total:
            rewrite_in_place(odd / "model.safetensors", left.pop())

    with one_rank(), pytest.raises(SourceError, match="changed while it was read") as caught:
        export_mcore_gpt_to_hf(load(odd), odd, tmp_path / "out", progress=progress)
    assert [offender.parameter for offender in caught.value.offenders] == [name]
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


def rewrite_in_place(path: Path, name: str) -> None:
    """Sets the last byte of a tensor to another where it lies."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        last = 8 + size + json.loads(file.read(size))[name]["data_offsets"][1] - 1
        file.seek(last)
        byte = file.read(1)
        file.seek(last)
        file.write(bytes([byte[0] ^ 1]))
