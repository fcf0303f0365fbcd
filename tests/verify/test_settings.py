# ruff: noqa: E501 (tables: one case a line)
"""Settings of config.json against the source's: whatever decides what is computed, in whichever spelling."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import Qwen3MoeConfig

from quantplug.verify import Severity
from quantplug.verify.inventory.checkpoint import Checkpoint, TensorInfo
from quantplug.verify.rules.settings import settings

SOURCE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16", "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "num_experts_per_tok": 8, "norm_topk_prob": True, "rope_theta": 1000000.0, "rope_scaling": None,
    "sliding_window": None, "use_cache": True, "transformers_version": "4.51.0", "routed_scaling_factor": 2.5,
    "text_config": {"hidden_size": 64, "rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 10000},
}  # fmt: skip


def found(config: dict[str, Any], source: dict[str, Any] = SOURCE, dtype: str = "BF16") -> dict[str, str]:
    tensors = {"w": TensorInfo("w", dtype, (2, 2), "model.safetensors", "w")}
    export, original = Checkpoint(Path(), config, None, tensors), Checkpoint(Path(), source, None, {})
    return {finding.subject.removeprefix("config.json "): finding.severity for finding in settings(export, original)}


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"rms_norm_eps": 0.5}, "rms_norm_eps"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok"),
        # transformers 5.14 refuses it, and so do readers that are built on it.
        ({"num_experts_per_tok": float(SOURCE["num_experts_per_tok"])}, "num_experts_per_tok"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"norm_topk_prob": 1}, "norm_topk_prob"),
        ({"rope_theta": 5}, "rope.rope_theta"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"torch_dtype": "float16"}, "dtype"),
        ({"sliding_window": 4}, "sliding_window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"routed_scaling_factor": 1.0}, "routed_scaling_factor"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "architectures"),
        ({"a_setting_of_tomorrow": 1}, ""),
        (
            {"text_config": SOURCE["text_config"] | {"rope_scaling": {"type": "yarn", "factor": 8.0}}},
            "text_config.rope.factor",
        ),
        ({"text_config": {}}, "text_config.hidden_size"),
    ],
)
def test_what_differs_is_found(changed: dict[str, Any], name: str) -> None:
    subjects = found(SOURCE | changed)
    if name:
        assert subjects[name] == Severity.ERROR
    else:
        assert subjects == {"config.json": Severity.WARNING}


TYPED: dict[str, Any] = {
    "use_cache": True, "output_router_logits": False, "router_aux_loss_coef": 0.001, "initializer_range": 0.02,
    "attention_dropout": 0.0, "transformers_version": "5.14.1", "attention_bias": False, "use_sliding_window": False,
    "problem_type": None, "id2label": None,
}  # fmt: skip


@pytest.mark.parametrize("name", ["sliding_window", "bos_token_id", "eos_token_id", "pad_token_id"])
def test_no_text_is_not_null(name: str) -> None:
    with pytest.raises(StrictDataclassError):
        Qwen3MoeConfig.from_dict({name: ""})
    assert found({name: ""}, {name: None}) == {name: Severity.ERROR}


@pytest.mark.parametrize("value", [None, "", "x", [1], {"x": 1}, True, 0.5], ids=repr)
@pytest.mark.parametrize("name", TYPED)
def test_a_type_at_which_transformers_stops_is_found_in_what_may_differ_and_what_is_off(
    name: str, value: object
) -> None:
    config = {key: it for key, it in TYPED.items() if it is not None}
    try:
        Qwen3MoeConfig.from_dict(config | {name: value})
    except StrictDataclassError:
        assert TYPED[name] is None or found(TYPED | {name: value}, TYPED)[name] == Severity.ERROR
    else:
        assert name not in found(TYPED | {name: value}, TYPED) or name in ("attention_bias", "use_sliding_window")
    assert found({"text_config": TYPED | {"use_cache": "x"}}, {"text_config": TYPED}) == {
        "text_config.use_cache": Severity.ERROR
    }


@pytest.mark.parametrize("value", [[1], {"x": 1}, 7, ""], ids=repr)
def test_a_type_of_tensors_that_is_none_is_a_finding(value: object) -> None:
    assert found(SOURCE | {"torch_dtype": value})["dtype"] == Severity.ERROR


@pytest.mark.parametrize("name", ["num_hidden_layers", "topk_group", "sliding_window", "kv_lora_rank", "head_dim"])
def test_a_count_with_a_point_is_found_and_another_number_is_not(name: str) -> None:
    assert found(SOURCE | {name: 4.0}, SOURCE | {name: 4}) == {name: Severity.ERROR}
    assert found(SOURCE | {name: 4.0}, SOURCE | {name: 4.0}) == {}
    assert found(SOURCE | {"logits_scaling": 4.0}, SOURCE | {"logits_scaling": 4}) == {}


def test_a_kind_of_rotary_embeddings_that_is_null_is_none() -> None:
    kinds = [{"rope_theta": 1e4} | kind for kind in ({"rope_type": None}, {}, {"rope_type": "default"})]
    null, absent, default = ({"rope_parameters": it} for it in kinds)
    assert found(null, default) == {"rope.rope_type": Severity.ERROR}
    assert found(absent, default) == found(default, absent) == {}


@pytest.mark.parametrize("layers", [1, 3])
def test_a_list_of_other_layers_is_found_though_each_has_the_default(layers: int) -> None:
    kinds = ["full_attention"] * layers
    assert found(SOURCE | {"layer_types": kinds}, SOURCE | {"layer_types": ["full_attention"] * 2}) == {
        "layer_types": Severity.ERROR
    }


def test_what_is_missing_is_found() -> None:
    for key in ("rms_norm_eps", "num_experts_per_tok", "rope_theta", "hidden_act"):
        subjects = found({name: value for name, value in SOURCE.items() if name != key})
        assert len(subjects) == 1
        assert Severity.ERROR in subjects.values()


@pytest.mark.parametrize(
    "off", [{"sliding_window": None}, {"norm_topk_prob": False}, {"q_lora_rank": None}, {"text_config": {"qk": False}}]
)
def test_what_the_source_switches_off_in_words_is_not_left_to_a_default(off: dict[str, Any]) -> None:
    """transformers gives a Mistral without `sliding_window` one of 4096, a GLM-4.5 without `norm_topk_prob` true."""
    source = {"hidden_act": "silu", **off}
    export = {"hidden_act": "silu"} | ({"text_config": {}} if "text_config" in off else {})
    assert set(found(export, source).values()) == {Severity.ERROR}


@pytest.mark.parametrize(
    ("name", "value"), [("dtype", "float16"), ("tie_word_embeddings", True), ("tie_word_embeddings", False)]
)
def test_what_is_said_at_the_top_or_inside_is_not_lost(name: str, value: object) -> None:
    """Where nothing says it, readers differ in what they take."""
    plain = {"hidden_act": "silu", "text_config": {"hidden_size": 64}}
    inside = plain | {"text_config": {"hidden_size": 64, name: value}}
    for source in ({**plain, name: value}, inside):
        assert set(found(plain, source).values()) == {Severity.ERROR}
        for export in (plain | {name: value}, inside):
            assert Severity.ERROR not in found(export, source, dtype="F16").values()


def test_a_type_of_null_is_none() -> None:
    """Packed weights are of no type that a config could name, so that null is none of theirs."""
    for dtype in ("U8", "F8_E4M3", "BF16"):
        assert found(SOURCE | {"torch_dtype": None}, dtype=dtype) == {"dtype": Severity.ERROR}


def test_what_every_config_has_off_may_be_left_out() -> None:
    off = {"pad_token_id": None, "is_decoder": False, "rope_scaling": None, "tokenizer_class": None}
    assert found({"hidden_act": "silu"}, {"hidden_act": "silu", **off}) == {}


@pytest.mark.parametrize(
    "changed",
    [
        {"quantization_config": {"quant_method": "modelopt"}},
        {"use_cache": False, "transformers_version": "5.24.0", "_name_or_path": "x"},
        {"rms_norm_eps": 0.000001, "rope_theta": 1000000},
        {"layer_types": ["full_attention"] * 4, "mlp_bias": False, "num_nextn_predict_layers": 0},
    ],
)
def test_what_may_differ_is_not(changed: dict[str, Any]) -> None:
    assert found(SOURCE | changed) == {}


def test_both_spellings_of_rotary_embeddings_and_of_the_type() -> None:
    new = {key: value for key, value in SOURCE.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    new["text_config"] = {"hidden_size": 64, "rope_parameters": {"rope_type": "yarn", "factor": 4, "rope_theta": 1e4}}
    new["dtype"] = "torch.bfloat16"
    assert found(new) == {}
    assert found(SOURCE, new) == {}
    new["rope_parameters"]["rope_theta"] = 1e5
    assert found(new) == {"rope.rope_theta": Severity.ERROR}


@pytest.mark.parametrize(
    ("beside", "name"),
    [
        ({"rope_theta": 1e4}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope"),
        ({"torch_dtype": "float16"}, "torch_dtype"),
    ],
)
def test_two_spellings_that_say_two_things_are_both_compared(beside: dict[str, Any], name: str) -> None:
    """vLLM lets an outer `partial_rotary_factor` or `rope_theta` win, transformers 5 the ones in `rope_parameters`."""
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    source = {"hidden_act": "silu", "dtype": "bfloat16", "rope_parameters": rope}
    assert Severity.ERROR in found(source | beside, source).values()
    assert any(subject.startswith(name) for subject in found(source | beside, source))
    assert found(source | beside, source | beside) == {}
    alike = {"rope_theta": 1e6, "partial_rotary_factor": 0.25, "torch_dtype": "torch.bfloat16"}
    assert found(source | alike, source) == {}


def test_an_export_cast_as_a_whole_says_so() -> None:
    assert found(SOURCE | {"torch_dtype": "float16"}, dtype="F16") == {}


def test_a_count_of_mtp_layers_that_the_source_has_not() -> None:
    counted = SOURCE | {"num_nextn_predict_layers": 1}
    assert found(SOURCE | {"num_nextn_predict_layers": 0}, counted) == {}
    assert found(SOURCE | {"num_nextn_predict_layers": 2}, counted) == {"num_nextn_predict_layers": Severity.ERROR}
