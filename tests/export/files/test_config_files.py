"""The files beside the weights: two configs that say the same, and everything else as the source has it."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from quantplug import export_mcore_gpt_to_hf
from quantplug.export.files.config_files import write_configs
from tests.export.checkpoints import linear_weights, load, quantize, read

Sources = Callable[[str], Path]
Exports = Callable[..., Path]

MODELOPT = [("moe", "w4a16_nvfp4", "W4A16_NVFP4"), ("mixed", "nvfp4", "NVFP4"), ("tied", "fp8", "FP8")]


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def unquantized_modules(source: dict[str, torch.Tensor]) -> set[str]:
    """Modules with a matrix product that no scheme of these tests quantizes, and the tied lm_head."""
    matrices = {name.removesuffix(".weight") for name, tensor in source.items() if tensor.dim() == 2}
    return matrices - {name.removesuffix(".weight") for name in linear_weights(source)} | {"lm_head"}


@pytest.mark.parametrize(("name", "scheme", "algorithm"), MODELOPT)
def test_both_configs_agree(name: str, scheme: str, algorithm: str, exports: Exports) -> None:
    export = exports(name, scheme)
    for_vllm = config_of(export)["quantization_config"]
    for_tensorrt = json.loads((export / "hf_quant_config.json").read_text())
    quantization = for_tensorrt["quantization"]
    assert for_vllm["quant_method"] == "modelopt"
    assert for_vllm["quant_algo"] == quantization["quant_algo"] == algorithm
    assert for_vllm["ignore"] == quantization["exclude_modules"]
    assert for_vllm["producer"] == for_tensorrt["producer"]
    assert for_tensorrt["producer"]["name"] == "modelopt"
    assert quantization["kv_cache_quant_algo"] is None
    assert quantization.get("group_size") == (16 if "NVFP4" in algorithm else None)
    (group,) = for_vllm["config_groups"].values()
    assert ("input_activations" in group) == (algorithm != "W4A16_NVFP4")
    assert group["weights"].get("group_size") == quantization.get("group_size")


@pytest.mark.parametrize(
    ("name", "scheme", "key"),
    [
        ("moe", "w4a16_nvfp4", "ignore"),
        ("mixed", "w4a16_nvfp4", "ignore"),
        ("tied", "nvfp4", "ignore"),
        ("dense", "w8a16_fp8", "ignore"),
        ("moe_blocks", "fp8_blockwise", "modules_to_not_convert"),
    ],
)
def test_excludes_are_exact_names_of_what_is_not_quantized(
    name: str, scheme: str, key: str, sources: Sources, exports: Exports
) -> None:
    excluded = config_of(exports(name, scheme))["quantization_config"][key]
    assert set(excluded) == unquantized_modules(read(sources(name)))
    assert len(excluded) == len(set(excluded))
    assert not any(character in module for module in excluded for character in "*?[:")


@pytest.mark.usefixtures("single_rank")
def test_disabled_linears_are_excluded_too(sources: Sources, tmp_path: Path) -> None:
    model = quantize(load(sources("moe")), "w4a16_nvfp4")
    for layer in model.decoder.layers:
        layer.self_attention.linear_qkv.weight_quantizer.disable()
    export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    attention = {f"model.layers.{layer}.self_attn.{letter}_proj" for layer in range(2) for letter in "qkv"}
    excluded = set(config_of(tmp_path / "out")["quantization_config"]["ignore"])
    assert excluded == unquantized_modules(read(sources("moe"))) | attention
    exported, source = read(tmp_path / "out"), read(sources("moe"))
    assert all(torch.equal(exported[f"{module}.weight"], source[f"{module}.weight"]) for module in attention)


@pytest.mark.parametrize(("name", "scheme"), [("dense", "w8a16_fp8"), ("moe_blocks", "fp8_blockwise")])
def test_schemes_that_modelopts_schema_cannot_say_have_no_file_of_its(name: str, scheme: str, exports: Exports) -> None:
    assert not (exports(name, scheme) / "hf_quant_config.json").exists()


def test_deepseeks_config(exports: Exports) -> None:
    config = config_of(exports("moe_blocks", "fp8_blockwise"))["quantization_config"]
    del config["modules_to_not_convert"]
    assert config == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    }


@pytest.mark.parametrize(("name", "scheme"), [("moe", "w4a16_nvfp4"), ("dense", "w8a16_fp8")])
def test_everything_else_in_the_config_is_the_sources(
    name: str, scheme: str, sources: Sources, exports: Exports
) -> None:
    written = config_of(exports(name, scheme))
    del written["quantization_config"]
    assert written == config_of(sources(name))
    assert type(AutoConfig.from_pretrained(exports(name, scheme))) is type(AutoConfig.from_pretrained(sources(name)))


def test_tokenizer_and_generation_settings_are_copied(sources: Sources, exports: Exports) -> None:
    source, export = sources("moe"), exports("moe", "w4a16_nvfp4")
    messages = [{"role": "user", "content": "Grüße, 0123"}]
    first, second = (AutoTokenizer.from_pretrained(path) for path in (source, export))
    assert first.apply_chat_template(messages) == second.apply_chat_template(messages)
    assert GenerationConfig.from_pretrained(export).to_dict() == GenerationConfig.from_pretrained(source).to_dict()
    ours = {"config.json", "hf_quant_config.json", "model.safetensors.index.json"}
    kept = {path.name for path in source.iterdir() if path.suffix != ".safetensors"} - ours
    assert {path.name for path in export.iterdir() if path.suffix != ".safetensors"} - ours == kept
    assert "chat_template.jinja" in kept
    assert all((export / name).read_bytes() == (source / name).read_bytes() for name in kept)


@pytest.fixture
def changed_source(sources: Sources, tmp_path: Path) -> Path:
    return shutil.copytree(sources("dense"), tmp_path / "hf")


def export_from(source: Path, tmp_path: Path, **settings: Any) -> Path:
    export_mcore_gpt_to_hf(load(source), source, export_dir=tmp_path / "out", **settings)
    return tmp_path / "out"


@pytest.mark.usefixtures("single_rank")
def test_no_weights_of_the_source_in_any_form(changed_source: Path, tmp_path: Path) -> None:
    left = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model.safetensors.index.json.bak.index.json",
        "tf_model.h5",
        "flax_model.msgpack",
        "consolidated.00.pth",
        "model.gguf",
        "training_args.bin",
        "hf_quant_config.json",
    ]
    kept = ["README.md", "vocab.json", "merges.txt", "tokenizer.model", "LICENSE", "preprocessor_config.json"]
    unseen = [".env", "helper.so", "data.pkl", "run.sh", "modeling_own.py"]
    for name in (*left, *kept, *unseen):
        (changed_source / name).write_text("{}")
    result = export_mcore_gpt_to_hf(load(changed_source), changed_source, export_dir=tmp_path / "out")
    names = {path.name for path in result.directory.iterdir()}
    assert names.isdisjoint([*left, *unseen])
    assert names.issuperset(kept)
    assert set(kept) <= set(result.side_files.carried) <= names
    assert set(result.side_files.left_out) >= {*unseen, *left} - {"hf_quant_config.json"}


@pytest.mark.usefixtures("single_rank")
def test_every_chat_template_is_copied(changed_source: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(changed_source)
    templates = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}" + tokenizer.chat_template}
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(changed_source)
    copied = AutoTokenizer.from_pretrained(export_from(changed_source, tmp_path))
    assert copied.chat_template == templates


@pytest.mark.usefixtures("single_rank")
def test_links_within_the_source_become_files(changed_source: Path, tmp_path: Path) -> None:
    blob = (changed_source / "tokenizer.json").rename(changed_source / "blob")
    (changed_source / "tokenizer.json").symlink_to(blob)
    copied = export_from(changed_source, tmp_path) / "tokenizer.json"
    assert not copied.is_symlink()
    assert copied.read_bytes() == blob.read_bytes()


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize(
    ("spelled", "written"), [({"dtype"}, {"dtype"}), ({"torch_dtype"}, {"torch_dtype"}), (set(), {"dtype"})]
)
def test_the_dtype_is_that_of_the_export(
    spelled: set[str], written: set[str], changed_source: Path, tmp_path: Path
) -> None:
    config = {key: value for key, value in config_of(changed_source).items() if key not in ("dtype", "torch_dtype")}
    (changed_source / "config.json").write_text(json.dumps(config | dict.fromkeys(spelled, "bfloat16")))
    result = config_of(export_from(changed_source, tmp_path, dtype=torch.float16))
    assert {key: value for key, value in result.items() if "dtype" in key} == dict.fromkeys(written, "float16")
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype is torch.float16


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_an_earlier_quantization_is_not_announced_for_plain_weights(
    key: str, changed_source: Path, tmp_path: Path
) -> None:
    model = load(changed_source)
    config = config_of(changed_source)
    config[key] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (changed_source / "config.json").write_text(json.dumps(config))
    export_mcore_gpt_to_hf(model, changed_source, export_dir=tmp_path / "out")
    assert key not in config_of(tmp_path / "out")


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


@pytest.mark.usefixtures("single_rank")
def test_files_have_the_modes_of_ordinary_files(umask: int, sources: Sources, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_mcore_gpt_to_hf(quantize(load(sources("moe")), "nvfp4"), sources("moe"), export_dir=out)
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({}, {}),
        ({"tie_word_embeddings": True, "dtype": "float32"}, {"tie_word_embeddings": False, "dtype": "float16"}),
        ({"torch_dtype": "float32", "quantization_config": {}}, {"torch_dtype": "float16"}),
    ],
)
def test_settings_of_a_language_model_agree_with_the_whole(
    text: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    """Older servers read those of the language model, and transformers saves its defaults there."""
    source = {"dtype": "float32", "tie_word_embeddings": False, "text_config": {"hidden_size": 8, **text}}
    write_configs(source, tmp_path, torch.float16, None)
    config = config_of(tmp_path)
    assert config == {"dtype": "float16", "tie_word_embeddings": False, "text_config": {"hidden_size": 8, **expected}}
