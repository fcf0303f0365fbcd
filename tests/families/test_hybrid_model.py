"""Every family as Megatron-Core's HybridModel: the same parameters, bytes and logits as its GPTModel.

Nemotron-H, whose one class a HybridModel is, is shown in test_families.py.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from quantplug import export_checkpoint, export_mcore_gpt_to_hf, save_checkpoint
from quantplug.megatron import cpu
from quantplug.megatron.checkpoint.files import results_within_process
from quantplug.megatron.models.build import LayerSpec
from quantplug.megatron.parameters import LanguageModel, iter_parameters
from tests.export.checkpoints import assert_same_export, build, one_rank, quantize
from tests.families.cases import CASES
from tests.families.served import serves_experts
from tests.logits import VOCABULARY, megatron_logits, transformers_logits
from tests.megatron.hybrid import load_hybrid, needs_hybrid_model

Checkpoint = Callable[[str], Path]
Export = Callable[..., Path]

OF_PAIRS = [name for name in CASES if not name.startswith("nemotron_h")]

pytestmark = [needs_hybrid_model, pytest.mark.parametrize("name", OF_PAIRS)]


def trained(model: LanguageModel, directory: Path) -> Path:
    """As trainers save: the experts of a layer are one tensor."""
    directory.mkdir()
    with cpu.checkpointing(), results_within_process():
        dist_checkpointing.save(model.sharded_state_dict(), str(directory), validate_access_integrity=False)
    return directory


def test_the_bytes_of_the_gpt_model(name: str, checkpoint: Checkpoint, export: Export, tmp_path: Path) -> None:
    """Plain and in NVFP4; live, and straight from what a trainer saves and from what quantplug saves."""
    source = checkpoint(name)
    with one_rank(), torch.no_grad():
        model = load_hybrid(source)
        keys = {(parameter.key, parameter.shard) for parameter in iter_parameters(model)}
        assert keys == {(parameter.key, parameter.shard) for parameter in iter_parameters(build(source))}
        export_mcore_gpt_to_hf(model, source, tmp_path / "plain")
        trained(model, tmp_path / "trained")
        quantize(model, "w4a16_nvfp4", source, keep_experts=not serves_experts(name, "w4a16_nvfp4"))
        export_mcore_gpt_to_hf(model, source, tmp_path / "nvfp4")
        save_checkpoint(model, tmp_path / "quantized", extra={})
    export_checkpoint(tmp_path / "trained", tmp_path / "plain_again", source)
    export_checkpoint(tmp_path / "quantized", tmp_path / "nvfp4_again", source)

    for made, scheme in (("plain", None), ("nvfp4", "w4a16_nvfp4")):
        assert_same_export(tmp_path / made, export(name, scheme))
        assert_same_export(tmp_path / f"{made}_again", export(name, scheme))


def test_logits(name: str, checkpoint: Checkpoint) -> None:
    """Megatron's own forward of the HybridModel gives transformers' logits."""
    with one_rank():
        logits = megatron_logits(load_hybrid(checkpoint(name), LayerSpec.LOCAL, torch.float32))
    torch.testing.assert_close(logits[..., :VOCABULARY], transformers_logits(checkpoint(name)), rtol=1e-4, atol=1e-4)
