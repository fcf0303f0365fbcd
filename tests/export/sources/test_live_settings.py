"""A live model against config.json: what a server would compute otherwise is refused by name, all else is not."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_config import TransformerConfig

from quantplug import plan_stream
from quantplug.checkpoint.config.source import megatron_config, read_source_config
from quantplug.errors import MappingError, UnsupportedModelError
from quantplug.export.live_plan import plan_export
from quantplug.mappings.table import Activation
from quantplug.megatron import cpu
from quantplug.megatron.models import build
from quantplug.megatron.parameters import LanguageModel
from quantplug.megatron.releases.installed import MEGATRON_CORE
from tests.export.refusals import refused
from tests.families.cases import CASES
from tests.made_once import MadeOnce

pytestmark = pytest.mark.usefixtures("single_rank")

Config = Callable[[str], Path]


@pytest.fixture(scope="module")
def config(made_once: MadeOnce) -> Config:
    """A directory with the config.json of a family and nothing else: for all that is tested here it is enough."""

    def save(name: str, directory: Path) -> None:
        case = CASES[name]
        case.config.save_pretrained(directory)
        said = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**said, "architectures": [case.model.__name__]}))

    return lambda name: made_once(f"config_{name}", partial(save, name))


@dataclass(frozen=True)
class Other:
    """A model that is built otherwise than its config says.

    Attributes:
        family: The case whose config it is.
        names: The settings that an error must name.
        transformer: Arguments of Megatron's config that are not the config's.
        model: Those of the model, likewise.
        changes: Of the family's settings themselves.
    """

    family: str
    names: tuple[str, ...]
    transformer: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)

    def made(self, directory: Path) -> LanguageModel:
        """The model, empty."""
        said = megatron_config(read_source_config(directory))
        settings = replace(
            said, transformer={**said.transformer, **self.transformer}, model={**said.model, **self.model}
        )
        return build.build_model(replace(settings, **self.changes))


def _of(family: str, *names: str, **transformer: Any) -> Other:
    return Other(family, names, transformer)


YARN = {
    "yarn_original_max_position_embeddings": 4096,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_mscale": None,
    "yarn_mscale_all_dim": None,
    "yarn_correction_range_round_to_int": False,
}
"""As GPT-OSS has it, but for the factor."""

OTHERS = (
    _of("qwen3_moe", "moe_router_topk", moe_router_topk=4),
    _of("qwen3_moe", "moe_router_score_function", moe_router_score_function="sigmoid"),
    _of("qwen3_moe", "moe_router_pre_softmax", moe_router_pre_softmax=True),
    _of("qwen3_moe", "moe_router_topk_scaling_factor", moe_router_topk_scaling_factor=2.5),
    _of("qwen3_moe", "moe_router_load_balancing_type", moe_router_load_balancing_type="sinkhorn"),
    _of("qwen3_moe", "moe_router_group_topk", moe_router_num_groups=4, moe_router_group_topk=2),
    _of("qwen3_moe", "layernorm_epsilon", layernorm_epsilon=1e-5),
    _of("qwen3_moe", "window_size", window_size=(64, 0)),
    _of("qwen3_moe", "softmax_scale", softmax_scale=0.1),
    _of("qwen3_moe", "rotary_interleaved", rotary_interleaved=True),
    _of("qwen3_moe", "no_rope_freq", no_rope_freq=[0, 1, 0]),
    _of("qwen3_moe", "glu_linear_offset", glu_linear_offset=1.0),
    _of("qwen3_moe", "activation_func_clamp_value", activation_func_clamp_value=7.0),
    _of("qwen3_moe", "softmax_type", softmax_type="off-by-one"),
    Other("qwen3_moe", ("activation_func",), changes={"activation": Activation.QUICK_GELU}),
    Other("llama2", ("qk_l2_norm",), changes={"unit_norm_layers": (1,)}),
    Other("qwen3_moe", ("rotary_base",), model={"rotary_base": 1_000_000}),
    Other("qwen3_moe", ("rotary_percent",), model={"rotary_percent": 0.5}),
    Other("qwen3_moe", ("rope_scaling",), model={"seq_len_interpolation_factor": 2.0}),
    Other("qwen3_moe", ("position_embedding_type",), model={"position_embedding_type": "none"}),
    Other("llama3", ("rope_scaling",), model={"rope_scaling": False}),
    Other("llama3", ("rope_scaling",), model={"rope_scaling_factor": 8.0}),
    Other("llama4_text", ("qk_l2_norm",), changes={"unit_norm_layers": (0, 2)}),
    # Both lists of heads have the same rows of q, k and v together, and the same columns of the output.
    _of(
        "qwen2",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "rotary_percent",
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=24,
    ),
    _of("gpt_oss", "window_size", window_size=(3, 0)),
    _of("gpt_oss", "window_size", window_attn_skip_freq=[0, 1, 0]),
    Other("gpt_oss", ("rope_scaling", "mscale"), changes={"yarn": {**YARN, "yarn_rotary_scaling_factor": 8.0}}),
    _of("deepseek_v3", "rope_scaling", rotary_base=50_000.0),
    _of("deepseek_v3", "mscale", mscale=1.5),
    _of("deepseek_v3", "softmax_scale", "mscale", mscale_all_dim=0.2),
    _of("deepseek_v3", "moe_router_group_topk", moe_router_group_topk=1),
    _of("nemotron_h", "mamba_state_dim", "mamba_num_groups", mamba_state_dim=16, mamba_num_groups=3),
    # All at once.
    Other(
        "glm4_moe",
        ("layernorm_epsilon", "moe_router_topk", "rotary_percent"),
        {"layernorm_epsilon": 1e-3, "moe_router_topk": 1},
        {"rotary_percent": 1.0},
    ),
)

# Settings that Megatron-Core has since then.
LATER = (
    (
        (0, 17),
        _of(
            "qwen3_moe",
            "softmax_scale",
            "mup_embedding_mult",
            "mup_output_mult",
            use_mup=True,
            mup_base_hidden_size=16,
            mup_embedding_mult=2.0,
        ),
    ),
    ((0, 17), _of("qwen3_moe", "moe_router_force_biased", moe_router_force_biased=-1.0)),
    ((0, 18), _of("qwen3_moe", "moe_mlp_glu_interleave_size", moe_mlp_glu_interleave_size=32)),
    (
        (0, 19),
        _of("qwen3_moe", "moe_router_load_balancing_type", moe_router_load_balancing_type="quantile_balancing"),
    ),
)
OTHERS += tuple(other for release, other in LATER if release <= MEGATRON_CORE)


def _named(other: Other) -> str:
    return f"{other.family}-{'-'.join(other.names)}"


@pytest.mark.parametrize("other", OTHERS, ids=_named)
def test_a_model_that_computes_otherwise_is_refused_by_every_setting(
    other: Other, config: Config, tmp_path: Path
) -> None:
    directory = config(other.family)
    model = other.made(directory)
    with refused(MappingError, tmp_path) as caught:
        plan_export(model, directory)
    assert sorted(offender.parameter for offender in caught.value.offenders) == sorted(other.names)
    # Followed to the letter, the way out works.
    plan_export(model, directory, unchecked_settings=other.names)


FREE = (
    _of(
        "qwen3_moe", moe_token_dispatcher_type="allgather", moe_router_dtype="fp64", moe_router_topk_scaling_factor=1.0
    ),
    _of("qwen3_moe", moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"], moe_aux_loss_coeff=[0.01, 0.02]),
    _of("qwen3_moe", moe_z_loss_coeff=0.1, moe_input_jitter_eps=0.1, moe_expert_capacity_factor=1.5),
    _of(
        "qwen3_moe",
        hidden_dropout=0.1,
        attention_dropout=0.1,
        recompute_granularity="full",
        recompute_method="block",
        recompute_num_layers=1,
    ),
    _of(
        "qwen3_moe", softmax_scale=48**-0.5, window_size=(-1, -1), no_rope_freq=[0, 0, 0], fp32_residual_connection=True
    ),
    _of("qwen3_moe", init_method_std=0.5, attention_softmax_in_fp32=False),
    _of("mixtral", moe_layer_freq=1, moe_router_num_groups=3, moe_router_group_topk=3),
    # A window of 3 tokens before its own; whatever it says of those behind, the mask hides them.
    _of("gpt_oss", window_size=(2, 5), window_attn_skip_freq=2),
    # Sigmoid scores have no softmax to be taken before or after.
    _of("deepseek_v3", moe_router_pre_softmax=True, moe_router_bias_update_rate=0.0),
    # Attention over latents turns by embeddings of its own.
    Other("deepseek_v2", (), model={"position_embedding_type": "none"}),
    # YaRN by a factor of 1 is what the config says without it.
    _of("deepseek_v2", rope_type="yarn", rotary_scaling_factor=1.0),
    # Those of the family, in another spelling: a list of layers, and a function in another file of Megatron's.
    Other("qwen3_moe", (), {"normalization": "RMSNorm"}, {"rotary_base": 1e4}),
)


@pytest.mark.parametrize("other", FREE, ids=lambda other: f"{other.family}-{'-'.join(other.transformer)}")
def test_what_makes_no_other_model_is_let_through(other: Other, config: Config) -> None:
    plan_export(other.made(config(other.family)), config(other.family))


def test_a_model_built_by_hand_is_let_through(config: Config) -> None:
    said = json.loads((config("gpt_oss") / "config.json").read_text())
    settings = TransformerConfig(
        num_layers=3,
        hidden_size=160,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=48,
        ffn_hidden_size=96,
        normalization="RMSNorm",
        layernorm_epsilon=said["rms_norm_eps"],
        gated_linear_unit=True,
        activation_func=quick_gelu,
        activation_func_clamp_value=7.0,
        glu_linear_offset=1.0,
        softmax_type="learnable",
        window_size=(2, 0),
        window_attn_skip_freq=2,
        num_moe_experts=8,
        moe_router_topk=2,
        moe_grouped_gemm=True,
        moe_token_dispatcher_type="allgather",
        use_cpu_initialization=True,
    )
    rotary = said["rope_parameters"]
    for name, value in {**YARN, "yarn_rotary_scaling_factor": rotary["factor"]}.items():
        setattr(settings, name, value)
    with cpu.construction():
        model = GPTModel(
            settings,
            get_gpt_decoder_block_spec(settings, use_transformer_engine=True),
            vocab_size=640,
            max_sequence_length=128,
            position_embedding_type="yarn",
            rotary_base=rotary["rope_theta"],
        )
    plan_export(model, config("gpt_oss"))


def test_the_models_value_and_the_configs_are_said(config: Config, tmp_path: Path) -> None:
    other = Other("gpt_oss", (), {"moe_router_topk": 4, "window_size": (5, 0)}, {"rotary_base": 500_000})
    with refused(MappingError, tmp_path) as caught:
        plan_export(other.made(config("gpt_oss")), config("gpt_oss"))
    reasons = {offender.parameter: offender.reason for offender in caught.value.offenders}
    assert reasons["moe_router_topk"] == "is 4 in the model, 2 by the config"
    assert reasons["window_size"] == "is 5 in the model, 2 by the config in layers 0, 2"
    assert "frequency" in reasons["rope_scaling"]


def test_a_stream_asks_the_same(config: Config, tmp_path: Path) -> None:
    model = OTHERS[0].made(config("qwen3_moe"))
    with refused(MappingError, tmp_path) as caught:
        plan_stream(model, config("qwen3_moe"), quant_format="w4a16_nvfp4")
    assert [offender.parameter for offender in caught.value.offenders] == ["moe_router_topk"]
    plan_stream(model, config("qwen3_moe"), quant_format="w4a16_nvfp4", unchecked_settings=["moe_router_topk"])


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen2_tied", False)])
def test_tied_against_untied_names_the_setting(family: str, tied: bool, config: Config, tmp_path: Path) -> None:
    other = Other(family, (), model={"share_embeddings_and_output_weights": tied})
    with refused(MappingError, tmp_path) as caught:
        plan_export(other.made(config(family)), config(family))
    (offender,) = caught.value.offenders
    assert offender.parameter == "tie_word_embeddings"
    assert offender.reason == f"is {tied} in the model, {not tied} by the config"


def _edited(directory: Path, target: Path, **changes: Any) -> Path:
    said = json.loads((directory / "config.json").read_text())
    target.mkdir()
    (target / "config.json").write_text(json.dumps({**said, **changes}))
    return target


def test_settings_that_are_not_converted_are_named_first(config: Config, tmp_path: Path) -> None:
    """Nobody can hold a model against them, so that the user must answer for them; all others are still held."""
    directory = _edited(
        config("qwen3"),
        tmp_path / "hf",
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        hidden_act="gelu",
    )
    named = Other("qwen3", (), model={"seq_len_interpolation_factor": 4.0}).made(config("qwen3"))
    with refused(UnsupportedModelError, tmp_path) as caught:
        plan_export(named, directory)
    answered_for = [offender.parameter for offender in caught.value.offenders]
    assert answered_for == ["rope_type", "hidden_act"]
    with refused(MappingError, tmp_path) as caught:
        plan_export(named, directory, unchecked_settings=answered_for)
    assert [offender.parameter for offender in caught.value.offenders] == ["rope_scaling"]
    plan_export(named, directory, unchecked_settings=[*answered_for, "rope_scaling"])

    other = _of("qwen3", layernorm_epsilon=1e-2).made(config("qwen3"))
    with refused(MappingError, tmp_path) as caught:
        plan_export(other, directory, unchecked_settings=[*answered_for, "rope_scaling"])
    assert [offender.parameter for offender in caught.value.offenders] == ["layernorm_epsilon"]
