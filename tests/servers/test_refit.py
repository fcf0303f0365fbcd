"""A server that is refitted: vLLM with the weights of before, given a stream, computes what a fresh load of it does."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from quantplug import build_model, export_mcore_gpt_to_hf, flattened_buckets, plan_stream, quantize_checkpoint
from tests.servers.cases import make_served
from tests.servers.test_vllm import PROMPTS, PYTHON, read_by_vllm

pytestmark = [
    pytest.mark.skipif(not PYTHON.exists(), reason="no environment of servers: make servers"),
    pytest.mark.usefixtures("single_rank"),
]


def test_a_stream_over_old_weights_is_a_fresh_load(tmp_path: Path) -> None:
    source = make_served("qwen3_moe", tmp_path / "source")
    model = build_model(source)
    plan = plan_stream(model, source, quant_format="w4a16_nvfp4")
    # What a step of training leaves: other weights, of which a server that was loaded before knows nothing.
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + 0.3 * torch.rand(parameter.shape, generator=generator)
    sent = [
        (
            bucket.flattened_tensor,
            bucket.names,
            bucket.shapes,
            [place.dtype for place in bucket.metadata],
            [place.numel for place in bucket.metadata],
        )
        for bucket in flattened_buckets(plan, 2**20)
    ]
    assert len(sent) > 3
    torch.save(sent, tmp_path / "buckets.pt")
    export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "trained")
    for name in ("source", "trained"):
        quantize_checkpoint(tmp_path / name, tmp_path / f"{name}-nvfp4", "w4a16_nvfp4")

    fresh = read_by_vllm(["source-nvfp4", "trained-nvfp4"], tmp_path)
    reader = Path(__file__).with_name("vllm_refit.py")
    arguments = [tmp_path / "prompts.json", tmp_path / "source-nvfp4", tmp_path / "buckets.pt"]
    ran = subprocess.run([PYTHON, reader, *arguments], capture_output=True, text=True, check=False)
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("READ ")] or pytest.fail(ran.stderr[-4000:])
    refitted = json.loads(line[5:])

    assert [name for name in refitted["unloaded"] if not name.endswith("input_scale")] == []
    assert len(refitted["logprobs"]) == len(PROMPTS)
    before, after, now = (
        torch.tensor(found["logprobs"]) for found in (fresh["source-nvfp4"], fresh["trained-nvfp4"], refitted)
    )
    assert (before - after).abs().max() > 0.01
    assert torch.equal(now, after)
