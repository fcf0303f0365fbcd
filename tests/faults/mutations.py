"""What can be wrong with a directory that somebody else made: random, but the same for the same seed.

A mutation changes a copy of a good checkpoint. It need not make it wrong: what is asked of each is that a command does
what it says or refuses in its own words.
"""

import json
import os
import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SECRET = "a secret that no export may publish"
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "mlp_only_layers": [0],
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "merges.txt")
ESCAPES = "\x1b[31m\x9b2J\x07\u202e"

Mutation = Callable[[Path, random.Random], None]


def good_checkpoint(directory: Path) -> Path:
    """A mixture of experts of two layers, in two shards, with a tokenizer; not large, so that a thousand are quick."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(7)
    shapes = {"model.embed_tokens.weight": (40, 32), "lm_head.weight": (40, 32), "model.norm.weight": (32,)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        attention = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
        shapes |= {f"{at}.self_attn.{name}_norm.weight": (16,) for name in "qk"}
        shapes |= {f"{at}.{name}_layernorm.weight": (32,) for name in ("input", "post_attention")}
    shapes |= _feed_forward("model.layers.0.mlp", 64) | {"model.layers.1.mlp.gate.weight": (2, 32)}
    for expert in range(2):
        shapes |= _feed_forward(f"model.layers.1.mlp.experts.{expert}", 32)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for shard, held in zip(SHARDS, halves, strict=True):
        save_file({name: tensors[name] for name in held}, directory / shard, {"format": "pt"})
    placed = {name: shard for shard, held in zip(SHARDS, halves, strict=True) for name in held}
    _write(directory / INDEX, {"metadata": {"total_size": 1}, "weight_map": placed})
    _write(directory / "config.json", CONFIG)
    for name in SIDE_FILES:
        (directory / name).write_text("{}")
    return directory


def _feed_forward(at: str, width: int) -> dict[str, tuple[int, ...]]:
    shapes = {"gate": (width, 32), "up": (width, 32), "down": (32, width)}
    return {f"{at}.{name}_proj.weight": shape for name, shape in shapes.items()}


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def junk(rng: random.Random, depth: int = 2) -> Any:
    """A JSON value of any type, with the sizes and strings that have been found to hurt."""
    scalars: list[Any] = [
        None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**70), 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "8",
        "x" * 300, "../../outside/secret.txt", "/dev/zero", ESCAPES, "\udc80", "\0", "float16", "Qwen3ForCausalLM",
    ]  # fmt: skip
    if depth and rng.random() < 0.3:
        size = rng.randrange(4)
        if rng.random() < 0.5:
            return [junk(rng, depth - 1) for _ in range(size)]
        return {str(junk(rng, 0)): junk(rng, depth - 1) for _ in range(size)}
    return rng.choice(scalars)


def config_value(directory: Path, rng: random.Random) -> None:
    config = _read(directory / "config.json")
    more = ["quantization_config", "compression_config", "auto_map", "text_config", "layer_types", "rope_scaling"]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        config[rng.choice([*config, *more])] = junk(rng)
    _write(directory / "config.json", config)


def config_without(directory: Path, rng: random.Random) -> None:
    config = _read(directory / "config.json")
    for key in rng.sample(sorted(config), rng.choice((1, 1, 2, 5))):
        del config[key]
    _write(directory / "config.json", config)


def config_quantization(directory: Path, rng: random.Random) -> None:
    config = _read(directory / "config.json")
    said = {
        "quant_method": rng.choice(["fp8", "mxfp4", "modelopt", "gptq", junk(rng)]),
        "weight_block_size": rng.choice([[128, 128], [0, 1], [1], "128", junk(rng)]),
        rng.choice(["fmt", "ignore", "config_groups", "modules_to_not_convert"]): junk(rng),
    }
    config["quantization_config"] = dict(rng.sample(sorted(said.items(), key=str), rng.randrange(4)))
    _write(directory / "config.json", config)


def json_text(directory: Path, rng: random.Random) -> None:
    name = rng.choice(("config.json", INDEX, "tokenizer_config.json"))
    texts = [
        b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"{" + b'"a":' * 3, b"[" * 200_000, b'{"a":' * 200_000,
        b'{"a": ' + b"9" * 6000 + b"}", b'{"weight_map": {' + b'"a": "b",' * 1000 + b'"a": 1}}', b"\0" * 64,
        b'{"auto_map": {"AutoConfig": "x.Y"}}', b'{"auto_map": [[1]]}',
    ]  # fmt: skip
    (directory / name).write_bytes(rng.choice(texts))


def json_bytes(directory: Path, rng: random.Random) -> None:
    _flip(directory / rng.choice(("config.json", INDEX)), rng, rng.choice((1, 1, 4)))


def index_entries(directory: Path, rng: random.Random) -> None:
    index = _read(directory / INDEX)
    placed = index["weight_map"]
    ways = [
        "../outside/model.safetensors", "/etc/passwd", "..", "", "gone.safetensors", "config.json", "a\0b", ESCAPES, 7,
        None, ["x"], SHARDS[0], SHARDS[1], "sub/x.safetensors", "..\\x", "/dev/zero", "./" + SHARDS[0],
    ]  # fmt: skip
    for _ in range(rng.choice((1, 1, 2, 5))):
        placed[rng.choice([*placed, "model.extra.weight", ESCAPES, "", "x" * 5000])] = rng.choice(ways)
    if rng.random() < 0.2:
        placed.pop(rng.choice(sorted(placed)))
    if rng.random() < 0.1:
        index["weight_map"] = junk(rng)
    if rng.random() < 0.1:
        placed |= {f"model.layers.{number}.x.weight": SHARDS[0] for number in range(20_000)}
    _write(directory / INDEX, index)


def shard_bytes(directory: Path, rng: random.Random) -> None:
    path = directory / rng.choice(SHARDS)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    _flip(path, rng, rng.choice((1, 2, 8)), rng.choice((8, 8 + length, path.stat().st_size)))


def shard_cut(directory: Path, rng: random.Random) -> None:
    path = directory / rng.choice(SHARDS)
    content = path.read_bytes()
    place = rng.choice((0, 7, 8, rng.randrange(len(content)), len(content) - 1))
    path.write_bytes(rng.choice((content[:place], content + b"\0" * (place + 1), content[place:] + content[:place])))


def shard_header(directory: Path, rng: random.Random) -> None:
    """Names, types, shapes and places that the header has no data for, or for other tensors than there are."""
    path = directory / rng.choice(SHARDS)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    change = rng.randrange(6)
    if change == 0:
        entry["shape"] = rng.choice([[], [-1], [2**31, 2**31], [0], [32, 32, 1], [2**63], entry["shape"][::-1], "x"])
    elif change == 1:
        entry["dtype"] = rng.choice(["F32", "F8_E4M3", "U8", "I64", "F8_E8M0", "F4", "C64", "", ESCAPES, 7, None])
    elif change == 2:
        entry["data_offsets"] = rng.choice([[0, 0], [2, 1], [0, 2**62], [-1, 5], [], "x", entry["data_offsets"][::-1]])
    elif change == 3:
        header[rng.choice([ESCAPES, "", "x" * 3000, "model.layers.99.x.weight", "lm_head.weight"])] = header.pop(name)
    elif change == 4:
        header[name] = junk(rng)
    else:
        header["__metadata__"] = junk(rng)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def not_a_file(directory: Path, rng: random.Random) -> None:
    """A pipe, a device, a directory or a link in place of a file: opening some of them would wait for ever."""
    path = directory / rng.choice(("config.json", INDEX, *SHARDS, *SIDE_FILES))
    path.unlink()
    outside = directory.parent / "outside"
    rng.choice(
        (
            lambda: os.mkfifo(path),
            lambda: path.symlink_to("/dev/zero"),
            lambda: path.symlink_to("/dev/tty"),
            lambda: path.symlink_to(outside / "secret.txt"),
            lambda: path.symlink_to(outside / "model.safetensors"),
            lambda: path.symlink_to(path.name),
            lambda: path.symlink_to("gone"),
            path.mkdir,
            lambda: None,
        )
    )()


def side_file(directory: Path, rng: random.Random) -> None:
    """Something beside the rest that an export might carry along."""
    outside = directory.parent / "outside"
    for _ in range(rng.choice((1, 2, 4))):
        stem = rng.choice(("notes", "tokenizer", ".env", "x" + ESCAPES, "LICENSE", "vocab"))
        name = stem + rng.choice(("", ".txt", ".json", ".py", ".pkl", ".so", ".model", ".safetensors", ".part"))
        path = directory / name
        if not os.path.lexists(path):
            rng.choice(
                (
                    lambda: path.symlink_to(outside / "secret.txt"),  # noqa: B023 (called at once)
                    lambda: path.symlink_to(outside),  # noqa: B023
                    lambda: path.write_text("text"),  # noqa: B023
                    lambda: os.mkfifo(path),  # noqa: B023
                )
            )()


def folder(directory: Path, rng: random.Random) -> None:
    path = directory / rng.choice(("additional_chat_templates", "onnx", "original", ".cache"))
    if rng.random() < 0.4:
        path.symlink_to(directory.parent / "outside")
        return
    path.mkdir()
    (path / "a.jinja").write_text("{{ a }}")
    (path / "secret.jinja").symlink_to(directory.parent / "outside" / "secret.txt")


def _flip(path: Path, rng: random.Random, count: int, end: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(count):
        content[rng.randrange(min(end or len(content), len(content)))] = rng.randrange(256)
    path.write_bytes(content)


MUTATIONS: Mapping[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (
        config_value, config_without, config_quantization, json_text, json_bytes, index_entries, shard_bytes, shard_cut,
        shard_header, not_a_file, side_file, folder,
    )
}  # fmt: skip
