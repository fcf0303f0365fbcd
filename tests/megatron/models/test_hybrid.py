"""A MambaModel of either kind of modules: types, names, slices; and its norm in plain PyTorch against transformers'."""

from collections.abc import Callable

import pytest
import torch
from transformers import NemotronHConfig
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from quantplug.errors import TopologyError, UnsupportedModelError
from quantplug.mappings.families import find_family
from quantplug.megatron import cpu, parameters
from quantplug.megatron.models import build, hybrid_model
from quantplug.megatron.models.build import LayerSpec, build_model, check_divisible
from quantplug.megatron.models.mamba_reference import GatedGroupNorm
from quantplug.megatron.parameters import LanguageModel, iter_parameters
from quantplug.megatron.releases.installed import MEGATRON_CORE
from quantplug.topology import ParallelTopology, Shard, ShardAxis
from tests.families import hybrid_cases as hybrid

FAMILY = find_family("NemotronHForCausalLM")
CONFIG = hybrid.nemotron_h(["linear_attention", "mlp", "full_attention", "moe"], moe_latent_size=64)
MIXER = "decoder.layers.0.mixer"


def build_one(config: NemotronHConfig, layer_spec: LayerSpec = LayerSpec.TRANSFORMER_ENGINE) -> LanguageModel:
    return build_model(FAMILY.megatron_config(config.to_dict()), layer_spec=layer_spec)


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("layer_spec", LayerSpec, ids=["te", "local"])
def test_every_parameter_is_zero_of_its_type_and_in_the_table(layer_spec: LayerSpec) -> None:
    found = list(iter_parameters(build_one(CONFIG, layer_spec)))
    exact = {parameter.key.name for parameter in found if parameter.tensor.dtype is torch.float32}
    exact_in_mixer = {f"{MIXER}.{name}" for name in ("A_log", "D", "dt_bias")}
    assert exact == {*exact_in_mixer, "decoder.layers.3.mlp.router.expert_bias"}
    assert {parameter.tensor.dtype for parameter in found} == {torch.float32, torch.bfloat16}
    assert not any(parameter.tensor.any() for parameter in found)
    table, dims = FAMILY.by_megatron(), FAMILY.dimensions(CONFIG.to_dict())
    stand_for = [(table[it.key.module].hf_names(it.key, dims), it.key.expert) for it in found]
    assert sorted(stand_for) == sorted((names, key.expert) for names, key in FAMILY.expected(dims))


@pytest.mark.usefixtures("single_rank")
def test_what_tensor_parallelism_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_one(CONFIG)
    monkeypatch.setattr(parameters, "current_topology", lambda: ParallelTopology(rank=1, tp=2, tp_rank=1))
    shards = {parameter.key.name: parameter.shard for parameter in iter_parameters(model)}
    of_mixer = {
        name.removeprefix(f"{MIXER}."): shard for name, shard in shards.items() if shard and name.startswith(MIXER)
    }
    convolution = "conv1d." if MEGATRON_CORE < (0, 19) else "conv1d_"
    of_channels = (f"{convolution}weight", f"{convolution}bias", "A_log", "D", "dt_bias", "norm.weight")
    by_rows = ("in_proj.weight", *of_channels)
    rows, columns = (Shard(ShardAxis.TP, dim, 1, 2) for dim in (0, 1))
    assert of_mixer == {**dict.fromkeys(by_rows, rows), "out_proj.weight": columns}
    whole = {f"{MIXER}.in_proj.layer_norm_weight", "decoder.final_norm.weight"}
    whole |= {f"decoder.layers.3.mlp.{name}_latent_proj.weight" for name in ("fc1", "fc2")}
    assert {shards[name] for name in whole} == {None}


def test_heads_and_groups_of_mixers_divide_over_tensor_parallel_ranks() -> None:
    settings = FAMILY.megatron_config(CONFIG.to_dict())
    check_divisible(settings, ParallelTopology(rank=0, tp=2))
    with pytest.raises(TopologyError) as caught:
        check_divisible(settings, ParallelTopology(rank=0, tp=4))
    assert {offender.parameter for offender in caught.value.offenders} == {"mamba_num_heads", "mamba_num_groups"}


def test_virtual_stages_are_refused() -> None:
    with pytest.raises(TopologyError, match="virtual stages"):
        check_divisible(FAMILY.megatron_config(CONFIG.to_dict()), ParallelTopology(rank=0, pp=2), virtual_stages=2)


@pytest.mark.usefixtures("single_rank")
def test_without_the_package_of_the_kernels_a_gpu_has_no_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hybrid_model.mamba_mixer, "HAVE_MAMBA_SSM", False)
    monkeypatch.setattr(build.cpu, "construction", cpu.checkpointing)  # Answers nothing of the kind.
    with pytest.raises(UnsupportedModelError, match="mamba-ssm"):
        build_one(CONFIG)


def gated_norm(channels: int, group: int) -> Callable[..., torch.Tensor]:
    norm = GatedGroupNorm(
        channels, eps=1e-5, group_size=group, norm_before_gate=False, device="cpu", dtype=torch.float32
    )
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm


@pytest.mark.parametrize(("channels", "group"), [(240, 120), (24, 24), (12, 4)])
def test_the_gated_norm_is_that_of_transformers(channels: int, group: int) -> None:
    norm = gated_norm(channels, group)
    expected = Zamba2RMSNormGated(channels, group_size=group, eps=1e-5)
    expected.load_state_dict(norm.state_dict())
    x, gate = torch.randn(2, 5, channels), torch.randn(2, 5, channels)
    torch.testing.assert_close(norm(x, gate), expected(x, gate))
