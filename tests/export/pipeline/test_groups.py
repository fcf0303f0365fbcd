"""Amaxes of single groups, of which no scale is made: where they are not the weights' own it is said."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modelopt.torch.quantization.utils import reduce_block_amax

from quantplug import (
    export_checkpoint,
    export_hf_weights_quant,
    export_mcore_gpt_to_hf,
    load_checkpoint,
    quantize_checkpoint,
    save_checkpoint,
)
from quantplug.errors import CalibrationError
from quantplug.export.pipeline.groups import amaxes_of_blocks, amaxes_of_rows, problem_of_groups, problem_of_shared
from tests.export.checkpoints import assert_same_export, load, quantize, read, same_bytes
from tests.export.refusals import FC1, offenders, refused

pytestmark = pytest.mark.usefixtures("single_rank")

Sources = Callable[[str], Path]
O_PROJ = "decoder.layers.0.self_attention.linear_proj"
EXPERT = f"{FC1}.weight_quantizer.1"


@pytest.fixture
def source(sources: Sources) -> Path:
    return sources("moe_blocks")


@pytest.fixture(params=["int4", "fp8_blockwise", "fp8_dynamic"])
def format_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(source: Path, format_name: str) -> torch.nn.Module:
    return quantize(load(source), format_name)


def clipped(model: torch.nn.Module) -> None:
    """As by an algorithm that looks for a better range: some groups of one expert, all of one linear."""
    quantizer = model.get_submodule(EXPERT)
    quantizer.amax.view(-1)[:3] *= 0.9
    model.get_submodule(f"{O_PROJ}.weight_quantizer").amax.mul_(0.95)


CLIPPED = {(f"{O_PROJ}.weight", None), (f"{FC1}.weight1", 1)}


def test_every_way_refuses_them_by_name_and_takes_the_remedy(
    model: torch.nn.Module, format_name: str, source: Path, tmp_path: Path
) -> None:
    quantize_checkpoint(source, tmp_path / "direct", format_name)
    clipped(model)
    save_checkpoint(model, tmp_path / "saved", extra={})
    with refused(CalibrationError, tmp_path) as live:
        export_mcore_gpt_to_hf(model, source, tmp_path / "live")
    with refused(CalibrationError, tmp_path) as saved:
        export_checkpoint(tmp_path / "saved", tmp_path / "out", source)
    with pytest.raises(CalibrationError) as streamed:
        list(export_hf_weights_quant(model, source, quant_format="as_quantized"))
    assert offenders(live) == offenders(saved) == offenders(streamed) == CLIPPED
    groups = model.get_submodule(EXPERT).amax.numel()
    assert f"its quantizer holds other amaxes than its {groups} groups have" in str(live.value)
    # An algorithm's range is not taken by clipping either: no scale is made of it.
    with refused(CalibrationError, tmp_path):
        export_mcore_gpt_to_hf(model, source, tmp_path / "clipped", amax="clip")
    export_mcore_gpt_to_hf(model, source, tmp_path / "refreshed", amax="refresh")
    assert_same_export(tmp_path / "refreshed", tmp_path / "direct")
    export_checkpoint(tmp_path / "saved", tmp_path / "anew", source, amax="refresh")
    assert_same_export(tmp_path / "anew", tmp_path / "direct")
    # A format by name asks no quantizer.
    export_checkpoint(tmp_path / "saved", tmp_path / "named", source, format_name)
    assert_same_export(tmp_path / "named", tmp_path / "direct")
    named = dict(export_hf_weights_quant(model, source, quant_format=format_name))
    assert [name for name, tensor in read(tmp_path / "direct").items() if not same_bytes(named[name], tensor)] == []


def test_weights_that_have_changed_since_are_refused_too(model: torch.nn.Module, source: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        model.get_submodule(FC1).weight1.mul_(0.5)
    with refused(CalibrationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, source, tmp_path / "out")
    assert offenders(caught) == {(f"{FC1}.weight1", 1)}


def test_a_calibrated_model_is_exported_alike_in_every_way(
    model: torch.nn.Module, format_name: str, source: Path, tmp_path: Path
) -> None:
    quantize_checkpoint(source, tmp_path / "direct", format_name)
    export_mcore_gpt_to_hf(model, source, tmp_path / "live")
    save_checkpoint(model, tmp_path / "saved", extra={})
    export_checkpoint(tmp_path / "saved", tmp_path / "out", source)
    again = load(source)
    load_checkpoint(again, tmp_path / "saved")
    export_mcore_gpt_to_hf(again, source, tmp_path / "again")
    for way in ("live", "out", "again"):
        assert_same_export(tmp_path / way, tmp_path / "direct")
    streamed = dict(export_hf_weights_quant(model, source, quant_format="as_quantized"))
    direct = read(tmp_path / "direct")
    assert streamed.keys() == direct.keys()
    assert [name for name, tensor in direct.items() if not same_bytes(streamed[name], tensor)] == []


def test_rounding_is_no_change(sources: Sources, tmp_path: Path) -> None:
    """A model that was calibrated in FP32 and rounded to BF16 afterwards."""
    model = quantize(load(sources("moe_blocks"), dtype=torch.float32), "int4").bfloat16()
    export_mcore_gpt_to_hf(model, sources("moe_blocks"), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


@given(rows=st.integers(1, 4), columns=st.integers(1, 300), size=st.sampled_from([32, 128]), seed=st.integers(0, 99))
def test_amaxes_of_groups_are_modelopts(rows: int, columns: int, size: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    padded = torch.nn.functional.pad(weight, (0, -columns % size))
    assert torch.equal(amaxes_of_rows(weight, size).flatten(), reduce_block_amax(padded, {-1: size}).flatten())
    assert torch.equal(amaxes_of_rows(weight, None), weight.abs().amax(1, keepdim=True))


@given(rows=st.integers(1, 9), columns=st.integers(1, 12), side=st.sampled_from([4, 5]), seed=st.integers(0, 99))
def test_amaxes_of_blocks_are_modelopts_whatever_the_order_of_the_rows(
    rows: int, columns: int, side: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    weight, numbers = torch.randn(rows, columns, generator=random).bfloat16(), torch.randperm(rows, generator=random)
    padded = torch.nn.functional.pad(weight, (0, -columns % side, 0, -rows % side))
    found = amaxes_of_blocks(amaxes_of_rows(weight[numbers], side), numbers, side)
    assert torch.equal(found.flatten(), reduce_block_amax(padded, {-2: side, -1: side}).flatten())


def test_rows_on_several_ranks_have_amaxes_of_their_own_at_least() -> None:
    own = torch.linspace(1, 2, 40)
    assert problem_of_shared(own * 1.5, own) is None
    assert problem_of_shared(own.bfloat16(), own) is None
    held = own.clone()
    held[7] *= 0.9
    assert problem_of_shared(held, own) == "its quantizer holds smaller amaxes than its 40 rows have"
    assert problem_of_shared(held[:9], own) == "its quantizer has 9 amaxes, the weight 40 rows"


@given(st.permutations(range(400)), st.sampled_from([1 - 2**-7, 1 + 2**-7, 0.0, 2.0]), st.integers(0, 399))
def test_the_order_is_of_no_matter_and_one_difference_is(order: list[int], factor: float, changed: int) -> None:
    """Also among so many that others are beside it."""
    own = torch.linspace(1, 2, 400).bfloat16()
    held = own.float()[order]
    assert problem_of_groups(held, own) is None
    held[changed] *= factor
    assert problem_of_groups(held, own) is not None
    assert problem_of_groups(held[1:], own) == "its quantizer has 399 amaxes, the weight 400 groups"


WIDE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
# Calibrated in, now in, and its amaxes kept in: no two roundings, to one 16-bit type and then to the other.
ROUNDED = [(WIDE, WIDE, WIDE), (WIDE, WIDE, BRAIN), (WIDE, BRAIN, WIDE), (WIDE, BRAIN, BRAIN), (WIDE, HALF, WIDE),
           (BRAIN, WIDE, WIDE), (BRAIN, BRAIN, BRAIN), (HALF, WIDE, WIDE), (HALF, HALF, WIDE)]  # fmt: skip


@pytest.mark.parametrize(("calibrated", "now", "kept"), ROUNDED)
def test_no_rounding_is_a_difference(calibrated: torch.dtype, now: torch.dtype, kept: torch.dtype) -> None:
    """Of the weights, before or after, and of the amaxes that are kept."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(7)).to(calibrated)
    held = amaxes_of_rows(weight, 32).to(kept)
    assert problem_of_groups(held, amaxes_of_rows(weight.to(now), 32)) is None
