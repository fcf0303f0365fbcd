"""Which layers of a HybridModel each pipeline stage has, and what cannot be laid out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from quantplug.errors import TopologyError
from quantplug.mappings.table import ModelKind
from quantplug.megatron import cpu
from quantplug.megatron.models.build import build_model, check_divisible, transformer_config
from quantplug.megatron.models.pipeline_layout import decoder_layers_of_stages
from quantplug.topology import ParallelTopology
from tests.families.cases import CASES
from tests.megatron.hybrid import hybrid_config, needs_hybrid_model


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of three layers, and one of multi-token prediction."""
    directory = tmp_path_factory.mktemp("glm")
    case = CASES["glm4_moe"]
    said = case.config.to_dict() | {"architectures": [case.model.__name__]}
    (directory / "config.json").write_text(json.dumps(said))
    return directory


@pytest.mark.parametrize(
    ("pp", "virtual_stages", "layout", "layers"),
    [
        (1, None, None, [3]),
        (3, None, None, [1, 1, 1]),
        (2, None, "Et|ttmL", [1, 2]),
        (3, None, "E||tttmL", [0, 0, 3]),
        # Megatron gives the first virtual stages of all ranks the first layers.
        (2, 2, "E|tt|t|mL", [0, 2, 1, 0]),
    ],
)
def test_stages_have_the_layers_of_the_gpt_model(
    pp: int, virtual_stages: int | None, layout: str | None, layers: list[int], glm: Path
) -> None:
    settings = {
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": virtual_stages,
        "pipeline_model_parallel_layout": layout,
        "pipeline_dtype": "bf16",
    }
    with cpu.construction():
        config = transformer_config(replace(hybrid_config(glm), kind=ModelKind.GPT), **settings)
    assert decoder_layers_of_stages(config) == layers


def test_multi_token_prediction_is_on_the_last_stage(glm: Path) -> None:
    topology, layout = ParallelTopology(rank=0, pp=4), "E|ttt|m|L"
    check_divisible(replace(hybrid_config(glm), kind=ModelKind.GPT), topology, pipeline_layout=layout)

    with pytest.raises(TopologyError) as caught:
        check_divisible(hybrid_config(glm), topology, pipeline_layout=layout)

    (offender,) = caught.value.offenders
    assert offender.parameter == "pipeline_layout"
    assert "last stage of a HybridModel" in offender.reason
    check_divisible(hybrid_config(glm), topology, pipeline_layout="E|ttt||mL")


@needs_hybrid_model
@pytest.mark.usefixtures("single_rank")
def test_the_pattern_is_megatrons(glm: Path) -> None:
    model = build_model(hybrid_config(glm))

    assert model.hybrid_layer_pattern == "*-*E*E/*E"
    assert (model.config.num_layers, model.mtp_num_depths) == (6, 1)
