"""The stream on four real ranks: the tensors of one rank's export, on every receiver, or one error on all ranks."""

import json
from pathlib import Path

import pytest
import torch

from quantplug import export_mcore_gpt_to_hf, quantize_checkpoint
from tests.distributed.stream_worker import BLOCK, RECEIVERS
from tests.export.blockwise import blockwise_fp8
from tests.export.checkpoints import linear_weights, load, quantize, read, same_bytes
from tests.export.stream.test_fused import expected as of_each_expert
from tests.ranks import run_ranks

WORKER = Path(__file__).with_name("stream_worker.py")
RANKS = 4

pytestmark = pytest.mark.distributed


def run_worker(*arguments: object) -> None:
    ended = run_ranks(RANKS, WORKER, *arguments)
    assert ended.ok, ended.output[-9000:]


def assert_same_tensors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in expected if not same_bytes(got[name], expected[name])] == []


def expected_tensors(way: str, source: Path, directory: Path) -> dict[str, torch.Tensor]:
    """One rank's export to disk; for a function what it makes of whole Hugging Face weights."""
    if way == "function":
        weights = read(source)
        quantized = {name: blockwise_fp8(tensor, BLOCK) for name, tensor in linear_weights(weights).items()}
        scales = {f"{name}_scale_inv": scale for name, (_, scale) in quantized.items()}
        return {**weights, **{name: codes for name, (codes, _) in quantized.items()}, **scales}
    quant_format, _, found_scales = way.partition("-")
    if found_scales:
        quantize_checkpoint(source, directory, quant_format, scales=found_scales)
        return read(directory)
    export_mcore_gpt_to_hf(quantize(load(source), way, source), source, export_dir=directory)
    return read(directory)


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize(
    ("layout", "source", "ways"),
    [
        ("2-2-2-1", "tiny_qwen3_moe_dir", ["w4a16_nvfp4", "w4a16_nvfp4-mse", "w4a16_nvfp4-four_over_six", "function"]),
        ("2-1-1-2", "tiny_qwen3_moe_dir", ["w4a16_nvfp4", "function"]),
        ("2-1-1-2", "tiny_qwen3_dir", ["w8a16_fp8", "fp8_dynamic", "mxfp8"]),
        ("2-2-2-1", "divisible_dir", ["fp8_blockwise", "int4"]),
    ],
)
def test_receivers_get_what_one_rank_exports(
    layout: str, source: str, ways: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(source)
    run_worker(directory, tmp_path, layout, "streams", *ways)
    for way in ways:
        expected = expected_tensors(way, directory, tmp_path / way)
        for rank in range(RANKS):
            assert_same_tensors(torch.load(tmp_path / f"{way}-{rank}.pt"), expected)
            some = torch.load(tmp_path / f"{way}-some-{rank}.pt")
            assert_same_tensors(some, expected if rank in RECEIVERS else {})
        told = json.loads((tmp_path / f"{way}-0.json").read_text())
        # Three agreements, two reductions of amaxes; then one bucket: two agreements, TP, ETP, a broadcast an owner.
        assert sum(told["calls"].values()) <= 5 + 2 + 2 + RANKS < len(expected)
        assert "all_gather_object" not in told["calls"]
        if way == "function":
            # o_proj cuts at a block, 96 columns a rank; down_proj does not, 48 columns of an expert.
            assert not [name for name in told["first"] if "linear_proj" in name]
            assert (layout == "2-2-2-1") == any("linear_fc2" in name for name in told["first"])


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize(
    ("layout", "source", "ways"),
    [("2-2-1-1", "tiny_llama4_dir", ["w4a16_nvfp4"]), ("1-2-1-1", "tiny_gpt_oss_dir", ["function", "mxfp4"])],
)
def test_receivers_get_whole_tensors_of_all_experts(
    layout: str, source: str, ways: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(source)
    run_worker(directory, tmp_path, layout, "streams", *ways)
    for way in ways:
        if way == "function":
            expected = of_each_expert(blockwise_fp8, read(directory), BLOCK)
        else:
            expected = expected_tensors(way, directory, tmp_path / way)
        for rank in range(RANKS):
            assert_same_tensors(torch.load(tmp_path / f"{way}-{rank}.pt"), expected)
            assert_same_tensors(torch.load(tmp_path / f"{way}-some-{rank}.pt"), expected if rank in RECEIVERS else {})
        # A broadcast an owner for each tensor of all experts, for what lies between those of two layers, and the ends.
        calls = json.loads((tmp_path / f"{way}-0.json").read_text())["calls"]
        fused = [name for name in expected if ".experts." in name]
        assert calls["broadcast"] <= RANKS * (len([name for name in fused if expected[name].ndim > 1]) + 4) + len(fused)


def test_what_goes_wrong_on_one_rank_ends_all_with_one_message(tiny_qwen3_moe_dir: Path, tmp_path: Path) -> None:
    kinds = ["experts", "ranks", "argument", "receivers", "function", "nan"]
    run_worker(tiny_qwen3_moe_dir, tmp_path, "2-2-2-1", "faults", *kinds)
    ends = [json.loads((tmp_path / f"faults-{rank}.json").read_text()) for rank in range(RANKS)]
    assert all(end == ends[0] for end in ends)
    expected = {
        "experts": ("UnsupportedQuantizationError", ["weight3 (expert 3)", "yes for others of layer 1"]),
        "ranks": ("UnsupportedQuantizationError", ["linear_proj.weight on rank 3", "no on ranks [3]"]),
        "argument": ("ArgumentError", ["quant_format", "nvfp5"]),
        "receivers": ("TopologyError", ["stream on rank 1: differs from that of rank 0"]),
        "function": ("UnsupportedQuantizationError", ["raised ValueError", "out of luck"]),
        "nan": ("WeightError", ["linear_fc1.weight5 (expert 5)", "1 NaN; first at [3, 5]"]),
    }
    assert ends[0].keys() == expected.keys()
    for kind, (error, says) in expected.items():
        name, message, came = ends[0][kind]
        assert (name, came) == (error, 0), kind
        for words in says:
            assert words in message, message
