"""Which modules a pattern names, and which patterns are broader than they look."""

import pytest

from quantplug.verify.inventory import excludes
from quantplug.verify.inventory.excludes import PatternList, matches_compressed_tensors, matches_fp8, matches_modelopt

GATE, UP, LAYER_11 = "model.layers.1.mlp.gate", "model.layers.1.mlp.gate_up_proj", "model.layers.11.mlp.gate"


@pytest.mark.parametrize(
    ("matcher", "pattern", "hit"),
    [
        (matches_modelopt, GATE, [GATE]),
        (matches_modelopt, "model.layers.1.mlp", [GATE, UP]),
        (matches_modelopt, "model.layers.1.*", [GATE, UP]),
        (matches_modelopt, "model.layers.1*", [GATE, UP, LAYER_11]),
        (matches_modelopt, "*.mlp.gate", [GATE, LAYER_11]),
        (matches_modelopt, "*mlp.gate*", [GATE, UP, LAYER_11]),
        (matches_modelopt, "re:.*", []),
        (matches_modelopt, "model.layers.[0-9].mlp.gate*", []),
        (matches_modelopt, "", []),
        (matches_compressed_tensors, "re:.*mlp.gate$", [GATE, LAYER_11]),
        (matches_compressed_tensors, "re:(", []),
        (matches_compressed_tensors, GATE, [GATE]),
        (matches_fp8, "gate", [GATE, LAYER_11]),
        (matches_fp8, "layers.1.mlp", [GATE, UP]),
    ],
)
def test_hits(matcher: excludes.Matcher, pattern: str, hit: list[str]) -> None:
    listed = PatternList((pattern,), matcher)
    assert listed.hits([GATE, UP, LAYER_11]).get(pattern, []) == hit
    assert [module for module in (GATE, UP, LAYER_11) if listed.names(module)] == hit


@pytest.mark.parametrize(
    ("pattern", "broad"),
    [
        ("model.layers.1.*", False),
        ("*.mlp.gate", False),
        ("model.layers.*.mlp.gate", False),
        ("model.layers.1.mlp.gate_up*", True),
        ("model.layers.1.mlp*", False),
        ("model.layers.1.mlp.gate*", True),
        ("*mlp.gate*", True),
        ("*gate", True),
        ("model.layers.1*", True),
        ("model.layers.?.mlp.gate", True),
    ],
)
def test_overreach(pattern: str, broad: bool) -> None:
    hit = PatternList((pattern,), matches_modelopt).hits([GATE, UP, LAYER_11])[pattern]
    assert (excludes.overreach(pattern, hit) is not None) == broad
