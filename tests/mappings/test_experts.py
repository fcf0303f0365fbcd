"""Grouped experts: slicing and merging under expert parallelism keep global ids."""

import torch

from quantplug.mappings.experts import grouped_mlp
from quantplug.mappings.layouts import GATED, ModelDimensions

DIMS = ModelDimensions(4, 160, 4, 2, 48, 523, num_experts=8, moe_layers=(0, 1, 2, 3))
FC1 = grouped_mlp(
    "linear_fc1",
    ("model.layers.*.mlp.experts.*.gate_proj.weight", "model.layers.*.mlp.experts.*.up_proj.weight"),
    GATED,
)


def test_slicing_names_global_experts():
    """The second of two EP ranks holds experts 4 to 7 as weight0 to weight3."""
    weights = [torch.full((192, 160), float(expert)) for expert in range(4, 8)]
    sliced = dict(FC1.slice_module(2, range(4, 8), weights, DIMS))
    assert len(sliced) == 8
    for expert in range(4, 8):
        for part in ("gate_proj", "up_proj"):
            tensor = sliced[f"model.layers.2.mlp.experts.{expert}.{part}.weight"]
            assert torch.equal(tensor, torch.full((96, 160), float(expert)))


def test_merging_undoes_slicing():
    weights = [torch.randn(192, 160) for _ in range(4)]
    sliced = dict(FC1.slice_module(0, [1, 3, 5, 7], weights, DIMS))
    merged = FC1.merging.merge_module(0, [1, 3, 5, 7], sliced, DIMS)
    assert set(sliced) == set(FC1.merging.names(0, [1, 3, 5, 7], DIMS))
    assert all(torch.equal(a, b) for a, b in zip(merged, weights, strict=True))


def test_both_of_megatrons_spellings_are_known():
    assert FC1.megatron == (
        "decoder.layers.*.mlp.experts.linear_fc1.weight*",
        "decoder.layers.*.mlp.experts.local_experts.*.linear_fc1.weight",
    )
