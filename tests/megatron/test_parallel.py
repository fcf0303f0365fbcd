"""Sizes that do not fit are refused before Megatron sees them; the topology is what Megatron says."""

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from quantplug.errors import TopologyError
from quantplug.megatron.parallel import check_sizes, current_topology, destroy_parallel, initialize_parallel
from quantplug.topology import ParallelTopology, ShardAxis


@pytest.mark.usefixtures("no_ranks")
def test_one_rank_without_torchrun():
    assert initialize_parallel() == ParallelTopology()
    assert current_topology() == ParallelTopology()
    assert parallel_state.model_parallel_is_initialized()
    destroy_parallel()
    assert not dist.is_initialized()


@pytest.mark.usefixtures("no_ranks")
def test_topology_without_groups_is_an_error():
    with pytest.raises(TopologyError, match="not initialized"):
        current_topology()


@pytest.mark.usefixtures("no_ranks")
def test_process_group_is_left_alone_when_sizes_do_not_fit():
    with pytest.raises(TopologyError, match=r"tp \* pp"):
        initialize_parallel(tp=2)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("world_size", "sizes", "named"),
    [
        (6, {"tp": 4, "pp": 1, "ep": 1, "etp": 1}, ["tp * pp"]),
        (4, {"tp": 2, "pp": 1, "ep": 3, "etp": 2}, ["etp * ep * pp"]),
        (4, {"tp": 3, "pp": 1, "ep": 3, "etp": 1}, ["tp * pp", "etp * ep * pp"]),
        (4, {"tp": 0, "pp": -1, "ep": 1, "etp": 1}, ["tp", "pp"]),
    ],
)
def test_sizes_at_fault_are_all_named(world_size, sizes, named):
    with pytest.raises(TopologyError) as caught:
        check_sizes(world_size, **sizes)
    assert [offender.parameter for offender in caught.value.offenders] == named


def test_sizes_that_fit():
    check_sizes(8, tp=2, pp=2, ep=2, etp=1)


def test_place_on_an_axis():
    topology = ParallelTopology(tp=4, tp_rank=3, etp=2, etp_rank=1)
    assert topology.place_on(ShardAxis.TP) == (3, 4)
    assert topology.place_on(ShardAxis.ETP) == (1, 2)
