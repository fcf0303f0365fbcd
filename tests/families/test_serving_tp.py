"""What a plan says of tensor-parallel sizes is what the judge says of the files, and what follows by hand."""

from collections.abc import Callable
from pathlib import Path

import pytest

from quantplug import quantize_checkpoint, verify_checkpoint
from tests.export.checkpoints import read
from tests.servers.cases import make_served


@pytest.mark.parametrize(
    ("case", "format_name", "sizes", "against"),
    [
        # Six heads; experts of 128 columns are one block, of which two ranks would have half each.
        ("qwen3_moe", "fp8_blockwise", (1,), {"in_features of mlp.experts.down_proj"}),
        # Latents are not cut, but experts are.
        ("deepseek_v3", "fp8_blockwise", (1,), {"in_features of mlp.experts.down_proj"}),
        # 512 / 4 is a block, 6 heads / 4 is none.
        ("qwen2", "fp8_blockwise", (1,), {"out_features of self_attn.k_proj"}),
        ("qwen3_next", "mxfp8", (1, 2), set()),
        ("gpt_oss", "mxfp4", (1, 2), set()),
    ],
)
def test_a_plan_says_what_the_judge_says_of_the_files(
    case: str, format_name: str, sizes: tuple[int, ...], against: set[str], tmp_path: Path
) -> None:
    source, out = make_served(case, tmp_path / "source"), tmp_path / "out"

    planned = quantize_checkpoint(source, out, format_name, dry_run=True).serving_tp

    assert quantize_checkpoint(source, out, format_name).serving_tp == planned
    assert verify_checkpoint(out).serving_tp == planned
    assert planned.sizes == sizes
    assert against <= {limit.what for limit in planned.limits if 2 in limit.refused}
    assert any(limit.what == "attention heads" and 4 in limit.refused for limit in planned.limits)


def test_what_the_policy_keeps_by_itself_is_said(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Of gated attention and delta nets, whose inputs lose most; with the preset `all` nothing is left to say."""
    result = quantize_checkpoint(checkpoint("qwen3_next"), tmp_path / "out", "w4a16_nvfp4")
    everything = quantize_checkpoint(
        checkpoint("qwen3_next"), tmp_path / "all", "w4a16_nvfp4", preset="all", quantize_mtp=True
    )

    scales = [name for name in read(tmp_path / "out") if name.endswith(".weight_scale")]
    kept = [line for line in result.kept if "loses much in 4 bits" in line.why]
    assert len(kept) == 1
    assert "linear_attn.in_proj_qkvz" in kept[0].kinds
    assert scales
    assert not any(f".{kind}.weight_scale" in name for kind in kept[0].kinds for name in scales)
    assert "linear_attn.in_proj_qkvz" in str(kept[0])
    assert everything.kept == ()
