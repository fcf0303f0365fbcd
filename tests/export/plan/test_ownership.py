"""Who writes what: all ranks alike, and experts of one owner side by side."""

from collections import Counter

import torch

from quantplug.export.plan.ownership import assign
from quantplug.export.plan.types import WholeWeight
from quantplug.mappings.keys import ParamKey

EXPERTS = "decoder.layers.*.mlp.experts.linear_fc1.weight*"


def expert(number: int, replicas: tuple[tuple[int, ...], ...], layer: int = 0) -> WholeWeight:
    return WholeWeight(ParamKey(EXPERTS, layer, number), (8, 4), torch.bfloat16, replicas=replicas)


def test_experts_of_one_owner_follow_each_other() -> None:
    """Where they lie in one tensor, what an owner sends of it is one piece, and not one an expert."""
    weights = [expert(number, ((0,), (2,)) if number < 6 else ((1,), (3,))) for number in range(12)]
    owners = [assign(weights)[weight.key].owner for weight in weights]
    assert owners == [0] * 3 + [2] * 3 + [1] * 3 + [3] * 3


def test_owners_hold_what_they_write_and_share_it_evenly() -> None:
    replicas = ((0, 1), (4, 5))
    weights = [expert(number, replicas, layer) for layer in range(3) for number in range(8)]
    assigned = assign(weights)
    assert all(share.ranks in replicas and share.owner in share.ranks for share in assigned.values())
    assert Counter(share.owner for share in assigned.values()) == dict.fromkeys((0, 1, 4, 5), 6)
