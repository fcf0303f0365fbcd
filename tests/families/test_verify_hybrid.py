"""What verify finds in damaged exports of Nemotron-H, without the source; and in configs of unknown origin."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantplug import export_mcore_gpt_to_hf, quantize_checkpoint
from quantplug.verify import verify_checkpoint
from quantplug.verify.checks import Check
from quantplug.verify.report import Severity
from tests.export.checkpoints import load, one_rank, read
from tests.families.cases import Tensors
from tests.families.served import errors_of
from tests.families.test_verify import Spoil, add, copy_of, cut, drop, told

Export = Callable[..., Path]
DENSE, MOE, LATENT = "nemotron_h", "nemotron_h_moe", "nemotron_h_latent"
MIXER = "backbone.layers.0.mixer"
EXPERTS = "backbone.layers.1.mixer.experts"


SPOILED: list[tuple[str, Spoil, str, str]] = [
    (DENSE, drop(f"{MIXER}.A_log"), "architecture", f"{MIXER}.A_log"),
    (DENSE, drop(f"{MIXER}.conv1d.bias"), "architecture", f"{MIXER}.conv1d.bias"),
    (DENSE, drop(".in_proj."), "architecture", f"{MIXER}.in_proj.weight"),
    (DENSE, drop("backbone.norm_f"), "architecture", "backbone.norm_f.weight"),
    (DENSE, drop("backbone.embedding"), "architecture", "backbone.embeddings.weight"),
    (DENSE, cut(f"{MIXER}.D"), "architecture", f"{MIXER}.D"),
    (DENSE, cut(f"{MIXER}.norm.weight"), "architecture", f"{MIXER}.norm.weight"),
    (DENSE, cut(f"{MIXER}.conv1d.weight"), "architecture", f"{MIXER}.conv1d.weight"),
    (MOE, cut("backbone.embeddings.weight"), "architecture", "backbone.embeddings.weight"),
    (DENSE, drop("backbone.layers.3."), "layers", "backbone.layers"),
    (MOE, drop(f"{EXPERTS}.5."), "experts", EXPERTS),
    (MOE, drop(f"{EXPERTS}."), "experts", "backbone.layers.1.mixer"),
    (MOE, cut("backbone.layers.1.mixer.gate.weight"), "architecture", "backbone.layers.1.mixer.gate.weight"),
    (MOE, drop("shared_experts.up"), "architecture", "backbone.layers.1.mixer.shared_experts.up_proj.weight"),
    (LATENT, drop("fc2_latent"), "architecture", f"{MIXER}.fc2_latent_proj.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "check", "subject"), SPOILED, ids=[f"{row[0]}-{row[3]}" for row in SPOILED])
def test_one_thing_spoiled_is_found(
    name: str, spoil: Spoil, check: str, subject: str, export: Export, tmp_path: Path
) -> None:
    assert (check, subject) in told(copy_of(export(name, "w4a16_nvfp4"), tmp_path / "spoiled", spoil))


@pytest.mark.parametrize("name", [DENSE, MOE, LATENT])
def test_nothing_but_what_servers_do_with_it_is_warned_of(name: str, export: Export) -> None:
    findings = verify_checkpoint(export(name, "w4a16_nvfp4")).findings
    assert {found.check for found in findings} <= {Check.SERVING_TP, Check.SGLANG}
    assert all(found.severity is not Severity.ERROR for found in findings)


def test_routers_and_head_are_excluded_by_their_whole_names(export: Export, tmp_path: Path) -> None:
    copy = copy_of(export(MOE, "w4a16_nvfp4"), tmp_path / "copy", lambda tensors: None)
    for file, path in (
        ("config.json", ("quantization_config", "ignore")),
        ("hf_quant_config.json", ("quantization", "exclude_modules")),
    ):
        config = json.loads((copy / file).read_text())
        config[path[0]][path[1]].remove("backbone.layers.3.mixer.gate")
        (copy / file).write_text(json.dumps(config))
    assert told(copy) == {("exclude-missing", "backbone.layers.3.mixer.gate")}


def test_up_and_down_projections_need_not_share_scales_but_q_k_and_v_do(export: Export, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["backbone.layers.2.mixer.k_proj.weight_scale_2"] *= 2
        tensors[f"{EXPERTS}.0.up_proj.weight_scale_2"] *= 2
        tensors[f"{MIXER}.in_proj.weight_scale_2"] *= 2

    assert told(copy_of(export(MOE, "w4a16_nvfp4"), tmp_path / "copy", spoil)) == {
        ("shared-scales", "backbone.layers.2.mixer")
    }


CONFIGS: list[tuple[dict[str, object], set[str]]] = [
    ({"layers_block_type": None}, {"layers_block_type / hybrid_override_pattern"}),
    ({"layers_block_type": 7}, {"layers_block_type"}),
    ({"layers_block_type": ["mamba", {}]}, {"layers_block_type"}),
    ({"layers_block_type": {"mamba": 1}}, {"layers_block_type"}),
    ({"hybrid_override_pattern": ["M"]}, {"hybrid_override_pattern"}),
    ({"hybrid_override_pattern": "M*ME"}, {"hybrid_override_pattern"}),
    ({"num_hidden_layers": 3}, {"num_hidden_layers"}),
    ({"num_hidden_layers": "4"}, {"num_hidden_layers"}),
    ({"mamba_num_heads": None, "ssm_state_size": [1]}, {"mamba_num_heads", "ssm_state_size"}),
    ({"n_groups": 0}, {"n_groups"}),
    ({"conv_kernel": "4", "head_dim": True}, {"conv_kernel", "head_dim"}),
    ({"n_routed_experts": None}, {"n_routed_experts"}),
    ({"moe_intermediate_size": "96"}, {"moe_intermediate_size"}),
    ({"moe_latent_size": 0}, {"moe_latent_size"}),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "named"), CONFIGS, ids=[", ".join(row[0]) for row in CONFIGS])
def test_a_setting_that_says_nothing_is_a_finding(
    changes: dict[str, object], named: set[str], export: Export, tmp_path: Path
) -> None:
    copy = copy_of(export(MOE, "w4a16_nvfp4"), tmp_path / "copy", lambda tensors: None)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    found = {subject.removeprefix("config.json ") for check, subject in told(copy) if check == "architecture"}
    assert found == named


def test_a_pattern_in_place_of_a_list_is_read(export: Export, tmp_path: Path) -> None:
    copy = copy_of(export(MOE, "w4a16_nvfp4"), tmp_path / "copy", lambda tensors: None)
    config = json.loads((copy / "config.json").read_text())
    del config["layers_block_type"]
    (copy / "config.json").write_text(json.dumps({**config, "hybrid_override_pattern": "ME*E"}))
    assert told(copy) == set()


def test_the_embedding_is_written_by_the_name_that_servers_look_for(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Whatever the source calls it: transformers 5.14 saves another name, and reads both."""

    def as_transformers_saves_it(tensors: Tensors) -> None:
        tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")

    def other(tensors: Tensors) -> None:
        tensors["backbone.embeddings.weight"] = tensors["backbone.embeddings.weight"].flip(0)

    source, out, live = (tmp_path / name for name in ("source", "out", "live"))
    copy_of(checkpoint(DENSE), source, as_transformers_saves_it)
    quantize_checkpoint(source, out, "w4a16_nvfp4")
    with one_rank():
        export_mcore_gpt_to_hf(load(source), source, live)
    for made in (out, live):
        (name,) = (name for name in read(made) if "embedding" in name)
        assert name == "backbone.embeddings.weight"
        assert torch.equal(read(made)[name], read(source)["backbone.embedding.weight"])
    assert "backbone.embeddings" in json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert errors_of(out, source) == set()
    assert errors_of(copy_of(out, tmp_path / "other", other), source) == {"source-values"}


def test_either_name_of_the_embedding_is_one(export: Export, tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> None:
        tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")

    copy = copy_of(export(MOE, "w4a16_nvfp4"), tmp_path / "copy", rename)
    for file in ("config.json", "hf_quant_config.json"):
        text = (copy / file).read_text().replace("backbone.embeddings", "backbone.embedding")
        (copy / file).write_text(text)
    assert told(copy) == set()
    # vLLM 0.32 stops at the name that transformers 5.14 saves: "no module or parameter named 'model.embedding'".
    amiss = {it.subject for it in verify_checkpoint(copy).findings if it.check is Check.NAMES}
    assert amiss == {"backbone.embedding.weight"}
    assert not [it for it in verify_checkpoint(export(MOE, "w4a16_nvfp4")).findings if it.check is Check.NAMES]
    both = copy_of(copy, tmp_path / "both", add("backbone.embeddings.weight"))
    assert ("architecture", "backbone.embeddings.weight") in told(both)
    short = copy_of(copy, tmp_path / "short", cut("backbone.embedding.weight"))
    assert ("architecture", "backbone.embedding.weight") in told(short)
