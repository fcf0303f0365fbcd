"""Stages and virtual stages with any number of layers, none too: the same bytes as on one rank, by every way."""

from dataclasses import replace
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest

import quantplug
from quantplug import calibration, quant_cfg
from quantplug.errors import TopologyError
from quantplug.megatron.models.pipeline_layout import layout_problem
from tests.distributed.pipeline_layout_worker import FORMAT
from tests.export.checkpoints import read, same_bytes
from tests.families.cases import CASES, save
from tests.ranks import run_ranks

WORKER = Path(__file__).with_name("pipeline_layout_worker.py")
UNEVEN = "num_layers_in_first_pipeline_stage=1"
# Six virtual stages of one each, the first and the last of which are the embedding and the output layer.
ACCOUNTED = (
    "account_for_embedding_in_pipeline_split=1,account_for_loss_in_pipeline_split=1,"
    "virtual_pipeline_model_parallel_size=3"
)
# Of four layers, of which the second alone is dense.
LAYOUTS = ["E|ttttL", "Ett||tt|L", UNEVEN, ACCOUNTED, "Etttt|L"]
# Of two layers and one of multi-token prediction, on three ranks: on a stage by itself, on a virtual one, and beside L.
WITH_MTP = ["Ett|m|L", "E|t|t||m|L", "E|tt|mL"]


def assert_same(directory: Path, expected: Path) -> None:
    got, wanted = read(directory), read(expected)
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not same_bytes(got[name], wanted[name])] == []


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize(("ranks", "layouts"), [(2, LAYOUTS), (3, WITH_MTP)], ids=["decoder", "mtp"])
def test_the_same_bytes_in_every_layout_as_on_one_rank(
    ranks: int, layouts: list[str], tiny_qwen3_mixed_dir: Path, tmp_path: Path
) -> None:
    source = tiny_qwen3_mixed_dir
    if layouts is WITH_MTP:
        case = CASES["deepseek_v3"]
        config = type(case.config)(**{**case.config.to_dict(), "num_hidden_layers": 2})
        source = save(replace(case, config=config), tmp_path / "hf")
    model = mtq.quantize(quantplug.build_model(source, import_weights=True), quant_cfg(FORMAT, source))
    quantplug.export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "one")
    table = calibration.gather_statistics(model)

    ended = run_ranks(ranks, WORKER, source, tmp_path, *layouts)

    assert ended.ok, ended.output[-9000:]
    for number in range(len(layouts)):
        assert_same(tmp_path / f"out-{number}", tmp_path / "one")
        assert_same(tmp_path / f"stream-{number}", tmp_path / "one")
        assert calibration.CalibrationTable.load(tmp_path / f"table-{number}.json") == table
        if number:
            assert_same(tmp_path / f"loaded-{number}", tmp_path / "one")


@pytest.mark.distributed
@pytest.mark.usefixtures("single_rank")
def test_the_same_bytes_in_a_trainers_wrappers(tiny_qwen3_mixed_dir: Path, tmp_path: Path) -> None:
    source = tiny_qwen3_mixed_dir
    model = mtq.quantize(quantplug.build_model(source, import_weights=True), quant_cfg(FORMAT, source))
    quantplug.export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "one")

    ended = run_ranks(2, WORKER.with_name("wrapped_worker.py"), source, tmp_path)

    assert ended.ok, ended.output[-9000:]
    assert_same(tmp_path / "exported", tmp_path / "one")
    assert_same(tmp_path / "loaded", tmp_path / "one")


@pytest.mark.parametrize(
    ("layout", "virtual", "reason"),
    [
        ("E|tL", None, "Number of decoder layers 1must match num_layers 2"),
        ("Ett|L", 2, "has 2 stages, and there are 2 pipeline ranks of 2 virtual stages"),
        ("Ett|L|", None, "has 3 stages, and there are 2 pipeline ranks"),
        ("Etx|L", None, "Invalid layer character: x"),
        ("|EttL", None, "E must be on the first stage, and L on the last"),
        ("|", None, "has no layers"),
        ("Ett|mL", None, "Number of mtp layers"),
    ],
)
def test_a_layout_that_is_none_is_refused(layout: str, virtual: int | None, reason: str) -> None:
    assert reason in str(layout_problem(layout, 2, virtual, 2, None))


@pytest.mark.usefixtures("single_rank")
def test_a_layout_of_other_ranks_is_refused_by_name(tiny_qwen3_dir: Path) -> None:
    with pytest.raises(TopologyError, match=r"pipeline_layout: 'E\|ttL' has 2 stages, and there are 1 pipeline ranks"):
        quantplug.build_model(tiny_qwen3_dir, pipeline_layout="E|ttL")
