"""Import into real Megatron models: transformers' logits are the oracle, and bad checkpoints change nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from quantplug.errors import MappingError, ShapeError, SourceError, UnsupportedModelError
from quantplug.import_hf.to_model import import_mcore_gpt_from_hf
from quantplug.mappings.families import find_family
from quantplug.megatron.models.build import LayerSpec, build_model
from quantplug.megatron.parameters import iter_parameters
from tests.logits import megatron_logits, transformers_logits

pytestmark = pytest.mark.usefixtures("single_rank")
MODELS = ["tiny_qwen3_moe_dir", "tiny_qwen3_mixed_dir", "tiny_qwen3_dir", "tiny_qwen3_tied_dir"]


def build(directory: Path, layer_spec: LayerSpec = LayerSpec.LOCAL, dtype: torch.dtype = torch.float32, **changes):
    config = {**AutoConfig.from_pretrained(directory).to_dict(), **changes}
    family = find_family(config["architectures"][0])
    model = build_model(family.megatron_config(config), layer_spec=layer_spec, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # What the import does not write must show.
    return model


def copy_with(directory: Path, target: Path, **config_changes) -> Path:
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **config_changes}))
    return target


def copy_with_tensors(directory: Path, target: Path, change) -> Path:
    shutil.copytree(directory, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def assert_untouched(model: GPTModel) -> None:
    assert all(parameter.isnan().all() for parameter in model.parameters())


@pytest.mark.parametrize("fixture", MODELS)
def test_logits_equal_transformers(fixture, request):
    directory = request.getfixturevalue(fixture)
    model = build(directory)
    import_mcore_gpt_from_hf(model, directory)
    logits, expected = megatron_logits(model), transformers_logits(directory)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits[..., :523], expected, rtol=1e-4, atol=1e-5)
    assert (logits[..., 523:] == 0).all()


def test_logits_equal_transformers_without_normalized_top_k(tiny_qwen3_moe_dir, tmp_path):
    directory = copy_with(tiny_qwen3_moe_dir, tmp_path / "model", norm_topk_prob=False)
    model = build(directory)
    import_mcore_gpt_from_hf(model, directory)
    expected = transformers_logits(directory)
    assert (expected - transformers_logits(tiny_qwen3_moe_dir)).abs().max() > 0.01
    torch.testing.assert_close(megatron_logits(model)[..., :523], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fixture", MODELS)
def test_te_modules_get_the_same_values_as_local_ones(fixture, request):
    directory = request.getfixturevalue(fixture)
    values = []
    for layer_spec in LayerSpec:
        model = build(directory, layer_spec, torch.bfloat16)
        import_mcore_gpt_from_hf(model, str(directory))
        config = AutoConfig.from_pretrained(directory)
        family = find_family(config.architectures[0])
        table, dims = family.by_megatron(), family.dimensions(config.to_dict())
        values.append({table[p.key.module].hf_names(p.key, dims): p.tensor for p in iter_parameters(model)})
    te, local = values
    assert te.keys() == local.keys()
    assert all(torch.equal(te[names], local[names]) for names in te)
    assert all(tensor.dtype is torch.bfloat16 for tensor in te.values())


def test_padding_rows_are_zero(tiny_qwen3_dir):
    model = build(tiny_qwen3_dir)
    import_mcore_gpt_from_hf(model, tiny_qwen3_dir)
    source = load_file(tiny_qwen3_dir / "model.safetensors")
    for weight, name in (
        (model.embedding.word_embeddings.weight, "model.embed_tokens.weight"),
        (model.output_layer.weight, "lm_head.weight"),
    ):
        assert weight.shape == (640, 160)
        assert torch.equal(weight[:523], source[name].float())
        assert (weight[523:] == 0).all()


def test_dtype_rounds_and_the_router_has_its_own(tiny_qwen3_moe_dir, tmp_path):
    third = torch.tensor(1 / 3, dtype=torch.float32)
    directory = copy_with_tensors(
        tiny_qwen3_moe_dir,
        tmp_path / "model",
        lambda tensors: tensors.update({name: torch.full(t.shape, third.item()) for name, t in tensors.items()}),
    )
    model = build(directory)
    import_mcore_gpt_from_hf(model, directory)
    assert all((p.tensor[:8] == third).all() for p in iter_parameters(model))
    import_mcore_gpt_from_hf(model, directory, dtype=torch.float16, moe_router_dtype=torch.bfloat16)
    for parameter in iter_parameters(model):
        rounded = third.to(torch.bfloat16 if "router" in parameter.local_name else torch.float16)
        assert (parameter.tensor[:8] == rounded).all()


def test_parts_of_one_linear_in_several_types_are_read_as_the_values_that_they_are(tiny_qwen3_dir, tmp_path):
    tensors = load_file(tiny_qwen3_dir / "model.safetensors")
    query, up = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
    mixed = {**tensors, query: tensors[query].float() * 1.0001, up: tensors[up].half()}
    found = []
    for name, saved in {"mixed": mixed, "single": {key: tensor.float() for key, tensor in mixed.items()}}.items():
        source = shutil.copytree(tiny_qwen3_dir, tmp_path / name)
        save_file(saved, source / "model.safetensors", metadata={"format": "pt"})
        model = build(source)
        import_mcore_gpt_from_hf(model, source)
        found.append([parameter.tensor for parameter in iter_parameters(model)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_progress_is_called_for_every_parameter(tiny_qwen3_dir):
    model, calls = build(tiny_qwen3_dir), []
    import_mcore_gpt_from_hf(model, tiny_qwen3_dir, progress=lambda *call: calls.append(call))
    total = len(list(iter_parameters(model)))
    assert calls == [("import", done, total) for done in range(1, total + 1)]


def test_wrong_names_are_all_named_and_nothing_is_written(tiny_qwen3_moe_dir, tmp_path):
    def change(tensors):
        del tensors["model.layers.0.mlp.experts.3.up_proj.weight"]
        del tensors["model.layers.1.self_attn.q_norm.weight"]
        tensors["model.layers.1.self_attn.q_nrom.weight"] = torch.ones(48)
        tensors["model.layers.2.mlp.gate.weight"] = torch.ones(8, 160)

    directory = copy_with_tensors(tiny_qwen3_moe_dir, tmp_path / "model", change)
    model = build(tiny_qwen3_moe_dir)
    with pytest.raises(MappingError) as caught:
        import_mcore_gpt_from_hf(model, directory)
    offenders = {offender.parameter: offender for offender in caught.value.offenders}
    assert offenders.keys() == {
        "model.layers.0.mlp.experts.3.up_proj.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.1.self_attn.q_nrom.weight",
        "model.layers.2.mlp.gate.weight",
    }
    assert offenders["model.layers.0.mlp.experts.3.up_proj.weight"].expert == 3
    assert "model.layers.*.self_attn.q_norm.weight" in offenders["model.layers.1.self_attn.q_nrom.weight"].reason
    assert_untouched(model)


def test_model_with_other_numbers_of_layers_and_experts(tiny_qwen3_moe_dir):
    model = build(tiny_qwen3_moe_dir, num_hidden_layers=3, num_experts=4)
    with pytest.raises((MappingError, ShapeError)) as caught:
        import_mcore_gpt_from_hf(model, tiny_qwen3_moe_dir)
    found = {offender.parameter for offender in caught.value.offenders}
    assert "decoder.layers.2.mlp.router.weight" in found  # A layer too many.
    assert "decoder.layers.0.mlp.router.weight" in found  # Its rows count the experts.
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in found  # No parameter for the last experts.
    assert_untouched(model)


def test_untied_source_is_not_poured_into_a_tied_model(tiny_qwen3_dir):
    model = build(tiny_qwen3_dir, tie_word_embeddings=True)
    with pytest.raises(MappingError, match=r"lm_head\.weight"):
        import_mcore_gpt_from_hf(model, tiny_qwen3_dir)
    assert_untouched(model)


def test_tied_source_fills_an_output_layer_of_its_own(tiny_qwen3_tied_dir):
    model = build(tiny_qwen3_tied_dir, tie_word_embeddings=False)
    import_mcore_gpt_from_hf(model, tiny_qwen3_tied_dir)
    assert torch.equal(model.output_layer.weight, model.embedding.word_embeddings.weight)


def test_shapes_that_differ_are_all_named(tiny_qwen3_moe_dir):
    model = build(tiny_qwen3_moe_dir, moe_intermediate_size=48, num_key_value_heads=4)
    with pytest.raises(ShapeError) as caught:
        import_mcore_gpt_from_hf(model, tiny_qwen3_moe_dir)
    found = [offender.parameter for offender in caught.value.offenders]
    assert len(found) == 2 * (8 * 3 + 1)  # A gate, an up and a down of every expert; a fused q, k and v.
    assert_untouched(model)


def test_weights_that_are_no_floats(tiny_qwen3_dir, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    directory = copy_with_tensors(
        tiny_qwen3_dir, tmp_path / "model", lambda tensors: tensors.update({name: tensors[name].to(torch.int8)})
    )
    model = build(tiny_qwen3_dir)
    with pytest.raises(SourceError, match=r"layers\.0\.mlp\.up_proj.*int8"):
        import_mcore_gpt_from_hf(model, directory)
    assert_untouched(model)


def test_quantized_source_is_refused(tiny_qwen3_dir, tmp_path):
    quantization = {"quant_method": "fp8", "activation_scheme": "static"}
    directory = copy_with(tiny_qwen3_dir, tmp_path / "model", quantization_config=quantization)
    model = build(tiny_qwen3_dir)
    with pytest.raises(SourceError, match="remove quantization_config"):
        import_mcore_gpt_from_hf(model, directory)
    assert_untouched(model)


def test_unsupported_architecture_lists_the_supported(tiny_qwen3_dir, tmp_path):
    directory = copy_with(tiny_qwen3_dir, tmp_path / "model", architectures=["NoSuchForCausalLM"], model_type="no_such")
    with pytest.raises(UnsupportedModelError, match="Qwen3MoeForCausalLM"):
        import_mcore_gpt_from_hf(build(tiny_qwen3_dir), directory)


def test_setting_that_megatron_computes_otherwise(tiny_qwen3_dir, tmp_path):
    directory = copy_with(tiny_qwen3_dir, tmp_path / "model", attention_bias=True)
    model = build(tiny_qwen3_dir)
    with pytest.raises(UnsupportedModelError, match="attention_bias"):
        import_mcore_gpt_from_hf(model, directory)
    assert_untouched(model)
