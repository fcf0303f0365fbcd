"""What a trainer saved on several ranks is the Hugging Face model that it began with, at any other layout."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from quantplug import export_checkpoint, quantize_checkpoint
from tests.distributed.test_export_topologies import assert_same_tensors
from tests.families.cases import CASES, save
from tests.made_once import MadeOnce
from tests.ranks import Ended, run_ranks

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def sources(made_once: MadeOnce, request: pytest.FixtureRequest) -> dict[str, Path]:
    def make_deepseek(directory: Path) -> Path:
        case = CASES["deepseek_v3"]
        config = deepcopy(case.config)
        config.num_hidden_layers = 4  # Two for each of two pipeline stages, and multi-token prediction behind them.
        return save(replace(case, config=config), directory)

    return {
        "qwen3_moe": request.getfixturevalue("tiny_qwen3_moe_dir"),
        "qwen3_mixed": request.getfixturevalue("tiny_qwen3_mixed_dir"),
        "deepseek_v3": made_once("deepseek_v3_of_4_layers", make_deepseek),
    }


@pytest.fixture(scope="module")
def trained(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    directory = tmp_path_factory.mktemp("trained")
    return directory, run_ranks(
        2, HERE / "trained_worker.py", directory, *(f"{it[0]}={it[1]}" for it in sources.items())
    )


def test_it_loads_at_every_layout_to_the_weights_of_the_source(trained: tuple[Path, Ended]) -> None:
    _, run = trained
    assert run.ok, run.output[-9000:]
    assert run.output.count(" ok\n") == 2 * 3 + 1 * 5 + 2 * 3


def test_the_export_takes_it_as_it_is(trained: tuple[Path, Ended], sources: dict[str, Path], tmp_path: Path) -> None:
    """As a trainer left it, not quantized: the bytes of the source."""
    name = "qwen3_mixed"
    about = ("--hf-model-id", sources[name], "--megatron-load-path", trained[0] / name / "vpp2")
    exported = run_ranks(2, EXAMPLES / "export.py", *about, "--export-dir", tmp_path / "out", "--tp", "2")
    assert exported.ok, exported.output[-9000:]
    assert_same_tensors(tmp_path / "out", sources[name])


@pytest.mark.parametrize(
    ("name", "label", "quantized_at", "exported_at"),
    [
        ("qwen3_moe", "pp2", ("--tp", "2", "--ep", "2"), ("--ep", "2")),
        ("deepseek_v3", "tp2ep2", ("--pp", "2", "--ep", "2"), ("--tp", "2")),
    ],
)
def test_the_examples_take_it_to_the_bytes_of_the_source(
    name: str,
    label: str,
    quantized_at: tuple[str, ...],
    exported_at: tuple[str, ...],
    trained: tuple[Path, Ended],
    sources: dict[str, Path],
    tmp_path: Path,
) -> None:
    directory, _ = trained
    about = ("--hf-model-id", sources[name])
    chosen = ("--export-quant-cfg", "nvfp4", "--weight-only")
    loaded = ("--megatron-load-path", directory / name / label, "--iteration", "100")
    quantized = run_ranks(
        4, EXAMPLES / "quantize.py", *about, *loaded, "--megatron-save-path", tmp_path / "Q", *chosen, *quantized_at
    )
    assert quantized.ok, quantized.output[-9000:]
    assert "Left aside: optimizer" in quantized.output
    exported = run_ranks(
        2,
        EXAMPLES / "export.py",
        *about,
        "--megatron-load-path",
        tmp_path / "Q",
        "--export-dir",
        tmp_path / "out",
        *exported_at,
    )
    assert exported.ok, exported.output[-9000:]
    quantize_checkpoint(sources[name], tmp_path / "expected", "w4a16_nvfp4")
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")
    # And straight from both checkpoints, without a model: what the trainer left, and what the example quantized.
    export_checkpoint(directory / name / label, tmp_path / "straight", sources[name], "w4a16_nvfp4")
    export_checkpoint(tmp_path / "Q", tmp_path / "as_quantized", sources[name])
    assert_same_tensors(tmp_path / "straight", tmp_path / "expected")
    assert_same_tensors(tmp_path / "as_quantized", tmp_path / "expected")
