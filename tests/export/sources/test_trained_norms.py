"""Norms of a training checkpoint are what its trainer noted: the bytes are those of the model."""

from functools import partial
from pathlib import Path

import pytest

from quantplug import export_checkpoint
from quantplug.checkpoint.config.file import read_config_file
from quantplug.mappings.families import find_family
from tests.export.checkpoints import read, same_bytes
from tests.export.test_zero_centred import FAMILIES, turned
from tests.families.cases import make
from tests.made_once import MadeOnce
from tests.megatron.checkpoint.trained import save_trained

pytestmark = pytest.mark.usefixtures("single_rank")


@pytest.mark.parametrize("family", ["deepseek_v3", "nemotron_h", "qwen3_next"])
def test_they_are_as_the_trainer_had_them(family: str, made_once: MadeOnce, tmp_path: Path) -> None:
    source = made_once(f"family_{family}", partial(make, family))
    usual = find_family(read_config_file(source)["architectures"][0]).zero_centred
    model = turned(source, FAMILIES[family])
    save_trained([model], tmp_path / "trained", 1, alike=False, apply_layernorm_1p=not usual)
    export_checkpoint(tmp_path / "trained", tmp_path / "out", source)
    written, expected = read(tmp_path / "out"), read(source)
    assert written.keys() == expected.keys()
    assert [name for name in expected if not same_bytes(written[name], expected[name])] == []
