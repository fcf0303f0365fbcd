"""What an export takes of its source beside the config: all that Megatron's model does not hold, and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quantplug.checkpoint.config.source import read_source_config
from quantplug.errors import SourceError
from quantplug.export.sources.passthrough import has_passthrough
from quantplug.mappings.families import find_family
from tests.families.cases import CASES


def source(name: str, directory: Path, index: dict[str, str] | None = None, **settings: object) -> Path:
    """A directory with a config, and perhaps an index, and no weights, as the hub gives it without them."""
    CASES[name].config.save_pretrained(directory)
    path = directory / "config.json"
    architectures = [CASES[name].model.__name__]
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": architectures, **settings}))
    if index is not None:
        content = json.dumps({"weight_map": index})
        (directory / "model.safetensors.index.json").write_text(content)
    return directory


def needed(directory: Path) -> bool:
    config = read_source_config(directory)
    family = find_family(config.architecture)
    return has_passthrough(directory, config.values, family, family.dimensions(config.values))


MTP = {"mtp.fc.weight": "model-00001-of-00001.safetensors"}
NORM = {"model.norm.weight": "model-00001-of-00001.safetensors"}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: source("qwen3", path), False),
        (lambda path: source("qwen3_vl_moe", path), True),
        (lambda path: source("llama4", path), True),
        (lambda path: source("llama4_text", path), False),
        (lambda path: source("qwen3_next", path), False),
        (lambda path: source("qwen3_next", path, NORM, num_nextn_predict_layers=0), False),
        (lambda path: source("qwen3_next", path, {**NORM, **MTP}, num_nextn_predict_layers=0), True),
        # What a config counts is converted: Megatron's model has it.
        (lambda path: source("qwen3_next", path, {**NORM, **MTP}, num_nextn_predict_layers=1), False),
        (lambda path: source("nemotron_h", path), False),
        (lambda path: source("nemotron_h", path, num_nextn_predict_layers=1), True),
    ],
)
def test_weights_are_asked_for_where_the_model_does_not_hold_them_all(
    make: Callable[[Path], Path], expected: bool, tmp_path: Path
) -> None:
    assert needed(make(tmp_path)) is expected


def test_an_index_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    directory = source("qwen3_next", tmp_path)
    (directory / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(SourceError, match=r"model\.safetensors\.index\.json.*is not a JSON object"):
        needed(directory)
