"""Every family straight from a training checkpoint: the bytes of an export of the model that was saved."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from quantplug import export_checkpoint, save_checkpoint
from quantplug.megatron import cpu
from quantplug.megatron.checkpoint.files import results_within_process
from quantplug.megatron.parameters import LanguageModel
from tests.export.checkpoints import assert_same_export, load, one_rank, quantize
from tests.families.cases import DECODERS
from tests.families.served import serves_experts

Export = Callable[..., Path]


def save_stacked(model: LanguageModel, directory: Path) -> Path:
    """As trainers save: layers that are alike, and the experts of a layer, are one tensor."""
    directory.mkdir()
    with cpu.checkpointing(), results_within_process():
        dist_checkpointing.save(model.sharded_state_dict(), str(directory), validate_access_integrity=False)
    return directory


@pytest.mark.parametrize("family", DECODERS)
def test_a_checkpoint_gives_the_bytes_of_its_model(
    family: str, checkpoint: Callable[[str], Path], export: Export, tmp_path: Path
) -> None:
    """Stacked and plain; and one by one, with quantizers of weights and inputs."""
    source = checkpoint(family)
    with one_rank(), torch.no_grad():
        model = load(source)
        save_stacked(model, tmp_path / "trained")
        quantize(model, "fp8", source, keep_experts=not serves_experts(family, "fp8"))
        save_checkpoint(model, tmp_path / "quantized", extra={})

    export_checkpoint(tmp_path / "trained", tmp_path / "plain", source)
    export_checkpoint(tmp_path / "quantized", tmp_path / "fp8", source)

    assert_same_export(tmp_path / "plain", export(family))
    assert_same_export(tmp_path / "fp8", export(family, "fp8"))


def test_a_checkpoint_with_a_scale_a_row_and_dynamic_inputs(
    checkpoint: Callable[[str], Path], export: Export, tmp_path: Path
) -> None:
    source = checkpoint("qwen3_moe")
    with one_rank():
        save_checkpoint(quantize(load(source), "fp8_dynamic", source), tmp_path / "quantized", extra={})

    export_checkpoint(tmp_path / "quantized", tmp_path / "out", source)

    assert_same_export(tmp_path / "out", export("qwen3_moe", "fp8_dynamic"))
