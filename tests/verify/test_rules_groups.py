"""Groups that no reader can use are told, whatever else the config says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compressed_tensors.quantization import preset_name_to_scheme

from quantplug.verify import Severity, verify_checkpoint

WEIGHTS = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
GOOD = {"targets": ["Linear"], "weights": WEIGHTS}
BROKEN_GROUPS: list[object] = [
    "Linear",
    None,
    GOOD | {"targets": None},
    GOOD | {"targets": []},
    GOOD | {"targets": "Linear"},
    {"weights": WEIGHTS},
    {"targets": ["Linear"]},
    GOOD | {"weights": None},
    GOOD | {"weights": [4]},
    *(GOOD | {"weights": {k: v for k, v in WEIGHTS.items() if k != key}} for key in ("num_bits", "type", "group_size")),
    GOOD | {"weights": WEIGHTS | {"num_bits": 8}},
    GOOD | {"weights": WEIGHTS | {"num_bits": True}},
    GOOD | {"weights": WEIGHTS | {"type": "int"}},
    GOOD | {"input_activations": 1},
]


def in_blocks(group: object) -> object:
    """The same with the strategy that compressed-tensors calls NVFP4's, which it would not take by itself."""
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        return group
    return group | {"weights": group["weights"] | {"strategy": "tensor_group"}}


def told(directory: Path) -> set[str]:
    return {found.subject for found in verify_checkpoint(directory).findings if found.check == "config-groups"}


def in_modelopt(open_copy: Callable[[str], Any], **settings: object) -> set[str]:
    surgery = open_copy("w4a16")
    surgery.quantization_config.update(settings)
    surgery.close()
    return told(surgery.directory)


def in_compressed_tensors(source: Path, directory: Path, **settings: object) -> set[str]:
    """The configs alone are judged here: the tensors may be anything."""
    config = json.loads((source / "config.json").read_text())
    quantization = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"} | settings
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return told(directory)


def test_good_groups(open_copy: Callable[[str], Any], pristine: dict[str, Path], tmp_path: Path) -> None:
    assert in_modelopt(open_copy, config_groups={"group_0": GOOD}) == set()
    for preset, name in (("NVFP4A16", "nvfp4-pack-quantized"), ("FP8_DYNAMIC", "float-quantized")):
        group = preset_name_to_scheme(preset, ["Linear"]).model_dump(mode="json")
        assert in_compressed_tensors(pristine["source"], tmp_path, format=name, config_groups={"a": group}) == set()


@pytest.mark.parametrize("group", BROKEN_GROUPS, ids=str)
def test_broken_groups(
    open_copy: Callable[[str], Any], pristine: dict[str, Path], tmp_path: Path, group: object
) -> None:
    odd = {"config.json config_groups.odd"}
    assert in_modelopt(open_copy, config_groups={"fine": GOOD, "odd": group}) == odd
    blocks = {"fine": in_blocks(GOOD), "odd": in_blocks(group)}
    found = in_compressed_tensors(pristine["source"], tmp_path, config_groups=blocks)
    # What the library refuses too is said of the argument itself beside.
    assert odd <= found <= odd | {"config.json config_groups.odd.weights.group_size"}


@pytest.mark.parametrize(
    "inputs", [{"num_bits": 8, "type": "float"}, {"type": "float"}, {"num_bits": 4, "type": "int"}]
)
def test_inputs_that_modelopt_does_not_write_of_its_algorithm(open_copy: Callable[[str], Any], inputs: object) -> None:
    groups = {"odd": GOOD | {"input_activations": inputs}}
    assert in_modelopt(open_copy, config_groups=groups) == {"config.json config_groups.odd"}


@pytest.mark.parametrize("groups", [[1], "group_0", 7, None])
def test_what_is_no_object_of_groups(
    open_copy: Callable[[str], Any], pristine: dict[str, Path], tmp_path: Path, groups: object
) -> None:
    assert in_modelopt(open_copy, config_groups=groups) == {"config.json config_groups"}
    assert in_compressed_tensors(pristine["source"], tmp_path, config_groups=groups) == {"config.json config_groups"}


def test_compressed_tensors_without_groups(pristine: dict[str, Path], tmp_path: Path) -> None:
    assert in_compressed_tensors(pristine["source"], tmp_path) == {"config.json config_groups"}


@pytest.mark.parametrize("value", [8, True, ["FP8"], {"num_bits": 8}])
def test_a_kv_cache_algorithm_is_a_name(open_copy: Callable[[str], Any], value: object) -> None:
    assert in_modelopt(open_copy, kv_cache_quant_algo=value) == {"config.json kv_cache_quant_algo"}


@pytest.mark.parametrize("change", [{"type": None}, {"type": "FLOAT"}, {"dynamic": None}, {"dynamic": True}], ids=str)
def test_a_kv_cache_that_vllm_keeps_in_16_bits_is_not_what_the_other_file_says(
    open_copy: Callable[[str], Any], change: dict[str, object]
) -> None:
    surgery = open_copy("fp8")
    assert surgery.quantization_config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    surgery.quantization_config["kv_cache_scheme"].update(change)
    surgery.close()

    subjects = {it.subject for it in verify_checkpoint(surgery.directory).findings if it.severity is Severity.ERROR}

    assert "KV cache" in subjects


@pytest.mark.parametrize("value", [None, "modelopt", ["modelopt"], 7], ids=repr)
def test_a_producer_that_is_no_object_is_found(open_copy: Callable[[str], Any], value: object) -> None:
    surgery = open_copy("fp8")
    surgery.quantization_config["producer"] = value
    surgery.close()

    subjects = {it.subject for it in verify_checkpoint(surgery.directory).findings if it.severity is Severity.ERROR}

    assert subjects == {"config.json producer"}
