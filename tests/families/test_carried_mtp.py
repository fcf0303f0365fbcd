"""Multi-token prediction of Nemotron-H, which Megatron's model does not hold: kept bit for bit, and never dropped."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from quantplug import export_mcore_gpt_to_hf
from quantplug.errors import SourceError
from quantplug.verify import verify_checkpoint
from tests.export.checkpoints import load, one_rank, quantize, read, same_bytes

Checkpoint = Callable[[str], Path]


def config_alone(source: Path, to: Path) -> Path:
    to.mkdir()
    for path in source.glob("*.json"):
        shutil.copy(path, to)
    return to


def exported(source: Path, settings: Path, out: Path) -> Path:
    with one_rank():
        export_mcore_gpt_to_hf(quantize(load(source), "w4a16_nvfp4", source), settings, out)
    return out


def test_it_is_kept_as_it_is_and_excluded_by_name(checkpoint: Checkpoint, export: Callable[..., Path]) -> None:
    original, out = read(checkpoint("nemotron_h_moe")), export("nemotron_h_moe", "w4a16_nvfp4")
    written = read(out)
    mtp = {name for name in original if name.startswith("mtp.")}
    assert len(mtp) == 30
    assert all(same_bytes(written[name], original[name]) for name in mtp)
    ignored = set(json.loads((out / "config.json").read_text())["quantization_config"]["ignore"])
    assert {"mtp.layers.0.eh_proj", "mtp.layers.1.mixer.experts.7.down_proj", "mtp.layers.1.mixer.gate"} <= ignored
    assert {name.removesuffix(".weight") for name in mtp if original[name].dim() > 1} <= ignored
    assert "mtp.layers.1.mixer.experts" in ignored  # As servers name the one module that they build of all experts.
    assert "backbone.layers.0.mixer.conv1d" in ignored


def test_an_export_with_it_needs_the_tensors_of_the_source(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("nemotron_h_moe")
    with pytest.raises(SourceError, match=r"mtp\."):
        exported(source, config_alone(source, tmp_path / "config"), tmp_path / "out")


def test_an_export_without_it_needs_the_config_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("nemotron_h_latent")
    out = exported(source, config_alone(source, tmp_path / "config"), tmp_path / "out")
    assert verify_checkpoint(out, source).ok


def test_what_the_source_has_is_kept_though_its_config_counts_none(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("nemotron_h_moe"), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    out = exported(source, source, tmp_path / "out")
    assert {name for name in read(source) if name.startswith("mtp.")} <= read(out).keys()
