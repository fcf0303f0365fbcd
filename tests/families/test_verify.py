"""What verify finds in the exports of families that name their modules in ways of their own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantplug.verify import verify_checkpoint
from quantplug.verify.report import Severity
from tests.export.checkpoints import read
from tests.families.cases import Tensors

ATTENTION = "model.layers.1.self_attn"
SHARED = "model.layers.2.mlp.shared_expert"
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
EXPERTS = "model.layers.1.block_sparse_moe.experts"

Spoil = Callable[[Tensors], None]


def drop(part: str) -> Spoil:
    def spoil(tensors: Tensors) -> None:
        doomed = [name for name in tensors if part in name]
        assert doomed
        for name in doomed:
            del tensors[name]

    return spoil


def cut(name: str) -> Spoil:
    """Halves the rows."""
    return lambda tensors: tensors.update({name: tensors[name].chunk(2)[0].clone()})


def scale(name: str) -> Spoil:
    return lambda tensors: tensors.update({name: tensors[name] * 2})


def add(name: str) -> Spoil:
    return lambda tensors: tensors.update({name: torch.ones(3)})


SPOILED: list[tuple[str, Spoil, str, str]] = [
    ("qwen2", drop(f"{ATTENTION}.k_proj.bias"), "architecture", f"{ATTENTION}.k_proj.bias"),
    ("qwen2", cut(f"{ATTENTION}.q_proj.bias"), "architecture", f"{ATTENTION}.q_proj.bias"),
    ("qwen2", add(f"{ATTENTION}.o_proj.bias"), "architecture", f"{ATTENTION}.o_proj.bias"),
    ("llama3", add(f"{ATTENTION}.q_proj.bias"), "architecture", f"{ATTENTION}.q_proj.bias"),
    ("llama3", add(f"{ATTENTION}.q_norm.weight"), "architecture", f"{ATTENTION}.q_norm.weight"),
    ("qwen2_moe", drop(f"{SHARED}_gate"), "architecture", f"{SHARED}_gate.weight"),
    ("qwen2_moe", drop(f"{SHARED}.down_proj"), "architecture", f"{SHARED}.down_proj.weight"),
    ("qwen2_moe", scale(f"{SHARED}.up_proj.weight_scale_2"), "shared-scales", SHARED),
    ("qwen2_moe", add("model.layers.2.mlp.shared_expert_gate.bias"), "architecture", f"{SHARED}_gate.bias"),
    ("mixtral", drop(f"{EXPERTS}.5."), "experts", EXPERTS),
    ("mixtral", drop(".experts."), "experts", "model.layers.0.block_sparse_moe"),
    ("mixtral", drop(".w3."), "architecture", "model.layers.0.block_sparse_moe.experts.0.w3.weight"),
    ("mixtral", scale(f"{EXPERTS}.5.w3.weight_scale_2"), "shared-scales", f"{EXPERTS}.5"),
    ("mixtral", cut(ROUTER), "architecture", ROUTER),
]  # fmt: skip


def copy_of(directory: Path, to: Path, spoil: Spoil) -> Path:
    """The same checkpoint in one file, one thing in it spoiled."""
    to.mkdir()
    for path in directory.glob("*config.json"):
        shutil.copy(path, to)
    tensors = read(directory)
    spoil(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def told(directory: Path) -> set[tuple[str, str]]:
    findings = verify_checkpoint(directory).findings
    return {(str(found.check), found.subject) for found in findings if found.severity is Severity.ERROR}


@pytest.mark.parametrize(("name", "spoil", "check", "subject"), SPOILED, ids=[f"{row[0]}-{row[3]}" for row in SPOILED])
def test_one_thing_spoiled_is_found(
    name: str, spoil: Spoil, check: str, subject: str, export: Callable[..., Path], tmp_path: Path
) -> None:
    assert (check, subject) in told(copy_of(export(name, "w4a16_nvfp4"), tmp_path / "spoiled", spoil))


@pytest.mark.parametrize(
    ("name", "module"),
    [("qwen2_moe", "mlp.gate"), ("qwen2_moe", "mlp.shared_expert_gate"), ("mixtral", "block_sparse_moe.gate")],
)
def test_routers_and_gates_are_excluded_by_their_whole_names(
    name: str, module: str, export: Callable[..., Path], tmp_path: Path
) -> None:
    module = f"model.layers.0.{module}"
    copy = copy_of(export(name, "w4a16_nvfp4"), tmp_path / "copy", lambda tensors: None)
    assert told(copy) == set()
    for file, path in (
        ("config.json", ("quantization_config", "ignore")),
        ("hf_quant_config.json", ("quantization", "exclude_modules")),
    ):
        config = json.loads((copy / file).read_text())
        config[path[0]][path[1]].remove(module)
        (copy / file).write_text(json.dumps(config))
    assert told(copy) == {("exclude-missing", module)}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("mixtral", "num_local_experts"),
        ("mixtral", "intermediate_size"),
        ("qwen2_moe", "num_experts"),
        ("qwen2_moe", "shared_expert_intermediate_size"),
    ],
)
@pytest.mark.parametrize("value", [None, 0, "7", [1]])
def test_a_size_that_is_none(name: str, key: str, value: object, export: Callable[..., Path], tmp_path: Path) -> None:
    copy = copy_of(export(name, "w4a16_nvfp4"), tmp_path / "copy", lambda tensors: None)
    config = json.loads((copy / "config.json").read_text())
    config[key] = value
    (copy / "config.json").write_text(json.dumps(config))
    named = "num_experts" if key == "num_local_experts" and value is None else key
    assert ("architecture", f"config.json {named}") in told(copy)
