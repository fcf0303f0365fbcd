"""Rules with the number of a layer, on a stage whose layers have other numbers in the model than on it."""

import modelopt.torch.quantization as mtq
import pytest
from megatron.core.models.gpt.gpt_model import GPTModel

import quantplug.plugins  # noqa: F401  # registers the wrappers
from quantplug.calibration.run import calibrate
from quantplug.errors import MappingError
from quantplug.plugins.rules.local_layers import misplaced_rules, refuse_misplaced
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


NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}


@pytest.mark.parametrize("quantizer", ["self_attention.linear_proj.weight_quantizer", "mlp*weight_quantizer"])
@pytest.mark.parametrize("number", ["0", "2"])
def test_another_format_of_a_numbered_layer_is_refused_by_its_rule(number: str, quantizer: str) -> None:
    """Of the stage's first layer, which is the model's third: by a number of the stage, and by one of the model."""
    rule = f"*decoder.layers.{number}.{quantizer}"
    found = misplaced_rules(quantized(second_stage(), {"quantizer_name": rule, "cfg": NVFP4}))
    assert [offender.parameter for offender in found] == [rule]
    with pytest.raises(MappingError, match=r"layers\.2\..* has the settings that are meant for .*layers\.0\."):
        refuse_misplaced(found)


def test_formats_of_numbered_layers_that_are_as_the_whole_model_has_them_pass() -> None:
    rule = {"quantizer_name": "*decoder.layers.2.*weight_quantizer", "cfg": NVFP4}
    model = quantized(second_stage(), rule)
    assert [offender.parameter for offender in misplaced_rules(model)] == [rule["quantizer_name"]]
    # As a checkpoint leaves it that was quantized on one stage, and calibrated.
    mtq.set_quantizer_by_cfg(model, [{**rule, "quantizer_name": "*decoder.layers.0.*weight_quantizer"}])
    calibrate(model)
    assert misplaced_rules(model) == ()


@pytest.mark.parametrize("settings", [{}, {"axis": None}])
def test_a_rule_of_a_number_that_changes_nothing_passes(settings: dict[str, object]) -> None:
    rule = {"quantizer_name": "*decoder.layers.0.*weight_quantizer", "cfg": {"num_bits": (4, 3), **settings}}
    assert misplaced_rules(quantized(second_stage(), rule)) == ()


def test_a_number_in_a_rule_of_grouped_experts_is_found() -> None:
    """ModelOpt leaves out the number of an expert where it compares names."""
    rule = "*decoder.layers.1.mlp.experts.linear_fc1.weight_quantizer"
    found = misplaced_rules(quantized(second_stage(), {"quantizer_name": rule, "enable": False}))
    assert [offender.parameter for offender in found] == [rule]


def test_what_was_quantized_as_a_whole_passes() -> None:
    """As a checkpoint of one stage leaves it on several: layer 2 is off, whatever it is called here."""
    model = quantized(second_stage(), {"quantizer_name": "*decoder.layers.2.*", "enable": False})
    found = misplaced_rules(model)
    assert [offender.parameter for offender in found] == ["*decoder.layers.2.*"]
    mtq.disable_quantizer(model.decoder.layers[0], "*")
    assert misplaced_rules(model) == ()


def test_numbers_of_a_model_on_one_stage_are_its_own() -> None:
    assert misplaced_rules(quantized(tiny_model(), {"quantizer_name": "*decoder.layers.1.*", "enable": False})) == ()
