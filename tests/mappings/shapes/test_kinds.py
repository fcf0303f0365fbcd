"""Kinds of tensors by the names that others write."""

import pytest

from quantplug.mappings.shapes.kinds import kind_of


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("model.layers.11.mlp.experts.3.gate_proj.weight", "mlp.experts.gate_proj.weight"),
        ("model.language_model.layers.1.self_attn.q_proj", "self_attn.q_proj"),
        ("language_model.model.layers.1.self_attn.q_proj", "self_attn.q_proj"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.visual.blocks.1.attn.qkv.weight", "visual.blocks.attn.qkv.weight"),
        ("backbone.layers.0.mixer.experts.12.up_proj.weight", "mixer.experts.up_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.layers.5.block2.conv1d.weight", "block2.conv1d.weight"),
    ],
)
def test_kind_drops_numbers_and_the_stack(tensor: str, kind: str) -> None:
    assert kind_of(tensor) == kind
