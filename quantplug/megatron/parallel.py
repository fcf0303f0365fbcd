"""The only reader of Megatron's parallel_state: its sizes and ranks as plain data, and its set-up under torchrun."""

import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch._C._distributed_c10d import HashStore

from quantplug.errors import Offender, TopologyError
from quantplug.megatron.agreement import all_or_none
from quantplug.megatron.cpu import has_cuda
from quantplug.topology import ParallelTopology, ShardAxis


def current_topology() -> ParallelTopology:
    """Megatron's parallel layout as this rank sees it.

    Raises:
        TopologyError: Megatron's model parallel groups do not exist yet.
    """
    if not parallel_state.model_parallel_is_initialized():
        raise TopologyError(
            "Megatron's model parallel groups are not initialized.",
            remedy="First call initialize_parallel, or Megatron's own initialize_model_parallel.",
        )
    return ParallelTopology(
        tp=parallel_state.get_tensor_model_parallel_world_size(),
        ep=parallel_state.get_expert_model_parallel_world_size(),
        etp=parallel_state.get_expert_tensor_parallel_world_size(),
        pp=parallel_state.get_pipeline_model_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )


def pipeline_stages() -> int:
    """How many pipeline stages there are; 1 before Megatron's groups exist."""
    if not parallel_state.model_parallel_is_initialized():
        return 1
    return int(parallel_state.get_pipeline_model_parallel_world_size())


def process_groups() -> dict[ShardAxis, dist.ProcessGroup]:
    """The groups of ranks that share the slices of a tensor, by the axis that cuts it.

    The rank at position i of a group holds slice i.
    """
    return {
        ShardAxis.TP: parallel_state.get_tensor_model_parallel_group(),
        ShardAxis.ETP: parallel_state.get_expert_tensor_parallel_group(),
    }


def group_ranks() -> dict[ShardAxis, tuple[int, ...]]:
    """Global ranks of the groups that `process_groups` gives: the rank at position i of a tuple holds slice i."""
    return {axis: tuple(dist.get_process_group_ranks(group)) for axis, group in process_groups().items()}


def initialize_parallel(
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    etp: int = 1,
    *,
    backend: str | None = None,
    seed: int = 1234,
) -> ParallelTopology:
    """Sets up torch.distributed from torchrun's environment, and Megatron's groups on top of it.

    Ranks beyond the model parallel sizes become data parallel copies. A process group that already exists is used.

    Args:
        tp: Tensor parallel size.
        pp: Pipeline parallel size.
        ep: Expert parallel size.
        etp: Tensor parallel size of experts.
        backend: Backend of the process group; by default gloo, and where there is a GPU nccl beside it, so that data
            travels by nccl, and gloo tells at once of a rank that ended.
        seed: Seed of Megatron's CUDA generators (set only where there is a GPU).

    Raises:
        TopologyError: The world size is not a multiple of `tp * pp`, or of `etp * ep * pp`; or a node has fewer GPUs
            than ranks.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    # Before any group is made, so that a refusal leaves nothing behind that would have to be taken down.
    check_sizes(world_size, tp=tp, pp=pp, ep=ep, etp=etp)
    if not dist.is_initialized():
        _initialize_process_group(backend or ("cpu:gloo,cuda:nccl" if has_cuda() else "gloo"))
    if has_cuda():
        # After the process group, so that a rank without a GPU of its own ends all of them.
        all_or_none(_use_own_gpu)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    if has_cuda():
        # Tensor parallel layers draw from generators that this call names, and fail where they were never added
        # (megatron.core.tensor_parallel.random).
        model_parallel_cuda_manual_seed(seed)
    return current_topology()


def set_virtual_stages(stages: int | None) -> None:
    """Tells Megatron of how many virtual stages each pipeline rank has; None for no virtual stages.

    Its layouts, the place of multi-token prediction and the names of layers in a checkpoint are looked up by it as long
    as the model lives (`get_layer_offset` of PipelineParallelLayerLayout, parallel_state.is_pipeline_last_stage).
    """
    parallel_state.set_virtual_pipeline_model_parallel_world_size(stages)


def destroy_parallel() -> None:
    """Takes down Megatron's groups and the process group, at the end of a script or of a single-rank test.

    For another layout on several ranks call only Megatron's `destroy_model_parallel` and then `initialize_parallel`:
    the process group is used again (gloo's rendezvous does not survive a second one in the same processes).
    """
    # Megatron's groups are parts of the process group: it has to forget them while that still exists.
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def check_sizes(world_size: int, *, tp: int, pp: int, ep: int, etp: int) -> None:
    """Refuses parallel sizes that do not divide the number of ranks.

    Megatron lays its ranks out twice, as tp x dp x pp for the dense layers and as etp x ep x edp x pp for the experts
    (parallel_state.initialize_model_parallel); both must come out even.

    Raises:
        TopologyError: Names every size and product at fault.
    """
    sizes = {"tp": tp, "pp": pp, "ep": ep, "etp": etp}
    offenders = [Offender(name, f"{size} is not a positive size") for name, size in sizes.items() if size < 1]
    # Only of sizes that are positive: a zero has no remainder, and two negative ones would pass.
    products = {"tp * pp": tp * pp, "etp * ep * pp": etp * ep * pp}
    if not offenders:
        offenders = [
            Offender(name, f"{product} does not divide the world size {world_size}")
            for name, product in products.items()
            if world_size % product
        ]
    if offenders:
        raise TopologyError(
            "These parallel sizes do not fit the number of ranks.",
            offenders,
            "Start a multiple of both products of ranks (torchrun --nproc_per_node), or choose other sizes.",
        )


def _use_own_gpu() -> None:
    """NCCL works on the current device: without this all ranks of a node would use GPU 0, which NCCL refuses."""
    rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if rank >= gpus:
        raise TopologyError(
            "There are more ranks on a node than GPUs.",
            [Offender("LOCAL_RANK", f"is {rank}, and the GPUs are 0 to {gpus - 1}")],
            "Start as many ranks on each node as it has GPUs (torchrun --nproc_per_node).",
        )
    torch.cuda.set_device(rank)


def _initialize_process_group(backend: str) -> None:
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:  # A plain `python script.py`: one rank, and no port taken.
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
