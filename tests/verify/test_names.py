"""Names of the families that others write, taken apart."""

import pytest

from quantplug.verify.inventory import names


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("model.layers.61.eh_proj", ("model.layers", 61)),
        ("backbone.layers.0.mixer.in_proj", ("backbone.layers", 0)),
        ("layers.7.attention.wq", ("layers", 7)),
        ("model.visual.layers.3.mlp", None),
        ("audio_tower.layers.3.fc1", None),
        ("mtp.layers.0.mlp", None),
        ("model.norm", None),
        ("model.layers.x.mlp", None),
    ],
)
def test_layers_of_the_decoder_alone(module: str, layer: tuple[str, int] | None) -> None:
    assert names.layer(module) == layer


def test_experts() -> None:
    found = names.expert("model.layers.1.block_sparse_moe.experts.3.w2")
    assert found == names.ExpertName("model.layers.1.block_sparse_moe.experts", 3, "w2")
    assert names.expert("model.layers.1.mlp.shared_experts.up_proj") is None
    assert names.expert("model.layers.1.mlp.experts.gate_up_proj") is None


def test_mixtral_merges_w1_and_w3() -> None:
    modules = [f"m.experts.{index}.{name}" for index in range(2) for name in ("w1", "w2", "w3")]
    groups = list(names.fused_groups(modules))
    assert [group.members for group in groups] == [(f"m.experts.{i}.w1", f"m.experts.{i}.w3") for i in range(2)]
    assert all(group.in_expert for group in groups)


def test_experts_without_a_gate_merge_nothing() -> None:
    assert list(names.fused_groups(["m.experts.0.up_proj", "m.experts.0.down_proj"])) == []
