"""AutoQuantize: what servers load alike gets one format, and what the search has found is exported."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.algorithms import AutoQuantizeKLDivSearcher, AutoQuantizeSearcher
from torch import nn

from quantplug import export_mcore_gpt_to_hf
from quantplug.megatron import cpu
from quantplug.megatron.models.build import LayerSpec
from quantplug.plugins import register
from quantplug.verify import verify_checkpoint
from tests.export.checkpoints import build, load

pytestmark = pytest.mark.usefixtures("single_rank")

Sources = Callable[[str], Path]


def group_of(searcher: type, model: nn.Module, name: str) -> str | None:
    """The group that ModelOpt's search puts a module into, as it asks its rules in turn."""
    search = searcher()
    search.model = model
    groups = (search._apply_quant_group_rule(name, rule) for rule in searcher.quant_grouping_rules)
    return next((group for group in groups if group is not None), None)


@pytest.mark.parametrize("searcher", [AutoQuantizeSearcher, AutoQuantizeKLDivSearcher])
def test_grouped_experts_and_the_two_down_projections_are_searched_together(searcher: type, sources: Sources) -> None:
    model = build(sources("latent_blocks"))
    names = [name for name, _ in model.named_modules()]
    experts = [name for name in names if name.endswith((".experts.linear_fc1", ".experts.linear_fc2"))]
    down = [name for name in names if name.endswith(("linear_q_down_proj", "linear_kv_down_proj"))]
    assert len(experts) >= 2
    assert len(down) >= 2
    for name in (*experts, *down):
        assert group_of(searcher, model, name) == name.rpartition(".")[0]
    others = [name for name in names if name.endswith(("linear_proj", ".mlp.linear_fc1", "shared_experts.linear_fc1"))]
    assert {group_of(searcher, model, name) for name in others} == {None}


def test_to_register_twice_changes_nothing() -> None:
    before = list(AutoQuantizeSearcher.quant_grouping_rules)
    register()
    assert AutoQuantizeSearcher.quant_grouping_rules == before


def test_what_a_search_has_found_is_exported(sources: Sources, tmp_path: Path) -> None:
    """NVFP4 and FP8 at 6 bits, by Megatron's own modules on a CPU."""
    source, later = sources("moe"), torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)

    def forward(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, torch.arange(8).expand_as(tokens), later)

    model = load(source, LayerSpec.LOCAL, dtype=torch.float32).eval()
    with cpu.local_forward():  # Around backward too, in which Megatron's router multiplies.
        model, state = mtq.auto_quantize(
            model,
            # Bits of what is searched: the vocabulary of so small a model would be most of it.
            constraints={"effective_bits": 6.0, "cost": {"excluded_module_name_patterns": ["*output_layer*"]}},
            quantization_formats=[mtq.NVFP4_DEFAULT_CFG, mtq.FP8_DEFAULT_CFG],
            # Enough tokens that every expert sees some.
            data_loader=[torch.arange(64).view(8, 8) * 7 % 500],
            forward_step=forward,
            loss_func=lambda logits, _: logits.float().square().sum(),
            disabled_layers=["*output_layer*", "*router*"],
            num_calib_steps=1,
            num_score_steps=1,
        )
    assert state["best"]["is_satisfied"]
    export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "MIXED_PRECISION"
    experts: dict[str, set[str]] = {}
    for module, layer in config["quantized_layers"].items():
        if ".experts." in module:
            experts.setdefault(re.sub(r"\.experts\..*", "", module), set()).add(layer["quant_algo"])
    assert [len(found) for found in experts.values()] == [1, 1]
    assert verify_checkpoint(tmp_path / "out").ok
    assert verify_checkpoint(tmp_path / "out", source).ok
