"""Grouped experts: one row for both of Megatron's spellings, named by global ids."""

import torch

from quantplug.mappings.experts import grouped_mlp
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import GATED, ModelDimensions
from tests.mappings.rows import to_hf, to_megatron

DIMS = ModelDimensions(4, 160, 4, 2, 48, 523, num_experts=8, moe_layers=(0, 1, 2, 3))
FC1 = grouped_mlp(
    "linear_fc1",
    ("model.layers.*.mlp.experts.*.gate_proj.weight", "model.layers.*.mlp.experts.*.up_proj.weight"),
    GATED,
)


def test_the_names_of_experts_are_those_of_global_ids():
    """The second of two EP ranks holds experts 4 to 7 as weight0 to weight3."""
    names = [FC1.hf_names(ParamKey(FC1.megatron[0], 2, expert), DIMS) for expert in range(4, 8)]

    assert names == [
        (f"model.layers.2.mlp.experts.{expert}.gate_proj.weight", f"model.layers.2.mlp.experts.{expert}.up_proj.weight")
        for expert in (4, 5, 6, 7)
    ]


def test_each_expert_is_cut_into_gate_and_up_and_merged_again():
    gate, up = torch.full((96, 160), 1.0), torch.full((96, 160), 2.0)
    key = ParamKey(FC1.megatron[0], 2, 5)

    named = to_hf(FC1, key, torch.cat((gate, up)), DIMS)

    assert torch.equal(named["model.layers.2.mlp.experts.5.gate_proj.weight"], gate)
    assert torch.equal(named["model.layers.2.mlp.experts.5.up_proj.weight"], up)
    assert torch.equal(to_megatron(FC1, key, named, DIMS), torch.cat((gate, up)))


def test_both_of_megatrons_spellings_are_known():
    assert FC1.megatron == (
        "decoder.layers.*.mlp.experts.linear_fc1.weight*",
        "decoder.layers.*.mlp.experts.local_experts.*.linear_fc1.weight",
    )
