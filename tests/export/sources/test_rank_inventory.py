"""What ranks hold, put together from plain data: no process group, no model."""

from dataclasses import replace
from itertools import groupby

import pytest
import torch

from quantplug.export.pipeline.buckets import make_rounds
from quantplug.export.plan.ownership import in_order
from quantplug.export.plan.pieces import cut
from quantplug.export.plan.types import QuantizerState, WeightRef, not_here
from quantplug.export.sources.rank_inventory import RankInventory, whole_weights
from quantplug.findings import Findings
from quantplug.mappings.keys import ParamKey
from quantplug.topology import Shard, ShardAxis
from tests.export.plan.test_build import NVFP4, plan, spread, weights

QKV = ParamKey("decoder.layers.*.self_attention.linear_qkv.weight", 0)
STATE = QuantizerState("q", (4, 3), amax=1.0)


def inventory(rank: int, *refs: WeightRef, tp: int = 2) -> RankInventory:
    first = rank // tp * tp
    groups = {ShardAxis.TP: tuple(range(first, first + tp)), ShardAxis.ETP: (rank,)}
    return RankInventory(rank, groups, refs)


def piece(index: int, count: int = 2, **changes) -> WeightRef:
    shard = Shard(ShardAxis.TP, 0, index, count)
    return replace(WeightRef(QKV, (192, 160), torch.bfloat16, shard, not_here), **changes)


def put_together(*inventories: RankInventory):
    findings = Findings()
    wholes = whole_weights(inventories, findings)
    findings.raise_if_any()
    return wholes


def test_slices_of_a_group_are_one_weight_and_copies_are_replicas():
    (whole,) = put_together(*(inventory(rank, piece(rank % 2)) for rank in range(4)))
    assert whole.shape == (384, 160)
    assert whole.replicas == ((0, 1), (2, 3))
    assert whole.axis is ShardAxis.TP


def test_a_group_that_lacks_a_slice_does_not_deliver():
    (whole,) = put_together(inventory(0, piece(0)), inventory(1), inventory(2, piece(0)), inventory(3, piece(1)))
    assert whole.replicas == ((2, 3),)


def test_a_weight_of_which_no_group_has_all_slices_is_an_error():
    with pytest.raises(Exception, match=r"slices \[0\] of 2 are there"):
        put_together(inventory(0, piece(0)), inventory(1))


def test_slices_in_the_wrong_place_are_no_group():
    with pytest.raises(Exception, match="Slices of weights are missing"):
        put_together(inventory(0, piece(1)), inventory(1, piece(0)))


@pytest.mark.parametrize("changes", [{"shape": (96, 160)}, {"dtype": torch.float32}, {"shard": None}])
def test_slices_that_do_not_fit_together_are_an_error(changes):
    with pytest.raises(Exception, match="do not fit together"):
        put_together(inventory(0, piece(0)), inventory(1, piece(1, **changes)))


def test_the_amax_is_the_largest_of_all_ranks():
    states = [replace(STATE, amax=amax) for amax in (1.0, 3.0)]
    (whole,) = put_together(*(inventory(rank, piece(rank, weight=states[rank])) for rank in (0, 1)))
    assert whole.weight.amax == 3.0


@pytest.mark.parametrize("unusable", [None, float("nan")])
def test_an_amax_that_one_rank_lacks_is_not_hidden_by_the_others(unusable):
    states = [replace(STATE, amax=amax) for amax in (5.0, unusable)]
    (whole,) = put_together(*(inventory(rank, piece(rank, weight=states[rank])) for rank in (0, 1)))
    assert whole.weight.amax is unusable or whole.weight.amax != whole.weight.amax


@pytest.mark.parametrize("other", [None, replace(STATE, num_bits=8)])
def test_ranks_that_quantize_otherwise_are_an_error(other):
    with pytest.raises(Exception, match="Ranks disagree"):
        put_together(inventory(0, piece(0, weight=STATE)), inventory(1, piece(1, weight=other)))


def test_in_a_round_no_rank_is_in_two_buckets_and_every_piece_is_in_one():
    refs = [
        *spread(weights(quantizer=NVFP4), (0, 1), ShardAxis.TP),
    ]
    experts = [
        replace(ref, replicas=((0, 2), (1, 3))[ref.key.expert % 2 :][:1], axis=ShardAxis.ETP)
        if ref.key.expert is not None
        else ref
        for ref in refs
    ]
    made = plan(experts)
    dims = made.dims
    rounds = make_rounds(made.tasks, dims, bucket_bytes=50_000)
    seen = []
    for each in rounds:
        ranks = [rank for bucket in each for rank in bucket.ranks]
        assert len(ranks) == len(set(ranks))
        for bucket in each:
            tasks = [piece.task for piece in bucket.pieces]
            assert sum(piece.in_flight for piece in bucket.pieces) <= 50_000
            assert all(task.ranks == bucket.ranks and task.source.axis is bucket.axis for task in tasks)
            seen += bucket.pieces
    assert sorted(map(repr, seen)) == sorted(repr(piece) for task in made.tasks for piece in cut(task, dims, 50_000))
    assert len(seen) > len(made.tasks)
    # The order in which each rank's files are filled is that of its rounds.
    for owner in range(4):
        done = [task for task, _ in groupby(piece.task for piece in seen if piece.task.owner == owner)]
        assert [task for task in in_order(made.tasks) if task.owner == owner] == done
