"""What is answered for CUDA is answered only inside, and only where there is no GPU."""

import pytest
import torch
from megatron.core.ssm import mamba_mixer
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.moe import moe_utils
from transformer_engine.pytorch import Linear

from quantplug.megatron import cpu
from quantplug.megatron.releases import delta_net

CONTEXTS = [cpu.construction, cpu.checkpointing, cpu.local_forward]
without_gpu = pytest.mark.skipif(torch.cuda.device_count() > 0, reason="nothing is answered on a machine with a GPU")


def answered_for() -> tuple[object, ...]:
    return (
        torch.cuda.is_available,
        torch.cuda.current_device,
        torch.cuda.synchronize,
        CudaRNGStatesTracker.fork,
        moe_utils.te_general_gemm,
        delta_net.MODULE.HAVE_FLA,
        vars(delta_net.MODULE).get("l2norm"),
        delta_net.RULE_MODULE.chunk_gated_delta_rule,
        mamba_mixer.HAVE_MAMBA_SSM,
        mamba_mixer.ExtendedRMSNorm,
        vars(mamba_mixer).get("mamba_chunk_scan_combined"),
    )


@pytest.mark.parametrize("context", CONTEXTS)
def test_everything_is_put_back(context):
    before = answered_for()
    with context():
        pass
    assert answered_for() == before


@pytest.mark.parametrize("context", CONTEXTS)
def test_everything_is_put_back_after_an_exception(context):
    before = answered_for()
    with pytest.raises(KeyError), context():
        raise KeyError
    assert answered_for() == before


@without_gpu
@pytest.mark.parametrize("inner", CONTEXTS)
def test_nesting_answers_inside_and_puts_back_in_order(inner):
    before = answered_for()
    with cpu.construction():
        outside = answered_for()
        with inner():
            assert torch.cuda.is_available()
            assert torch.cuda.current_device() == "cpu"
        assert answered_for() == outside
    assert answered_for() == before


@pytest.mark.parametrize("context", CONTEXTS)
def test_nothing_is_answered_where_there_is_a_gpu(context, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    before = answered_for()
    with context():
        assert answered_for() == before


@without_gpu
def test_te_module_is_built_on_cpu():
    with pytest.raises(RuntimeError, match="needs CUDA"):
        Linear(16, 16, device="cpu")
    with cpu.construction():
        linear = Linear(16, 16, device="cpu")
    assert linear.weight.device.type == "cpu"


@without_gpu
def test_checkpointing_answers_synchronize():
    with cpu.checkpointing():
        torch.cuda.synchronize()
        assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"


@without_gpu
def test_local_forward_forks_no_generator():
    with cpu.local_forward(), CudaRNGStatesTracker().fork("unknown state"):
        assert moe_utils.te_general_gemm is None


@without_gpu
def test_local_forward_has_flas_norm_and_compiles_nothing():
    rows = torch.randn(5, 16, dtype=torch.float64)
    with cpu.local_forward():
        unit = delta_net.MODULE.l2norm(rows)
        unchanged = torch.compile(lambda x: torch.compiler.is_compiling())(rows)
    torch.testing.assert_close(unit, rows / (rows.norm(dim=-1, keepdim=True).square() + 1e-6).sqrt())
    assert unchanged is False
