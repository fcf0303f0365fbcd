"""Rules with the number of a layer, on a stage whose layers have other numbers in the model than on it."""

import modelopt.torch.quantization as mtq
import pytest
from megatron.core.models.gpt.gpt_model import GPTModel

import quantplug.plugins  # noqa: F401  # registers the wrappers
from quantplug.errors import MappingError
from quantplug.plugins.local_layers import misplaced_rules, refuse_misplaced
from tests.plugins.tiny_model import tiny_model

pytestmark = pytest.mark.usefixtures("single_rank")

WEIGHTS = {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": (4, 3)}}
OFF = {"quantizer_name": "*", "enable": False}


def second_stage() -> GPTModel:
    """A model whose two layers are the third and the fourth of a whole one."""
    model = tiny_model()
    for number, layer in enumerate(model.decoder.layers, start=3):
        layer.layer_number = number
    return model


def quantized(model: GPTModel, *rules: dict[str, object]) -> GPTModel:
    return mtq.quantize(model, {"quant_cfg": [OFF, WEIGHTS, *rules], "algorithm": None})


@pytest.mark.parametrize("number", ["0", "1"])
def test_a_number_of_the_stage_is_refused_by_its_rule(number: str) -> None:
    rule = f"*decoder.layers.{number}.*"
    found = misplaced_rules(quantized(second_stage(), {"quantizer_name": rule, "enable": False}))
    assert [offender.parameter for offender in found] == [rule]
    with pytest.raises(MappingError, match=rf"layers\.{int(number) + 2}\..* is off") as caught:
        refuse_misplaced(found)
    assert "layer_number" in caught.value.remedy


@pytest.mark.parametrize("name", ["*layers.*.mlp*", "*mtp.layers.0.*", "*linear_fc1*", "*layers.7.*"])
def test_rules_that_mean_the_same_layers_either_way_pass(name: str) -> None:
    assert misplaced_rules(quantized(second_stage(), {"quantizer_name": name, "enable": False})) == ()


def test_what_was_quantized_as_a_whole_passes() -> None:
    """As a checkpoint of one stage leaves it on several: layer 2 is off, whatever it is called here."""
    model = quantized(second_stage(), {"quantizer_name": "*decoder.layers.2.*", "enable": False})
    found = misplaced_rules(model)
    assert [offender.parameter for offender in found] == ["*decoder.layers.2.*"]
    mtq.disable_quantizer(model.decoder.layers[0], "*")
    assert misplaced_rules(model) == ()


def test_numbers_of_a_model_on_one_stage_are_its_own() -> None:
    assert misplaced_rules(quantized(tiny_model(), {"quantizer_name": "*decoder.layers.1.*", "enable": False})) == ()
