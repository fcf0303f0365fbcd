# ruff: noqa: E501 (tables: one case a line)
"""Corruptions of a good export by name: whatever changes what a server computes is found beside the source.

Which tensor is hurt is drawn from a seed that is the corruption's name. A case says the exports it makes sense for, and
one of them is drawn, or each where the way a format is stored decides whether it can be seen.
"""

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.verify import Severity, verify_checkpoint
from tests.verify.conftest import Surgery

MOE = ("moe-w4a16_nvfp4", "moe-nvfp4", "moe-fp8", "moe-fp8_blockwise")
DENSE = ("dense-w4a16_nvfp4", "dense-fp8_blockwise")  # and tied
ALL = (*MOE, *DENSE)
NVFP4 = ("moe-w4a16_nvfp4", "moe-nvfp4", "dense-w4a16_nvfp4")
WITH_INPUTS = ("moe-nvfp4", "moe-fp8")
MODELOPT = ("moe-w4a16_nvfp4", "moe-nvfp4", "moe-fp8", "dense-w4a16_nvfp4")
BLOCKS = ("moe-fp8_blockwise", "dense-fp8_blockwise")
SCALE_NAMES = ("weight_scale_2", "weight_scale_inv", "weight_scale")  # the first that a weight has is the coarse one
SIDE_FILES: Mapping[str, Any] = {
    "tokenizer.json": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}},
    "tokenizer_config.json": {"eos_token": "<e>", "add_bos_token": False},
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": {"eos_token_id": [1, 2], "temperature": 0.6},
}


class Victim(Surgery):
    """A private copy of an export, and a generator to draw with."""

    def __init__(self, directory: Path, seed: str) -> None:
        super().__init__(directory)
        self.draw = random.Random(seed)

    def weights(self, part: str = "") -> list[str]:
        """Modules that are quantized."""
        codes = (torch.uint8, torch.float8_e4m3fn)
        return [
            name.removesuffix(".weight")
            for name, tensor in sorted(self.tensors.items())
            if name.endswith(".weight") and tensor.dtype in codes and part in name
        ]

    def one(self, part: str = "") -> str:
        return self.draw.choice(self.weights(part))

    def plain(self, *kinds: str) -> str:
        """A tensor that is not quantized, of one of these kinds."""
        return self.draw.choice([name for name in sorted(self.tensors) if name.endswith(kinds)])

    def scale_of(self, module: str) -> str:
        return next(f"{module}.{name}" for name in SCALE_NAMES if f"{module}.{name}" in self.tensors)

    def block_scales_of(self, module: str) -> str:
        name = f"{module}.weight_scale"
        return name if self.tensors.get(name, torch.ones(1)).dim() == 2 else self.scale_of(module)

    def change(self, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Of the bytes of a tensor of one-byte numbers, of the values of others."""
        tensor = self.tensors[name]
        if tensor.element_size() == 1:
            self.tensors[name] = change(tensor.clone().view(torch.uint8)).contiguous().view(tensor.dtype)
        else:
            self.tensors[name] = change(tensor.clone()).contiguous()

    def swap(self, one: str, other: str) -> None:
        """All tensors below two names, which are not the same."""
        pairs = [(name, name.replace(one, other)) for name in self.tensors if name.startswith(f"{one}.")]
        assert pairs
        assert one != other
        for ours, theirs in pairs:
            self.tensors[ours], self.tensors[theirs] = self.tensors[theirs], self.tensors[ours]

    def close(self, shards: int = 1) -> None:
        """In files of their own: those of the copy are the pristine export's."""
        written = ("*.safetensors", "*.index.json", "config.json", "hf_quant_config.json")
        for path in [path for pattern in written for path in self.directory.glob(pattern)]:
            path.unlink()
        super().close(shards)


Spoil = Callable[[Victim], object]


# --- What is done to codes and scales


def row(change: Callable[[torch.Tensor], torch.Tensor], part: str = "") -> Spoil:
    """Changes the codes of one row."""

    def spoil(v: Victim) -> None:
        index = v.draw.randrange(64)

        def changed(codes: torch.Tensor) -> torch.Tensor:
            codes[index] = change(codes[index])
            return codes

        v.change(f"{v.one(part)}.weight", changed)

    return spoil


def codes(change: Callable[[torch.Tensor], torch.Tensor], part: str = "") -> Spoil:
    return lambda v: v.change(f"{v.one(part)}.weight", change)


def block_scales(change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return lambda v: v.change(v.block_scales_of(v.one()), change)


def coarse_scale(factor: float) -> Spoil:
    """Of one weight that shares it with no other."""
    return lambda v: v.change(v.scale_of(v.one("down_proj")), lambda t: t * factor)


def group_scale(factor: float) -> Spoil:
    """Of gate and up together, so that they still share it."""

    def spoil(v: Victim) -> None:
        gate = v.one("gate_proj")
        for module in (gate, gate.replace("gate_proj", "up_proj")):
            v.change(v.scale_of(module), lambda t: t * factor)

    return spoil


def all_scales(factor: float) -> Spoil:
    return lambda v: [v.change(v.scale_of(module), lambda t: t * factor) for module in v.weights()]


def one_block(factor: int) -> Spoil:
    """Adds to the byte of one block scale: 8 are a factor of two."""

    def spoil(v: Victim) -> None:
        def changed(scales: torch.Tensor) -> torch.Tensor:
            scales[v.draw.randrange(64), v.draw.randrange(scales.shape[1])] += factor
            return scales

        v.change(v.block_scales_of(v.one("down_proj")), changed)

    return spoil


def halves(t: torch.Tensor) -> torch.Tensor:
    return t.roll(t.shape[0] // 2, dims=0)


def halved_rows(v: Victim) -> None:
    """Both halves of a weight's rows change places, the scales with them."""
    module = v.one("o_proj")
    for name in (f"{module}.weight", v.block_scales_of(module)):
        if v.tensors[name].dim() == 2 and v.tensors[name].shape[0] > 1:
            v.change(name, halves)


def permuted_rows(v: Victim) -> None:
    """Even rows before odd ones, as of rotary embeddings in another order."""
    module = v.one("o_proj")
    for name in (f"{module}.weight", v.block_scales_of(module)):
        if v.tensors[name].dim() == 2 and v.tensors[name].shape[0] > 1:
            v.change(name, lambda t: torch.cat([t[0::2], t[1::2]]))


def swizzled(scales: torch.Tensor) -> torch.Tensor:
    """The order of blocks that matrix engines want, 32 rows apart, in place of rows."""
    return scales.view(4, 32, -1).transpose(0, 1).reshape(scales.shape)


def columns(change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    """Changes one column of codes' bytes."""

    def changed(codes: torch.Tensor) -> torch.Tensor:
        codes[:, 5] = change(codes[:, 5])
        return codes

    return lambda v: v.change(f"{v.one()}.weight", changed)


def swapped_columns(codes: torch.Tensor) -> torch.Tensor:
    """Within a block, where the scales cannot tell."""
    codes[:, [2, 3]] = codes[:, [3, 2]]
    return codes


def with_row(name: str, index: int, value: float) -> Spoil:
    def changed(t: torch.Tensor) -> torch.Tensor:
        t[index] = value
        return t

    return lambda v: v.change(v.plain(name), changed)


# --- What is done to names


def dropped(*parts: str) -> Spoil:
    return lambda v: v.drop(v.draw.choice(parts))


def renamed(part: str, into: str) -> Spoil:
    def spoil(v: Victim) -> None:
        for name in [name for name in v.tensors if part in name]:
            v.tensors[name.replace(part, into)] = v.tensors.pop(name)

    return spoil


def copied(one: str, other: str) -> Spoil:
    """The tensors of one module stand in the place of another's, too."""

    def spoil(v: Victim) -> None:
        for name in [name for name in v.tensors if one in name]:
            assert name.replace(one, other) in v.tensors
            v.tensors[name.replace(one, other)] = v.tensors[name].clone()

    return spoil


def added(name: str, tensor: torch.Tensor) -> Spoil:
    return lambda v: v.tensors.update({name: tensor.clone()})


def stored(suffix: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    """The tensor of this suffix of one module, in another type or shape."""

    def spoil(v: Victim) -> None:
        name = v.draw.choice([name for name in sorted(v.tensors) if name.endswith(suffix)])
        v.tensors[name] = make(v.tensors[name]).contiguous()

    return spoil


# --- What is done to configs and files


def config(**changed: Any) -> Spoil:
    return lambda v: v.config.update(changed)


def without(key: str) -> Spoil:
    return lambda v: v.config.pop(key)


def rope(**changed: Any) -> Spoil:
    return lambda v: v.config["rope_parameters"].update(changed)


def quantization(**changed: Any) -> Spoil:
    return lambda v: v.quantization_config.update(changed)


def excluded(*names: str) -> Spoil:
    """In every file that has a list."""

    def spoil(v: Victim) -> None:
        lists = [v.quantization_config.get("ignore"), v.quantization_config.get("modules_to_not_convert")]
        lists.append(v.quantization["exclude_modules"] if v.hf_quant_config else None)
        for patterns in lists:
            if patterns is not None:
                patterns.extend(names)

    return spoil


def included(name: str) -> Spoil:
    def spoil(v: Victim) -> None:
        lists = [v.quantization_config.get("ignore"), v.quantization_config.get("modules_to_not_convert")]
        lists.append(v.quantization["exclude_modules"] if v.hf_quant_config else None)
        for patterns in lists:
            if patterns is not None:
                patterns[:] = [pattern for pattern in patterns if name not in pattern]

    return spoil


def file(name: str, content: Any) -> Spoil:
    """Another content; None removes it."""

    def spoil(v: Victim) -> None:
        (v.directory / name).unlink()
        if content is not None:
            (v.directory / name).write_text(content if isinstance(content, str) else json.dumps(content))

    return spoil


def algorithm(name: str) -> Spoil:
    def spoil(v: Victim) -> None:
        v.quantization_config["quant_algo"] = v.quantization["quant_algo"] = name

    return spoil


def sharded(change: Callable[[dict[str, str], Path], object]) -> Spoil:
    """In three files, and their index hurt."""

    def spoil(v: Victim) -> None:
        Victim.close(v, shards=3)
        path = v.directory / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"], v.directory)
        path.write_text(json.dumps(index))
        v.close = lambda shards=1: None  # type: ignore[method-assign]

    return spoil


def other_shard(weight_map: dict[str, str], directory: Path) -> None:
    name = min(weight_map)
    weight_map[name] = next(shard for shard in sorted(weight_map.values()) if shard != weight_map[name])


def lost_shard(weight_map: dict[str, str], directory: Path) -> None:
    (directory / max(weight_map.values())).unlink()


def cut_shard(weight_map: dict[str, str], directory: Path) -> None:
    path = directory / max(weight_map.values())
    os.truncate(path, path.stat().st_size - 8)


NEGATED_4, NEGATED_8 = (lambda t: t ^ 0x88), (lambda t: t ^ 0x80)
ONE = torch.tensor(1.0)
CORRUPTIONS: list[tuple[str, Sequence[str], Spoil]] = [
    ("a row of codes is zero", ALL, row(torch.zeros_like)),
    ("a row of codes is turned", ALL, row(lambda t: t.flip(0))),
    ("a row of FP4 codes is negated", NVFP4, row(NEGATED_4)),
    ("a row of FP8 codes is negated", ("moe-fp8", *BLOCKS), row(NEGATED_8)),
    ("all FP4 codes of a weight are negated", NVFP4, codes(NEGATED_4)),
    ("all FP8 codes of a weight are negated", ("moe-fp8", *BLOCKS), codes(NEGATED_8)),
    ("all codes of a weight are zero", ALL, codes(torch.zeros_like)),
    ("codes are noise", ALL, codes(lambda t: torch.randint(0, 120, t.shape, dtype=torch.uint8))),
    ("the two codes of a byte change places", NVFP4, codes(lambda t: (t >> 4) | (t << 4))),
    ("every other FP4 code is zero", NVFP4, codes(lambda t: t & 0x0F)),
    ("a column of bytes is zero", ALL, columns(torch.zeros_like)),
    ("a column of bytes is negated", NVFP4, columns(NEGATED_4)),
    ("the last column of bytes is zero", ALL, codes(lambda t: torch.cat([t[:, :-1], t[:, -1:] * 0], dim=1))),
    ("two columns of bytes change places", ALL, codes(swapped_columns)),
    ("rows of codes move by one", ALL, codes(lambda t: t.roll(1, dims=0))),
    ("two rows of codes change places", ALL, codes(lambda t: t[[1, 0, *range(2, len(t))]])),
    ("columns of codes move by one byte", ALL, codes(lambda t: t.roll(1, dims=1))),
    ("halves of the rows change places", ALL, halved_rows),
    ("even rows stand before odd ones", ALL, permuted_rows),
    ("halves of codes without their scales", NVFP4, codes(halves)),
    ("a square weight is transposed", ("moe-fp8", "moe-fp8_blockwise"), codes(lambda t: t.T, "experts.1.down_proj")),
    ("the least bit of all FP4 codes", NVFP4, codes(lambda t: t ^ 0x11)),
    ("block scales move by one row", NVFP4, block_scales(lambda t: t.roll(1, dims=0))),
    ("block scales move by one block", NVFP4, block_scales(lambda t: t.roll(1, dims=1))),
    ("block scales are swizzled", ("moe-w4a16_nvfp4", "moe-nvfp4"), lambda v: v.change(f"{v.one('experts')}.weight_scale", swizzled)),
    ("block scales of a row are zero", NVFP4, block_scales(lambda t: torch.cat([t[:1] * 0, t[1:]]))),
    ("block scales doubled", NVFP4, block_scales(lambda t: t + 8)),
    ("block scales an eighth larger", NVFP4, block_scales(lambda t: t + 1)),
    ("block scales of a row doubled", NVFP4, block_scales(lambda t: torch.cat([t[:1] + 8, t[1:]]))),
    ("one block scale four times as large", NVFP4, one_block(16)),
    ("one block scale half as large again", NVFP4, one_block(4)),
    ("one block scale a third less", NVFP4, one_block(-4)),
    ("one block scale is zero", NVFP4, lambda v: v.change(f"{v.one()}.weight_scale", lambda t: t.index_put((torch.tensor(3), torch.tensor(2)), t.new_tensor(0)))),
    ("block scales of one", NVFP4, block_scales(lambda t: torch.full_like(t, 0x38))),
    ("block scales of another weight", MOE[:2], lambda v: v.tensors.update({"model.layers.1.mlp.experts.0.down_proj.weight_scale": v.tensors["model.layers.1.mlp.experts.1.down_proj.weight_scale"].clone()})),
    ("scales of FP8 blocks change places", ("dense-fp8_blockwise",), lambda v: v.change(f"{v.one('down_proj')}.weight_scale_inv", lambda t: t.roll(1, dims=1) * 1.03)),
    ("a scale of an FP8 block doubled", BLOCKS, block_scales(lambda t: torch.cat([t[:, :1] * 2, t[:, 1:]], dim=1))),
    *((f"one scale times {factor}", ALL, coarse_scale(factor)) for factor in (0.5, 0.85, 0.98, 1.02, 1.15, 2.0)),
    *((f"all scales times {factor}", ALL, all_scales(factor)) for factor in (0.85, 0.98, 1.02, 1.15)),
    ("scale of gate and up times 1.02", ALL, group_scale(1.02)),
    ("scale of gate and up times 0.5", ALL, group_scale(0.5)),
    ("a scale is inverted", ALL, lambda v: v.change(v.scale_of(v.one("down_proj")), torch.reciprocal)),
    ("a scale is zero", ALL, coarse_scale(0)),
    ("a scale is negative", ALL, coarse_scale(-1)),
    ("a scale is NaN", ALL, coarse_scale(math.nan)),
    ("a scale is infinite", ALL, coarse_scale(math.inf)),
    ("a scale is subnormal", ALL, lambda v: v.change(v.scale_of(v.one("down_proj")), lambda t: torch.full_like(t, 1e-40))),
    ("scale of gate alone", MOE[:3], lambda v: v.change(v.scale_of(v.one("experts.2.gate_proj")), lambda t: t * 1.001)),
    ("an input scale is zero", WITH_INPUTS, lambda v: v.change(f"{v.one()}.input_scale", torch.zeros_like)),
    ("an input scale is negative", WITH_INPUTS, lambda v: v.change(f"{v.one()}.input_scale", torch.neg)),
    ("an input scale is NaN", WITH_INPUTS, lambda v: v.change(f"{v.one()}.input_scale", lambda t: t * math.nan)),
    ("an input scale has a subnormal inverse", WITH_INPUTS, lambda v: v.change(f"{v.one()}.input_scale", lambda t: t * 0 + 2.0**127)),
    ("input scale of gate alone", WITH_INPUTS, lambda v: v.change(f"{v.one('gate_proj')}.input_scale", lambda t: t * 1.5)),
    ("an input scale is lost", WITH_INPUTS, lambda v: v.drop(f"{v.one()}.input_scale")),
    ("experts change places", MOE, lambda v: v.swap("model.layers.1.mlp.experts.0", "model.layers.1.mlp.experts.3")),
    ("one projection of two experts changes places", MOE, lambda v: v.swap("model.layers.2.mlp.experts.0.down_proj", "model.layers.2.mlp.experts.1.down_proj")),
    ("an expert stands in another's place, too", MOE, copied("layers.1.mlp.experts.2.", "layers.1.mlp.experts.1.")),
    ("experts of two layers change places", MOE, lambda v: v.swap("model.layers.1.mlp", "model.layers.2.mlp")),
    ("attention of two layers changes places", ALL, lambda v: v.swap("model.layers.0.self_attn", "model.layers.1.self_attn")),
    ("a layer stands in another's place, too", DENSE, copied("layers.0.", "layers.1.")),
    ("gate and up change places", ALL, lambda v: v.swap(g := v.one("gate_proj"), g.replace("gate_proj", "up_proj"))),
    ("q and k change places", ALL, lambda v: v.swap("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj")),
    ("k and v change places", (*NVFP4, *BLOCKS), lambda v: v.swap("model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj")),
    ("q norm and k norm change places", DENSE, lambda v: v.swap("model.layers.0.self_attn.q_norm", "model.layers.0.self_attn.k_norm")),
    ("both norms of a layer change places", DENSE, lambda v: v.swap("model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm")),
    ("a weight is lost", ALL, lambda v: v.drop(f"{v.one()}.weight")),
    ("a scale is lost", ALL, lambda v: v.drop(v.scale_of(v.one()))),
    ("an expert is lost", MOE, dropped("layers.1.mlp.experts.3.", "layers.2.mlp.experts.0.")),
    ("a layer is lost", ALL, dropped("layers.0.", "layers.1.")),
    ("a norm is lost", ALL, dropped("model.norm", "layers.1.input_layernorm", "layers.0.self_attn.q_norm")),
    ("the router is lost", MOE, dropped("layers.1.mlp.gate.")),
    ("the embedding is lost", ALL, dropped("embed_tokens")),
    ("the head is lost", MOE, dropped("lm_head")),
    ("a head beside a tied embedding", DENSE, lambda v: v.tensors.update({"lm_head.weight": v.tensors["model.embed_tokens.weight"] + 1})),
    ("a name is misspelled", ALL, renamed("layers.1.input_layernorm", "layers.1.input_layer_norm")),
    ("a layer is counted on", ALL, renamed("layers.0.", "layers.7.")),
    ("a tensor too many", ALL, added("model.layers.0.self_attn.q_proj.bias", torch.ones(128))),
    ("a foreign scale beside ours", ALL, added("model.layers.0.self_attn.q_proj.weight_zero_point", ONE)),
    ("a KV scale nobody speaks of", ("moe-w4a16_nvfp4", "moe-nvfp4"), added("model.layers.0.self_attn.k_proj.k_scale", ONE)),
    ("a row of the embedding is zero", ALL, with_row("embed_tokens.weight", 3, 0)),
    ("rows of the embedding move by one", ALL, lambda v: v.change("model.embed_tokens.weight", lambda t: t.roll(1, dims=0))),
    ("the embedding is a row short", ALL, lambda v: v.change("model.embed_tokens.weight", lambda t: t[:-1])),
    ("the head is the embedding", MOE, copied("model.embed_tokens", "lm_head")),
    ("a norm is doubled", ALL, lambda v: v.change(v.plain("norm.weight"), lambda t: t * 2)),
    ("a norm is off by one", ALL, lambda v: v.change(v.plain("norm.weight"), lambda t: t - 1)),
    ("a norm has NaN", ALL, with_row("norm.weight", 1, math.nan)),
    ("a router is scaled", MOE, lambda v: v.change("model.layers.1.mlp.gate.weight", lambda t: t * 1.02)),
    ("rows of a router change places", MOE, lambda v: v.change("model.layers.2.mlp.gate.weight", lambda t: t.flip(0))),
    ("a norm in FP16", ALL, stored("norm.weight", lambda t: t.half())),
    ("the embedding in FP16", ALL, stored("embed_tokens.weight", lambda t: t.half())),
    ("codes as signed numbers", NVFP4, stored("down_proj.weight", lambda t: t.view(torch.int8))),
    ("codes in E5M2", ("moe-fp8", *BLOCKS), stored("down_proj.weight", lambda t: t.view(torch.float8_e5m2))),
    ("block scales as bytes", NVFP4, stored("down_proj.weight_scale", lambda t: t.view(torch.uint8))),
    ("block scales in FP32", NVFP4, stored("down_proj.weight_scale", lambda t: t.float())),
    ("a scale in BF16", ("moe-fp8",), stored("down_proj.weight_scale", lambda t: t.bfloat16())),
    ("scales of blocks in BF16", BLOCKS, stored("down_proj.weight_scale_inv", lambda t: t.bfloat16())),
    ("codes lack a row", ALL, stored("down_proj.weight", lambda t: t[:-1])),
    ("block scales lack a column", NVFP4, stored("down_proj.weight_scale", lambda t: t[:, :-1])),
    ("a norm with one axis too many", ALL, stored("norm.weight", lambda t: t[None])),
    ("a scale for each row", NVFP4, stored("down_proj.weight_scale_2", lambda t: t.repeat(128))),
    ("a quantized module is excluded", ALL, lambda v: excluded(v.one())(v)),
    ("a layer is excluded", MODELOPT, excluded("model.layers.1*")),
    ("the router is not excluded", MOE[:3], included("mlp.gate")),
    ("the head is not excluded", MOE[:3], included("lm_head")),
    ("an exclude of nothing", MODELOPT, excluded("model.layers.9.mlp.gate")),
    ("another algorithm", ("moe-w4a16_nvfp4", "dense-w4a16_nvfp4"), algorithm("NVFP4")),
    ("weight-only said of inputs", ("moe-nvfp4",), algorithm("W4A16_NVFP4")),
    ("FP8 said of FP4", NVFP4, algorithm("FP8")),
    ("an algorithm of no server", MODELOPT, algorithm("NVFP4_NEW")),
    ("both files disagree", MODELOPT, quantization(quant_algo="MIXED_PRECISION")),
    ("no quantization config", ALL, without("quantization_config")),
    ("a method of no server", ALL, quantization(quant_method="quantplug")),
    ("blocks of 64", BLOCKS, quantization(weight_block_size=[64, 64])),
    ("blocks of nothing", BLOCKS, quantization(weight_block_size=None)),
    ("no activation scheme", BLOCKS, quantization(activation_scheme=None)),
    ("static activations without scales", BLOCKS, quantization(activation_scheme="static")),
    ("epsilon of the norms", ALL, config(rms_norm_eps=1e-5)),
    ("activation", ALL, config(hidden_act="gelu")),
    ("experts of a token", MOE, config(num_experts_per_tok=1)),
    ("sum of the experts' weights", MOE, config(norm_topk_prob=True)),
    ("number of experts", MOE, config(num_experts=8)),
    ("number of layers", ALL, config(num_hidden_layers=9)),
    ("number of heads", ALL, config(num_attention_heads=8)),
    ("width of a head", ALL, config(head_dim=64)),
    ("tied though it is not", MOE, config(tie_word_embeddings=True)),
    ("not tied though it is", DENSE, config(tie_word_embeddings=False)),
    ("rotary base", ALL, rope(rope_theta=5)),
    ("rotary scaling", ALL, rope(rope_type="linear", factor=2.0)),
    ("sliding window", ALL, config(sliding_window=16, use_sliding_window=True)),
    ("bias of attention", ALL, config(attention_bias=True)),
    ("another architecture", MOE, config(architectures=["Qwen2MoeForCausalLM"])),
    ("another type of the whole", ALL, config(dtype="float16")),
    ("size of the vocabulary", ALL, config(vocab_size=64)),
    ("end of a text", ALL, file("generation_config.json", {"eos_token_id": 3})),
    ("temperature", ALL, file("generation_config.json", SIDE_FILES["generation_config.json"] | {"temperature": 2})),
    ("vocabulary of the tokenizer", ALL, file("tokenizer.json", {"model": {"vocab": {"b": 0, "a": 1}}})),
    ("tokenizer lost", ALL, file("tokenizer.json", None)),
    ("special token", ALL, file("tokenizer_config.json", {"eos_token": "<f>", "add_bos_token": False})),
    ("first token", ALL, file("tokenizer_config.json", {"eos_token": "<e>", "add_bos_token": True})),
    ("chat template", ALL, file("chat_template.jinja", "{{ messages[0] }}")),
    ("chat template lost", ALL, file("chat_template.jinja", None)),
    ("index names another file", ALL, sharded(other_shard)),
    ("index lacks a tensor", ALL, sharded(lambda weight_map, directory: weight_map.pop(min(weight_map)))),
    ("index has a tensor too many", ALL, sharded(lambda weight_map, directory: weight_map.update({"x": min(weight_map.values())}))),
    ("a file is lost", ALL, sharded(lost_shard)),
    ("a file is cut off", ALL, sharded(cut_shard)),
]  # fmt: skip


# --- The exports


def _dense(directory: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        head_dim=32, vocab_size=131, tie_word_embeddings=True, architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    _spread(Qwen3ForCausalLM(config).bfloat16()).save_pretrained(directory)


def _spread(model: Any) -> Any:
    """Norms that differ, which transformers leaves at one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1, 0.1)
    return model


@pytest.fixture(scope="session")
def exports(pristine: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Good exports by name, each with its source; all have the same files beside the weights."""
    root = tmp_path_factory.mktemp("exports")
    found = {}
    _dense(root / "dense")
    shutil.copytree(pristine["source"], root / "moe")
    for name in ("moe", "dense"):
        _beside(root / name)
        for scheme in ("w4a16_nvfp4", "fp8_blockwise"):
            # Servers merge q, k and v, and the keys of the mixture end inside a block.
            exclude = ["model.layers.*.self_attn.[qkv]_proj"] if f"{name}-{scheme}" == "moe-fp8_blockwise" else []
            quantize_checkpoint(root / name, root / f"{name}-{scheme}", scheme, exclude=exclude)
            found[f"{name}-{scheme}"] = (root / f"{name}-{scheme}", root / name)
    for scheme in ("nvfp4", "fp8"):
        shutil.copytree(pristine[scheme], root / f"moe-{scheme}")
        _beside(root / f"moe-{scheme}")
        found[f"moe-{scheme}"] = (root / f"moe-{scheme}", root / "moe")
    return found


def _beside(directory: Path) -> None:
    for name, content in SIDE_FILES.items():
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))


def errors_of(directory: Path, source: Path) -> set[str]:
    return {str(check) for check in verify_checkpoint(directory, source).checks(Severity.ERROR)}


@pytest.mark.parametrize("name", ALL)
def test_a_good_export_has_no_error(exports: dict[str, tuple[Path, Path]], name: str) -> None:
    assert errors_of(*exports[name]) == set()


@pytest.mark.parametrize("factor", [1, 2])
def test_a_tied_source_may_hold_the_head_alone(
    exports: dict[str, tuple[Path, Path]], tmp_path: Path, factor: int
) -> None:
    """As `safetensors.torch.save_model` may keep either of two names of the same data."""
    export, source = exports["dense-w4a16_nvfp4"]
    shutil.copytree(source, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight") * factor
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    assert errors_of(export, tmp_path / "source") == ({"source-values"} if factor != 1 else set())


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FEEDBACK = 0.5  # of a column's error that the next one takes up, as if neighbouring inputs were so much alike


def with_feedback(v: Victim, module: str, weight: torch.Tensor) -> None:
    """Rounds a weight [out, in] as GPTQ does: later columns make up for the errors of earlier ones, scales stay."""
    scales = v.tensors[f"{module}.weight_scale"].float() * v.tensors[f"{module}.weight_scale_2"]
    weight, found = weight.float().clone(), torch.empty(weight.shape, dtype=torch.uint8)
    for column in range(weight.shape[1]):
        scale = scales[:, column // 16].clamp(min=1e-30)
        scaled = weight[:, column] / scale
        nearest = (scaled.abs()[:, None] - E2M1).abs().argmin(dim=1)
        found[:, column] = nearest.to(torch.uint8) | ((scaled < 0).to(torch.uint8) << 3)
        if column + 1 < weight.shape[1]:
            weight[:, column + 1] += FEEDBACK * (weight[:, column] - E2M1[nearest] * scaled.sign() * scale)
    v.tensors[f"{module}.weight"] = found[:, 0::2] | (found[:, 1::2] << 4)


@pytest.mark.parametrize("name", NVFP4)
def test_rounding_with_error_feedback_is_no_error(
    exports: dict[str, tuple[Path, Path]], tmp_path: Path, name: str
) -> None:
    export, source = exports[name]
    shutil.copytree(export, tmp_path / "export", copy_function=os.link)
    victim, weights = Victim(tmp_path / "export", name), load_file(source / "model.safetensors")
    for module in victim.weights():
        with_feedback(victim, module, weights[f"{module}.weight"])
    victim.close()
    report = verify_checkpoint(tmp_path / "export", source)
    assert set(report.checks(Severity.ERROR, Severity.WARNING)) <= {"value-bound"}


def drawn() -> list[Any]:
    """Each corruption of one export that it makes sense for."""
    cases = ((random.Random(name).choice(list(bases)), spoil, name) for name, bases, spoil in CORRUPTIONS)
    return [pytest.param(*case, id=f"{case[2]} ({case[0]})") for case in cases]


@pytest.mark.parametrize(("base", "spoil", "name"), drawn())
def test_what_changes_what_a_server_computes_is_found(
    exports: dict[str, tuple[Path, Path]], tmp_path: Path, base: str, spoil: Spoil, name: str
) -> None:
    export, source = exports[base]
    shutil.copytree(export, tmp_path / "export", copy_function=os.link)
    victim = Victim(tmp_path / "export", name)
    spoil(victim)
    victim.close()
    assert errors_of(tmp_path / "export", source)


def test_names_are_unique_and_many() -> None:
    names = [name for name, _, _ in CORRUPTIONS]
    assert len(set(names)) == len(names) >= 60
