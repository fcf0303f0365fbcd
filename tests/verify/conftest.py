"""Real ModelOpt exports of a tiny Qwen3-MoE (one dense layer, two of experts), and a way to spoil one thing in each."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file


class Surgery:
    """A checkpoint directory opened up: change tensors and configs, then `close`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, torch.Tensor] = {}
        for path in sorted(directory.glob("*.safetensors")):
            self.tensors |= load_file(path)
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        path = directory / "hf_quant_config.json"
        self.hf_quant_config: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None

    @property
    def quantization_config(self) -> dict[str, Any]:
        return self.config["quantization_config"]

    @property
    def quantization(self) -> dict[str, Any]:
        assert self.hf_quant_config is not None
        return self.hf_quant_config["quantization"]

    def exclude(self, *patterns: str) -> None:
        self.quantization_config["ignore"].extend(patterns)
        self.quantization["exclude_modules"].extend(patterns)

    def include(self, pattern: str) -> None:
        self.quantization_config["ignore"].remove(pattern)
        self.quantization["exclude_modules"].remove(pattern)

    def drop(self, part: str) -> None:
        doomed = [name for name in self.tensors if part in name]
        assert doomed, part
        for name in doomed:
            del self.tensors[name]

    def plain(self, module: str, width: int) -> None:
        """Replaces a quantized module by a BF16 one."""
        rows = self.tensors[f"{module}.weight"].shape[0]
        self.drop(f"{module}.")
        self.tensors[f"{module}.weight"] = torch.ones(rows, width, dtype=torch.bfloat16)

    def set_byte(self, name: str, index: int, byte: int) -> None:
        """Overwrites one byte of a one-byte tensor."""
        self.tensors[name] = self.tensors[name].clone()
        self.tensors[name].view(torch.uint8).view(-1)[index] = byte

    def close(self, shards: int = 1) -> None:
        (self.directory / "config.json").write_text(json.dumps(self.config))
        path = self.directory / "hf_quant_config.json"
        if self.hf_quant_config is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(json.dumps(self.hf_quant_config))
        if shards == 1:
            save_file(self.tensors, self.directory / "model.safetensors", metadata={"format": "pt"})
            return
        (self.directory / "model.safetensors").unlink(missing_ok=True)
        names = sorted(self.tensors)
        weight_map = {}
        for index in range(shards):
            shard = f"model-{index + 1:05}-of-{shards:05}.safetensors"
            members = names[index::shards]
            save_file({name: self.tensors[name] for name in members}, self.directory / shard, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(members, shard)
        total = sum(tensor.nbytes for tensor in self.tensors.values())
        index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self.directory / "model.safetensors.index.json").write_text(json.dumps(index_file))


def _model() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)  # the same weights each time: both saving and exporting change a model's config
    config = Qwen3MoeConfig(
        hidden_size=128, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2, vocab_size=515, mlp_only_layers=[0],
        tie_word_embeddings=False, architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).bfloat16().eval()


def _fused_model() -> Any:
    """Experts in one tensor; widths 160 and 96, so that no axis can be taken for another."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        hidden_size=160, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=48, num_local_experts=4, num_experts_per_tok=2, vocab_size=515, sliding_window=4,
        tie_word_embeddings=False, architectures=["GptOssForCausalLM"],
    )  # fmt: skip
    model = GptOssForCausalLM(config).bfloat16().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):  # transformers leaves them zero
                parameter.normal_()
    return model


def _export(model: Any, config: dict[str, Any], directory: Path) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    tokens = torch.arange(400).reshape(2, 200)
    mtq.quantize(model, copy.deepcopy(config), forward_loop=lambda calibrated: calibrated(tokens))
    export_hf_checkpoint(model, export_dir=directory)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories by name: `source` and ModelOpt's exports of it."""
    import modelopt.torch.quantization as mtq

    root = tmp_path_factory.mktemp("pristine")
    _model().save_pretrained(root / "source")
    fp8_kv = mtq.update_quant_cfg_with_kv_cache_quant(copy.deepcopy(mtq.FP8_DEFAULT_CFG), mtq.FP8_KV_CFG["quant_cfg"])
    configs = {
        "nvfp4": mtq.NVFP4_DEFAULT_CFG,
        "w4a16": mtq.W4A16_NVFP4_CFG,
        "fp8": fp8_kv,
        "fp8_channel": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
        "mxfp8": mtq.MXFP8_DEFAULT_CFG,
    }
    for name, config in configs.items():
        _export(_model(), config, root / name)
    return {name: root / name for name in ("source", *configs)}


@pytest.fixture(scope="session")
def fused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same of a GPT-OSS, whose experts of a layer are in one tensor."""
    import modelopt.torch.quantization as mtq

    root = tmp_path_factory.mktemp("fused")
    _fused_model().save_pretrained(root / "source")
    configs = {"nvfp4": mtq.NVFP4_DEFAULT_CFG, "w4a16": mtq.W4A16_NVFP4_CFG, "fp8": mtq.FP8_DEFAULT_CFG}
    for name, config in configs.items():
        _export(_fused_model(), config, root / name)
    return {name: root / name for name in ("source", *configs)}


@pytest.fixture
def open_fused(fused: dict[str, Path], tmp_path: Path) -> Callable[[str], Surgery]:
    """Opens a private copy of one of the checkpoints with experts in one tensor."""

    def open_one(name: str) -> Surgery:
        shutil.copytree(fused[name], tmp_path / name)
        return Surgery(tmp_path / name)

    return open_one


@pytest.fixture
def open_copy(pristine: dict[str, Path], tmp_path: Path) -> Callable[[str], Surgery]:
    """Opens a private copy of one of the pristine checkpoints."""

    def open_one(name: str) -> Surgery:
        shutil.copytree(pristine[name], tmp_path / name)
        return Surgery(tmp_path / name)

    return open_one
