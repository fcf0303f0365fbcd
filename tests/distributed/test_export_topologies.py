"""Real ranks: the same tensors at any topology, and one error on all ranks wherever it began."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantplug import export_mcore_gpt_to_hf, save_checkpoint
from quantplug.verify import Severity, verify_checkpoint
from tests.distributed.export_worker import STATIC, quantized_model
from tests.ranks import run_ranks

WORKER = Path(__file__).with_name("export_worker.py")
RANKS = 4
# tp-ep-etp-pp on four ranks; what the sizes leave over is data parallel. TP 4 is more ranks than there are query
# groups, and with ETP 4 blocks straddle the slices of the experts.
# What one size cuts by itself is cut so in these too.
LAYOUTS = ["1-1-1-1", "2-2-1-1", "2-2-2-1", "1-2-1-2", "2-1-2-2", "4-1-4-1"]
# Four layers, of which one alone is dense: on one pipeline stage, or on one of two virtual stages a rank.
# Experts in one tensor, which several ranks write, and one rank or several each of them.
ONE_TENSOR = ["1-2-1-1", "2-2-1-1", "4-2-1-1", "2-2-2-1"]
PIPELINES = ["1-1-1-2", "1-1-1-2-2", "2-2-1-2-2"]

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_tensors(directory: Path, expected: Path) -> None:
    got, wanted = tensors(directory), tensors(expected)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(got[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize(
    ("name", "source", "layouts"),
    [
        ("w4a16_nvfp4", "tiny_qwen3_moe_dir", LAYOUTS),
        # With static scales of NVFP4 that one rank has found and saved; 4-1-4-1 would cut their blocks.
        ("fp8", "tiny_qwen3_moe_dir", ["static/2-2-2-1", "static/1-2-1-2", "2-1-2-2", "4-1-4-1"]),
        # With INT4 of the same model; at 4-1-4-1 its groups straddle the slices.
        (
            "fp8_blockwise",
            "divisible_dir",
            ["int4/2-2-2-1", "int4/4-1-4-1", "2-2-1-1", "2-1-2-2", "1-4-1-1", "4-1-4-1"],
        ),
        # Rows of o_proj and down_proj are cut by TP and ETP, and each has one scale: of the whole row.
        # NVFP4 experts beside FP8 attention are written by the same ranks.
        ("fp8_dynamic", "tiny_qwen3_moe_dir", ["mixed/2-2-1-1", "2-2-2-1", "4-1-4-1"]),
        ("mxfp8", "tiny_llama4_dir", ["2-2-1-1"]),
        ("w4a16_nvfp4", "tiny_qwen3_mixed_dir", PIPELINES),
        ("w4a16_nvfp4", "tiny_llama4_with_vision_dir", ONE_TENSOR),
    ],
)
def test_every_topology_writes_the_same_tensors(name, source, layouts, tmp_path, request):
    source = request.getfixturevalue(source)
    for directory in dict.fromkeys((tmp_path / layout).parent for layout in layouts):
        directory.mkdir(exist_ok=True)
        model = quantized_model(source, name if directory == tmp_path else directory.name)
        export_mcore_gpt_to_hf(model, source, export_dir=directory / "one")
        if directory.name == STATIC:
            save_checkpoint(model, directory / "saved", extra={})
    ranks = run_ranks(RANKS, WORKER, "layouts", source, tmp_path, name, *layouts)
    assert ranks.ok, ranks.output[-9000:]
    for layout in layouts:
        one = (tmp_path / layout).with_name("one")
        assert_same_tensors(tmp_path / layout, one)
        assert not verify_checkpoint(tmp_path / layout, source).checks(Severity.ERROR)
        config = (tmp_path / layout / "config.json").read_bytes()
        assert config == (one / "config.json").read_bytes()
    # Every rank writes a part: nobody carries it all.
    assert len(list((tmp_path / layouts[-1]).glob("*.safetensors"))) >= RANKS


FAULTS = {
    "nan": (2, ["WeightError", "linear_fc1.weight", "1 NaN", "on rank 2"]),
    "grown": (2, ["CalibrationError", "linear_fc1.weight", "its quantizer's amax is", "on rank 2"]),
    "missing": (3, ["MappingError", "linear_fc2.weight"]),
    "uncalibrated": (1, ["CalibrationError", "has no amax"]),
    "diverged": (2, ["WeightError", "layers.0.self_attention.q_layernorm.weight", "on rank 2"]),
    "arguments": (1, ["TopologyError", "plan on rank 1"]),
    "apart": (2, ["DestinationError", "there/new/apart on rank 2", "is not the directory of rank 0"]),
    "unforeseen": (3, ["UnforeseenError", "LookupError on rank 3: a bug"]),
    "disk": (3, ["WriteError", "No space left on device", "on rank 3"]),
    "killed": (2, ["RankLostError", "process on rank 2"]),  # Last: the ranks are fewer after it.
}


@pytest.fixture(scope="module")
def messages(tiny_qwen3_moe_dir, tmp_path_factory) -> Path:
    """What every rank noted of each fault, and what the exports left."""
    output = tmp_path_factory.mktemp("faults")
    faults = [f"{kind}:{rank}" for kind, (rank, _) in FAULTS.items()]
    # Nothing but the ranks themselves ends them.
    run_ranks(RANKS, WORKER, "faults", tiny_qwen3_moe_dir, output, *faults, alone=True)
    return output


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_on_one_rank_ends_all_with_one_message(kind, messages):
    rank, says = FAULTS[kind]
    living = [number for number in range(RANKS) if not (kind == "killed" and number == rank)]
    noted = {(messages / f"{kind}-{number}.txt").read_text() for number in living}
    assert len(noted) == 1, noted
    (message,) = noted
    for words in says:
        assert words in message
    assert not (messages / kind).exists()
    assert not list(messages.glob("*here/*"))  # Where the ranks were that had two directories.
