"""Answers for CUDA on a machine without it: the one place, each on for as short as it can be.

Transformer Engine and Megatron-Core ask torch for a CUDA device in places where the work itself needs none: to build
modules, to write a checkpoint, to run the local (non-TE) layers. Each context manager here answers the questions of one
such work, puts everything back on leaving it, exceptions included, and changes nothing on a machine that has a GPU.

The answers are process-wide while they are on: enter them from one thread at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from megatron.core.ssm import mamba_mixer
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.moe import moe_utils

from quantplug.megatron.models import mamba_reference
from quantplug.megatron.releases import delta_net


def has_cuda() -> bool:
    """Whether this machine has a GPU, also while `torch.cuda.is_available` is being answered for."""
    # The count is nothing that `_answers` replaces, so it stays true while the other questions are answered for.
    return torch.cuda.device_count() > 0


def construction() -> AbstractContextManager[None]:
    """On while modules are built: TE refuses to construct where `torch.cuda.is_available()` is False."""
    return _answers(
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "current_device", _cpu_device),
        # The last pipeline stage of a model with tied embeddings moves its copy of them.
        (torch.Tensor, "cuda", _stay),
        # TE's attention makes its sinks (softmax_offset) on "cuda" by name.
        (torch, "zeros", _on_cpu(torch.zeros)),
        # Gated delta nets refuse to be built without FLA, whose kernels only a forward needs.
        (delta_net.MODULE, "HAVE_FLA", True),
        (delta_net.RULE_MODULE, "chunk_gated_delta_rule", _no_kernel),
        # A Mamba mixer asks for the package of its kernels, and makes some parameters under CUDA's generator.
        (mamba_mixer, "HAVE_MAMBA_SSM", True),
        (mamba_mixer, "ExtendedRMSNorm", mamba_reference.GatedGroupNorm),
        (CudaRNGStatesTracker, "fork", _no_fork),
    )


def checkpointing() -> AbstractContextManager[None]:
    """On while a `sharded_state_dict` is made, saved or loaded: that synchronizes, and allocates on the device."""
    return _answers(
        (torch.cuda, "synchronize", _do_nothing),
        (torch.cuda, "current_device", _cpu_device),
    )


@contextmanager
def local_forward() -> Iterator[None]:
    """On while a model of the local layer spec runs on CPU (with `moe_token_dispatcher_type="allgather"`).

    What Megatron has torch compile runs as it is written: compiling it takes half a minute, and a compiler.
    """
    with ExitStack() as stack:
        if not has_cuda():
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_answers_in_a_forward())
        yield


def _answers_in_a_forward() -> AbstractContextManager[None]:
    return _answers(
        (torch.cuda, "current_device", _cpu_device),
        # Dropout in tensor-parallel regions forks the CUDA generator; a CPU forward has none to fork.
        (CudaRNGStatesTracker, "fork", _no_fork),
        # The router multiplies by TE's cuBLAS wrapper where it is there, by torch.mm where it is None.
        (moe_utils, "te_general_gemm", None),
        # The mask of a sliding window is made on "cuda" by name.
        (torch, "ones", _on_cpu(torch.ones)),
        # FLA's, which a gated delta net calls in deterministic mode too.
        (delta_net.MODULE, "l2norm", _unit_length),
        # The kernels of Mamba mixers (with `use_mamba_mem_eff_path=False`).
        (mamba_mixer, "mamba_chunk_scan_combined", mamba_reference.scan),
        (mamba_mixer, "causal_conv1d_fn", None),
    )


def _cpu_device() -> str:
    """Stands for `torch.cuda.current_device`, whose result Megatron only hands on as `device=`."""
    return "cpu"


def _no_kernel(*arguments: object, **settings: object) -> None:
    """Stands for a kernel that a module wants to have where it is built. Nothing runs it without a GPU."""
    raise NotImplementedError("FLA's kernels run on a GPU alone")


def _stay(tensor: torch.Tensor, *where: object, **how: object) -> torch.Tensor:
    return tensor


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Stands for a factory of tensors that is asked for one on "cuda"."""

    def make(*size: Any, device: Any = None, **how: Any) -> torch.Tensor:
        return factory(*size, device="cpu" if device == "cuda" else device, **how)

    return make


def _do_nothing(device: torch.device | int | str | None = None) -> None:
    """Stands for `torch.cuda.synchronize`: CPU work is done when its call returns."""


def _no_fork(tracker: CudaRNGStatesTracker, name: str = "") -> AbstractContextManager[None]:
    return nullcontext()


def _unit_length(x: torch.Tensor) -> torch.Tensor:
    """Stands for FLA's `l2norm` over the last axis, whose default of eps is 1e-6."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


@contextmanager
def _answers(*replacements: tuple[ModuleType | type, str, object]) -> Iterator[None]:
    with ExitStack() as stack:
        if not has_cuda():
            for owner, name, answer in replacements:
                if name in vars(owner):
                    # The stack runs its callbacks backwards, and on an exception too: torch never goes on with one of
                    # our answers.
                    stack.callback(setattr, owner, name, getattr(owner, name))
                else:  # What a failed import would have brought, or a base class has: that is uncovered again.
                    stack.callback(delattr, owner, name)
                setattr(owner, name, answer)
        yield
