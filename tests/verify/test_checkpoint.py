"""Broken, hostile and lying files: findings, never an exception."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantplug.verify import Severity, verify_checkpoint
from quantplug.verify.checks import Check

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00003.safetensors"


def fired(directory: Path) -> set[str]:
    return {str(check) for check in verify_checkpoint(directory).checks(Severity.ERROR, Severity.WARNING)}


def subjects(directory: Path, check: str) -> set[str]:
    return {finding.subject for finding in verify_checkpoint(directory).findings if finding.check == check}


@pytest.fixture
def sharded(open_copy: Callable[[str], Any]) -> Path:
    surgery = open_copy("w4a16")
    surgery.close(shards=3)
    return surgery.directory


def change_index(directory: Path, change: Callable[[Any], object]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).write_text(json.dumps(index))


# By what transformers 4.57.6 does of one file, or of one of two shards: it loads (None), or stops. Without metadata it
# stops before 4.48. 5.14 loads all of them.
FORMATS: list[tuple[dict[str, str] | None, Severity | None]] = [
    ({"format": "pt"}, None),
    ({"format": "pt", "producer": "somebody"}, None),
    ({"format": "mlx"}, None),
    (None, Severity.NOTE),
    ({}, Severity.WARNING),
    ({"producer": "somebody"}, Severity.WARNING),
    ({"format": "np"}, Severity.WARNING),
    ({"format": "tf"}, Severity.WARNING),
]


@pytest.mark.parametrize(("metadata", "severity"), FORMATS, ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_header_without_pytorchs_format_is_told_by_what_transformers_4_does(
    shards: int, metadata: dict[str, str] | None, severity: Severity | None, open_copy: Callable[[str], Any]
) -> None:
    surgery = open_copy("w4a16")
    surgery.close(shards)
    names = sorted(path.name for path in surgery.directory.glob("*.safetensors"))
    for name in names[-2:]:
        save_file(load_file(surgery.directory / name), surgery.directory / name, metadata)

    report = verify_checkpoint(surgery.directory)

    found = [(it.severity, it.subject) for it in report.findings if it.check is Check.FILES]
    assert found == ([] if severity is None else [(severity, names[-2:][0])])
    assert all("(2 files in all)" in it.message for it in report.findings if it.check is Check.FILES) or shards == 1


def test_a_file_that_is_saved_anew_as_the_finding_says_has_none(open_copy: Callable[[str], Any]) -> None:
    surgery = open_copy("w4a16")
    file = surgery.directory / "model.safetensors"
    save_file(surgery.tensors, file)
    (told,) = (it for it in verify_checkpoint(surgery.directory).findings if it.check is Check.FILES)
    assert "save_file(tensors, file, {'format': 'pt'})" in told.message

    save_file(surgery.tensors, file, {"format": "pt"})

    assert not any(it.check is Check.FILES for it in verify_checkpoint(surgery.directory).findings)


def test_of_a_source_no_format_is_asked(open_copy: Callable[[str], Any], pristine: dict[str, Path]) -> None:
    surgery = open_copy("source")
    save_file(surgery.tensors, surgery.directory / "model.safetensors")

    report = verify_checkpoint(pristine["w4a16"], surgery.directory)

    assert not any(it.check is Check.FILES for it in report.findings)


INDEX_LIES: list[tuple[str, Callable[[Any], object]]] = [
    ("absent file", lambda i: i["weight_map"].update({"lm_head.weight": "model-00004-of-00003.safetensors"})),
    ("absent tensor", lambda i: i["weight_map"].update({"nobody.weight": SHARD})),
    ("unlisted tensor", lambda i: i["weight_map"].pop("lm_head.weight")),
    ("path out of the directory", lambda i: i["weight_map"].update({"x.weight": "../../etc/passwd"})),
    ("absolute path", lambda i: i["weight_map"].update({"x.weight": "/etc/passwd"})),
    ("Windows path", lambda i: i["weight_map"].update({"x.weight": "..\\x.safetensors"})),
    ("parent", lambda i: i["weight_map"].update({"x.weight": ".."})),
    ("a number for a file", lambda i: i["weight_map"].update({"x.weight": 7})),
    ("wrong total", lambda i: i["metadata"].update(total_size=1)),
    ("no total", lambda i: i.pop("metadata")),
    ("weight_map a list", lambda i: i.update(weight_map=[1])),
    ("no weight_map", lambda i: i.clear()),
]


@pytest.mark.parametrize("change", [row[1] for row in INDEX_LIES], ids=[row[0] for row in INDEX_LIES])
def test_an_index_that_lies(sharded: Path, change: Callable[[Any], object]) -> None:
    assert fired(sharded) == set()
    change_index(sharded, change)
    assert fired(sharded) == {"index"}


def test_a_source_that_is_none_is_not_held_against_every_tensor(pristine: dict[str, Path], tmp_path: Path) -> None:
    """Such as the directory of a Megatron checkpoint."""
    (tmp_path / "config.json").write_text((pristine["source"] / "config.json").read_text())
    report = verify_checkpoint(pristine["w4a16"], tmp_path)
    errors = [finding for finding in report.findings if finding.severity is Severity.ERROR]
    assert [finding.check for finding in errors] == ["files"]
    assert errors[0].message.startswith("in the source: holds no tensor")


SOURCE_LIES = {"unlisted tensor", "wrong total", "no total"}


@pytest.mark.parametrize(("name", "change"), [row for row in INDEX_LIES if row[0] != "Windows path"])
def test_what_no_import_reads_may_be_wrong_in_a_source(
    name: str, change: Callable[[Any], object], open_copy: Callable[[str], Any], pristine: dict[str, Path]
) -> None:
    """Published indices have sums of other sizes; what is wrong beyond that says whose it is."""
    surgery = open_copy("source")
    surgery.close(shards=3)
    change_index(surgery.directory, change)
    told = [it for it in verify_checkpoint(pristine["w4a16"], surgery.directory).findings if it.check == "index"]
    assert bool(told) is (name not in SOURCE_LIES)
    assert all(finding.message.startswith("in the source: ") for finding in told)


def test_a_tensor_in_another_shard_than_listed(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    name, shard = next(iter(index["weight_map"].items()))
    other = next(value for value in index["weight_map"].values() if value != shard)
    change_index(sharded, lambda i: i["weight_map"].update({name: other}))
    assert subjects(sharded, "index") == {name}


def test_a_tensor_stored_twice(sharded: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(2, 2)}, sharded / "model-00009-of-00003.safetensors")
    assert {"lm_head.weight", "model-00009-of-00003.safetensors"} <= subjects(sharded, "index")


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert fired(sharded) == {"index"}


def test_a_shard_missing(sharded: Path) -> None:
    (sharded / SHARD).unlink()
    assert SHARD in subjects(sharded, "index")


def header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


LYING_SHARDS = {
    "empty": b"",
    "no header": b"\x10",
    "header longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "header longer than memory": struct.pack("<Q", (1 << 64) - 1) + b"{}",
    "header not JSON": struct.pack("<Q", 4) + b"!!!!",
    "header not UTF-8": struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
    "data cut": header({"a.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 8),
    "shape larger than data": header(
        {"a.weight": {"dtype": "F32", "shape": [400], "data_offsets": [0, 16]}}, b"\0" * 16
    ),
    "negative shape": header({"a.weight": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, b"\0" * 16),
    "overlapping": header(
        {
            "a.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        },
        b"\0" * 16,
    ),
    "unknown dtype": header({"a.weight": {"dtype": "F7", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 16),
}


@pytest.mark.parametrize("content", LYING_SHARDS.values(), ids=LYING_SHARDS.keys())
def test_a_shard_that_lies(open_copy: Callable[[str], Any], content: bytes) -> None:
    directory = open_copy("w4a16").directory
    (directory / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in subjects(directory, "files")


def test_a_truncated_shard_among_good_ones(sharded: Path) -> None:
    data = (sharded / SHARD).read_bytes()
    (sharded / SHARD).write_bytes(data[: len(data) // 2])
    assert subjects(sharded, "files") == {SHARD}
    assert "index" in fired(sharded)


def test_exotic_dtypes_and_names_are_reported(open_copy: Callable[[str], Any]) -> None:
    directory = open_copy("w4a16").directory
    entries = {
        "": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "..": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [4, 6]},
        "a.experts.99999999999999999999.up_proj.weight": {"dtype": "U8", "shape": [0, 3], "data_offsets": [6, 6]},
        "[bold]\u001b[31m.weight": {"dtype": "F8_E5M2", "shape": [2, 1], "data_offsets": [6, 8]},
        "layers.1.x.weight_scale": {"dtype": "F8_E4M3", "shape": [2, 0, 2], "data_offsets": [8, 8]},
    }
    (directory / "model.safetensors").write_bytes(header(entries, bytes([0, 0, 0xC0, 0x7F, 1, 0xFF, 0x7C, 1])))
    assert {"", ".."} <= subjects(directory, "finite")
    assert not verify_checkpoint(directory, directory).ok


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[1]", b"7", b"[" * 100_000, b'{"a": 1' + b"0" * 5000 + b"}"],
    ids=["empty", "cut", "not UTF-8", "list", "number", "deep", "long number"],
)  # fmt: skip
def test_garbage_configs(open_copy: Callable[[str], Any], name: str, content: bytes) -> None:
    directory = open_copy("w4a16").directory
    (directory / name).write_bytes(content)
    assert subjects(directory, "files") == {name}


def test_an_empty_directory(tmp_path: Path) -> None:
    assert fired(tmp_path) == {"files", "no-quantization"}


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "pipe"])
def test_what_is_named_like_a_file_and_is_none(tmp_path: Path, make: Callable[[Path], None]) -> None:
    for name in ("config.json", "model.safetensors", INDEX):
        make(tmp_path / name)
    assert {"config.json", "model.safetensors", INDEX} <= subjects(tmp_path, "files")


def test_a_link_that_leads_nowhere(open_copy: Callable[[str], Any]) -> None:
    directory = open_copy("w4a16").directory
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to(directory / "blob")
    assert "model.safetensors" in subjects(directory, "files")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JUNK = st.recursive(
    SCALARS | st.sampled_from(["re:(", "*"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    "quant_method", "quant_algo", "ignore", "config_groups", "kv_cache_scheme", "quantized_layers", "producer",
    "weight_block_size", "modules_to_not_convert", "format", "quantization", "exclude_modules", "group_size",
    "activation_scheme",
)  # fmt: skip
QUANTIZATION = st.fixed_dictionaries(
    {"quant_method": st.sampled_from(["modelopt", "fp8", "compressed-tensors"])},
    optional={key: JUNK for key in KEYS if key != "quant_method"},
)
MODEL_KEYS = ("num_experts", "num_hidden_layers", "text_config", "architectures", "tie_word_embeddings")


@pytest.fixture(scope="module")
def playground(pristine: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz") / "checkpoint"
    shutil.copytree(pristine["w4a16"], directory)
    return directory


@settings(max_examples=80)
@given(
    config=st.fixed_dictionaries(
        {"quantization_config": QUANTIZATION | JUNK},
        optional=dict.fromkeys(MODEL_KEYS, JUNK) | {"architectures": st.just(["Qwen3ForCausalLM"]) | JUNK},
    ),
    file=JUNK | st.fixed_dictionaries({"quantization": QUANTIZATION, "producer": JUNK}),
)
def test_no_config_makes_it_stumble(playground: Path, config: object, file: object) -> None:
    (playground / "config.json").write_text(json.dumps(config))
    (playground / "hf_quant_config.json").write_text(json.dumps(file))
    json.loads(verify_checkpoint(playground).to_json())


@settings(max_examples=60)
@given(flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6), in_header=st.booleans())
def test_no_flipped_byte_makes_it_stumble(
    pristine: dict[str, Path], playground: Path, flips: list[tuple[float, int]], in_header: bool
) -> None:
    data = bytearray((pristine["w4a16"] / "model.safetensors").read_bytes())
    (header_length,) = struct.unpack("<Q", data[:8])
    for place, byte in flips:
        limit = 8 + header_length if in_header else len(data)
        data[min(int(place * limit), limit - 1)] = byte
    (playground / "model.safetensors").write_bytes(data)
    for name in ("config.json", "hf_quant_config.json"):
        shutil.copy(pristine["w4a16"] / name, playground / name)
    json.loads(verify_checkpoint(playground, pristine["source"]).to_json())
    shutil.copy(pristine["w4a16"] / "model.safetensors", playground / "model.safetensors")


def test_a_float_tensor_in_an_exotic_dtype(open_copy: Callable[[str], Any], pristine: dict[str, Path]) -> None:
    surgery = open_copy("w4a16")
    surgery.tensors["model.norm.weight"] = surgery.tensors["model.norm.weight"].float().to(torch.float8_e8m0fnu)
    surgery.tensors["model.layers.1.input_layernorm.weight"] = torch.ones(128, dtype=torch.complex64)
    surgery.close()
    report = verify_checkpoint(surgery.directory, pristine["source"])
    found = {(str(finding.check), finding.subject) for finding in report.findings}
    assert ("source-values", "model.norm.weight") in found
    assert ("not-judged", "model.layers.1.input_layernorm.weight") in found


def test_a_config_that_counts_billions_of_experts_is_judged_all_the_same(tmp_path: Path) -> None:
    tensors = {f"model.layers.0.mlp.experts.{index}.up_proj.weight": torch.zeros(2, 2) for index in range(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 1, "num_experts": 2**31}))
    (finding,) = [it for it in verify_checkpoint(tmp_path).findings if it.check == "experts"]
    assert finding.message.startswith("experts missing: 2, 3, 4")
    assert finding.message.endswith(f"of {2**31}")
