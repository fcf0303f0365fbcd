"""Bounded memory on real ranks: two buckets and the largest tensor, also where weights are larger than both buckets."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from quantplug import export_mcore_gpt_to_hf
from tests.distributed.memory_worker import BUCKET_BYTES
from tests.export.checkpoints import load, quantize, read, same_bytes
from tests.ranks import run_ranks

WORKER = Path(__file__).with_name("memory_worker.py")
RANKS = 2

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, of which most weights are larger than two buckets in BF16.

    Blocks of 16 straddle the slices of down_proj (8200 columns a rank), and the one query group those of q, k and v.
    """
    config = Qwen3Config(
        vocab_size=32001,
        hidden_size=1024,
        intermediate_size=16 * 1025,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=1,
        head_dim=64,
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
    )
    directory = tmp_path_factory.mktemp("large")
    torch.manual_seed(7)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def ranks(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks of tensor parallelism wrote an export, and what they noted of it and of a stream."""
    output = tmp_path_factory.mktemp("ranks")
    ended = run_ranks(RANKS, WORKER, source, output, "2-1-1-1")
    assert ended.ok, ended.output[-9000:]
    return output


def noted(output: Path, rank: int) -> dict[str, dict[str, int]]:
    return json.loads((output / f"2-1-1-1-{rank}.json").read_text())


@pytest.mark.parametrize("rank", range(RANKS))
def test_two_buckets_and_the_largest_tensor_bound_the_memory(rank: int, source: Path, ranks: Path) -> None:
    largest = max(tensor.nbytes for tensor in load_file(next(source.glob("*.safetensors"))).values())
    assert largest > 3 * BUCKET_BYTES
    peaks = noted(ranks, rank)["peaks"]
    # To a file not even the largest tensor is there as a whole.
    assert BUCKET_BYTES < peaks["export"] <= 2 * BUCKET_BYTES
    assert peaks["stream"] <= 2 * BUCKET_BYTES + largest


@pytest.mark.usefixtures("single_rank")
def test_pieces_make_the_same_tensors(source: Path, ranks: Path, tmp_path: Path) -> None:
    export_mcore_gpt_to_hf(quantize(load(source), "w4a16_nvfp4"), source, export_dir=tmp_path / "one")
    expected, got = read(tmp_path / "one"), read(ranks / "2-1-1-1")
    assert got.keys() == expected.keys()
    assert [name for name in expected if not same_bytes(got[name], expected[name])] == []
    sums = {name: int(tensor.reshape(-1).view(torch.uint8).sum(dtype=torch.int64)) for name, tensor in expected.items()}
    assert [noted(ranks, rank)["sums"] for rank in range(RANKS)] == [sums] * RANKS
