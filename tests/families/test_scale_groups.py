"""The down projections of multi-latent attention, which servers fuse: one amax for both, on disk and in a stream."""

from collections.abc import Callable
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch

from quantplug import export_hf_weights_quant, export_mcore_gpt_to_hf
from quantplug.errors import WeightError
from quantplug.export.live_plan import plan_export
from quantplug.export.pipeline.amaxes import amaxes_of_wholes
from quantplug.export.pipeline.prescan import prescan
from quantplug.mappings.keys import ParamKey
from quantplug.plugins import quant_cfg
from tests.export.checkpoints import load, one_rank, read, same_bytes

Checkpoint = Callable[[str], Path]
SOURCE = "deepseek_v3"
DOWN = ("self_attention.linear_q_down_proj.weight", "self_attention.linear_kv_down_proj.weight")
NAMES = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")


def everything(source: Path) -> dict[str, object]:
    """A config that quantizes the MTP layer too."""
    return quant_cfg("w4a16_nvfp4", source, quantize_mtp=True)


def test_current_amaxes_are_those_of_the_group(checkpoint: Checkpoint) -> None:
    original = read(checkpoint(SOURCE))
    with one_rank():
        model = mtq.quantize(load(checkpoint(SOURCE)), everything(checkpoint(SOURCE)))
        planned = plan_export(model, checkpoint(SOURCE))
        own = prescan(planned.plan.tasks, planned.weights).amaxes
        amaxes = amaxes_of_wholes(planned.plan.tasks, own, {})
    layers = [("decoder.layers.*", layer, layer) for layer in range(3)] + [("mtp.layers.*.transformer_layer", 0, 3)]
    for prefix, number, layer in layers:
        own = [original[f"model.layers.{layer}.{name}.weight"].abs().max().item() for name in NAMES]
        found = [amaxes[ParamKey(f"{prefix}.{linear}", number)] for linear in DOWN]
        assert own[0] != own[1]
        assert found == [max(own)] * 2
    alone = amaxes[ParamKey("decoder.layers.*.self_attention.linear_proj.weight", 1)]
    assert alone == original["model.layers.1.self_attn.o_proj.weight"].abs().max().item()


def test_a_nan_in_one_weight_of_a_group_is_found_under_its_name(checkpoint: Checkpoint) -> None:
    with one_rank():
        model = mtq.quantize(load(checkpoint(SOURCE)), everything(checkpoint(SOURCE)))
        planned = plan_export(model, checkpoint(SOURCE))
        model.decoder.layers[1].self_attention.linear_kv_down_proj.weight.data[3, 5] = torch.nan
        with pytest.raises(WeightError, match=r"decoder\.layers\.1\.self_attention\.linear_kv_down_proj"):
            prescan(planned.plan.tasks, planned.weights)


def test_a_stream_has_the_bytes_of_an_export(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Shared scales, copies of the embedding and the head, the plain projection of the MTP layer: all alike."""
    with one_rank():
        plain = load(checkpoint(SOURCE))
        streamed = dict(
            export_hf_weights_quant(plain, checkpoint(SOURCE), quant_format="w4a16_nvfp4", quantize_mtp=True)
        )
        model = mtq.quantize(load(checkpoint(SOURCE)), everything(checkpoint(SOURCE)))
        export_mcore_gpt_to_hf(model, checkpoint(SOURCE), tmp_path / "out")
    exported = read(tmp_path / "out")
    for layer in range(4):
        scales = [exported[f"model.layers.{layer}.{name}.weight_scale_2"] for name in NAMES]
        assert same_bytes(*scales)
    assert streamed.keys() == exported.keys()
    assert [name for name in exported if not same_bytes(streamed[name], exported[name])] == []
