"""Models that are refused by name, by all ranks with the same words and before any work."""

from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest

import quantplug
from quantplug import quant_cfg
from tests.distributed.unserved_worker import CASES, FORMAT
from tests.export.checkpoints import read, same_bytes
from tests.ranks import run_ranks

WORKER = Path(__file__).with_name("unserved_worker.py")
EXAMPLES = Path(__file__).parents[2] / "examples"
SHARDED = ["UnsupportedModelError: Weights that FSDP has cut into shards", "model[0]: ", "fully_shard", "unshard()"]
SAID = {
    "half_a_model": [
        "UnsupportedQuantizationError: Layers have no quantizers, and others of the model have.",
        "decoder.layers.2.self_attention.linear_qkv.weight on rank 0: no quantizer, as all of model[1]",
        "decoder.layers.3.mlp.experts.linear_fc1.weight* on rank 1: no quantizer, as all of model[1]",
        "for chunk in model: mtq.quantize(chunk, config)",
    ],
    "one_stage": ["decoder.layers.2.mlp.experts.linear_fc2.weight* on rank 1: no quantizer, as all of model[0]"],
    "experts_one_by_one": ["UnsupportedModelError", "moe_grouped_gemm: experts one by one (SequentialMLP)"],
    "a_stage_without_experts": ["UnsupportedModelError", "GPTModel: moe_mlp_glu_interleave_size: gate and up rows"],
    "a_layer_by_number": [
        "MappingError",
        "*decoder.layers.0.*",
        "decoder.layers.2.",
        "decoder.layers.0.",
        "layer_number",
    ],
    "a_layer_by_its_own_number": ["no error"],
    "sharded_before": SHARDED,
    "sharded_at_calibration": SHARDED,
    "sharded_at_save": SHARDED,
    "sharded_at_export": SHARDED,
    "no_config": ["SourceError", "source-1", "config.json", "on rank 1"],
}

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def output(tiny_qwen3_mixed_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unserved")
    ended = run_ranks(2, WORKER, tiny_qwen3_mixed_dir, directory)
    assert ended.ok, ended.output[-9000:]
    return directory


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_on_all_ranks_by_name(case: str, output: Path) -> None:
    first, second = ((output / f"{case}-{rank}.txt").read_text() for rank in range(2))
    assert first == second
    assert [words for words in SAID[case] if words not in first] == []
    assert not (output / "saved").exists()


@pytest.mark.usefixtures("single_rank")
def test_a_model_that_was_gathered_is_exported(output: Path, tiny_qwen3_mixed_dir: Path, tmp_path: Path) -> None:
    source = tiny_qwen3_mixed_dir
    model = mtq.quantize(quantplug.build_model(source, import_weights=True), quant_cfg(FORMAT, source))
    quantplug.export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "one")

    got, wanted = read(output / "gathered"), read(tmp_path / "one")
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not same_bytes(got[name], wanted[name])] == []


@pytest.mark.parametrize(
    ("example", "arguments", "reason"),
    [
        ("quantize", ("--weight-only", "--megatron-save-path", "saved"), "hf"),
        ("quantize", ("--weight-only", "--megatron-save-path", "taken"), "taken on rank 1: "),
        ("export", ("--megatron-load-path", "saved", "--export-dir", "out"), "hf"),
        ("export", ("--megatron-load-path", "saved", "--export-dir", "taken"), "taken on rank 1: "),
    ],
)
def test_an_example_ends_on_all_ranks_where_one_lacks_its_files(
    example: str, arguments: tuple[str, ...], reason: str, tiny_qwen3_dir: Path, tmp_path: Path
) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        if rank == 0 or "taken" in arguments:
            (tmp_path / str(rank) / "hf").symlink_to(tiny_qwen3_dir)
    (tmp_path / "1" / "taken").write_text("a file")

    script = EXAMPLES / f"{example}.py"
    ended = run_ranks(2, WORKER.with_name("apart_worker.py"), tmp_path, script, "--hf-model-id", "hf", *arguments)

    assert ended.statuses == (1, 1), ended.output[-9000:]
    assert "RankLostError" not in ended.output
    assert "on rank 1" in ended.output
    assert reason in ended.output
