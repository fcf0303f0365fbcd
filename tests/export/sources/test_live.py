"""What an export reads of a live model, and what it cannot read."""

from collections.abc import Callable
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch

from quantplug import export_mcore_gpt_to_hf
from quantplug.errors import UnsupportedQuantizationError
from quantplug.export.sources.live import live_weights
from quantplug.megatron.models.build import LayerSpec
from tests.export.checkpoints import load, quantize
from tests.export.refusals import FC1, expert_quantizer, refused

pytestmark = pytest.mark.usefixtures("single_rank")

Sources = Callable[[str], Path]


def test_live_weights_are_the_models_own(sources: Sources) -> None:
    model = quantize(load(sources("moe")), "nvfp4")
    live = live_weights(model)
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    assert {ref.load().data_ptr() for ref in live.refs} == pointers
    assert live.unclaimed == ()
    assert not any(ref.load().requires_grad for ref in live.refs)


def test_a_state_says_what_its_quantizer_holds(sources: Sources) -> None:
    model = quantize(load(sources("moe")), "w4a16_nvfp4")
    states = {(ref.key.name, ref.key.expert): ref.weight for ref in live_weights(model).refs if ref.weight}
    expert = expert_quantizer(model, FC1, 3)
    (state,) = [state for (name, number), state in states.items() if number == 3 and name.startswith(FC1)]
    assert state.amax == model.get_submodule(FC1).weight3.abs().max().item() == expert.amax.item()
    assert (state.name, state.num_bits, state.block_sizes) == (f"{FC1}.weight_quantizer.3", (2, 1), ((-1, 16),))
    assert (state.scale_bits, state.dynamic_blocks, state.unsupported) == ((4, 3), True, ())


def test_a_dynamic_quantizer_has_no_amax_whatever_it_held_before(sources: Sources) -> None:
    model = quantize(load(sources("dense")), "fp8_dynamic")
    linear = "decoder.layers.0.mlp.linear_fc1"
    model.get_submodule(f"{linear}.input_quantizer").amax = torch.tensor(2.0)
    (state,) = [ref.activation for ref in live_weights(model).refs if ref.key.name == f"{linear}.weight"]
    assert (state.dynamic, state.amax, state.block_sizes) == (True, None, ((-1, None),))


@pytest.mark.parametrize("scheme", ["w4a16_nvfp4", "w8a16_fp8"])
def test_compressed_weights(scheme: str, sources: Sources, tmp_path: Path) -> None:
    model = quantize(load(sources("dense"), LayerSpec.LOCAL), scheme)
    mtq.compress(model)
    with refused(UnsupportedQuantizationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("dense"), export_dir=tmp_path / "out")
    assert len(caught.value.offenders) == 2 * 4
    assert "mtq.compress" in str(caught.value)
