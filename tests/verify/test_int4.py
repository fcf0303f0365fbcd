"""INT4 in groups: the checker's decoder, bounds and rules against compressed-tensors', and what it must find."""

import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.verify import Severity, verify_checkpoint
from quantplug.verify.checks import Check
from quantplug.verify.numbers import bounds
from quantplug.verify.numbers.decode import decode_int4
from quantplug.verify.source.measure import Meter, compiled_loops
from quantplug.verify.source.packed_rows import Int4Rows
from tests.verify.conftest import Surgery
from tests.verify.test_measure import drawn

DOWN = "model.layers.1.mlp.experts.2.down_proj"
O_PROJ = "model.layers.0.self_attn.o_proj"


def theirs(weight: torch.Tensor, group: int) -> Int4Rows:
    """Packed by compressed-tensors' own functions."""
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights.group_size = group
    groups = weight.float().unflatten(-1, (-1, group))
    scales = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)[0].bfloat16().float()
    packed = PackedQuantizationCompressor.compress({"weight": weight.float(), "weight_scale": scales}, scheme)
    return Int4Rows(packed["weight_packed"].view(torch.uint8), scales)


def test_every_code_is_theirs() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    scales = torch.tensor([[1.0, 0.5], [3.0, 2.0**-20]])
    integers = unpack_from_int32(codes.view(torch.int32), 4, torch.Size([2, 512]))
    assert torch.equal(pack_to_int32(integers, 4).view(torch.uint8), codes)
    assert torch.equal(decode_int4(codes, scales), integers.float() * scales.repeat_interleave(256, 1))


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([1.0, 1e-2, 1e-24, 1e30]),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 99),
    st.sampled_from([32, 128]),
)
def test_loops_and_torch_agree_and_rounding_is_within_the_bounds(
    magnitude: float, dtype: torch.dtype, rows: int, groups: int, seed: int, size: int
) -> None:
    weight = drawn(rows, size * groups, magnitude, seed).to(dtype)
    packed = theirs(weight, size)
    plain, loops = Meter(None).sums(packed, weight), Meter(compiled_loops()).sums(packed, weight)
    for field in fields(plain):
        ours, other = getattr(plain, field.name), getattr(loops, field.name)
        torch.testing.assert_close(torch.as_tensor(ours).double(), torch.as_tensor(other).double(), rtol=1e-6, atol=0)
    total = bounds.ErrorSum()
    total.add(plain)
    assert 0 < total.squared_error <= total.squared_bound * bounds.SLACK**2
    assert (total.beyond, total.broken_rows, total.lost) == (0, 0, 0)


@pytest.fixture(scope="module", params=[128, 32])
def export(request: pytest.FixtureRequest, pristine: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int4") / "out"
    quantize_checkpoint(pristine["source"], out, "int4", group_size=request.param)
    return out


@pytest.fixture
def opened(export: Path, tmp_path: Path) -> Surgery:
    return Surgery(Path(shutil.copytree(export, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors*"))))


def test_an_export_is_fine_with_and_without_its_source(export: Path, pristine: dict[str, Path]) -> None:
    for source in (None, pristine["source"]):
        report = verify_checkpoint(export, source)
        assert report.ok
        assert {finding.check for finding in report.findings} <= {Check.SERVING_TP}
    assert {error.format for error in report.errors_by_tensor} == {"INT4"}
    assert all(0.05 < error.relative_error < 0.15 for error in report.errors_by_tensor)


Spoil = Callable[[dict[str, torch.Tensor]], object]


def on_bytes(change: Callable[[torch.Tensor], torch.Tensor], module: str = DOWN) -> Spoil:
    """Of the bytes of a weight's codes."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        codes = tensors[f"{module}.weight_packed"]
        tensors[f"{module}.weight_packed"] = change(codes.view(torch.uint8).clone()).contiguous().view(torch.int32)

    return spoil


def on_scales(change: Callable[[torch.Tensor], torch.Tensor], module: str = DOWN) -> Spoil:
    name = f"{module}.weight_scale"
    return lambda tensors: tensors.update({name: change(tensors[name].clone()).contiguous()})


def first_row(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.cat([change(tensor[:1]), tensor[1:]])


def swapped(tensors: dict[str, torch.Tensor]) -> None:
    other = DOWN.replace("experts.2", "experts.1")
    for suffix in ("weight_packed", "weight_scale"):
        one, two = f"{DOWN}.{suffix}", f"{other}.{suffix}"
        tensors[one], tensors[two] = tensors[two], tensors[one]


# What is found beside the source.
CHANGED: dict[str, Spoil] = {
    "all codes are those of 0": on_bytes(lambda codes: codes * 0 + 0x88),
    "a row of codes is that of 0": on_bytes(first_row(lambda codes: codes * 0 + 0x88)),
    "codes are noise": on_bytes(lambda codes: torch.randint(0, 256, codes.shape, dtype=torch.uint8)),
    "codes have another offset": on_bytes(lambda codes: codes ^ 0x88),
    "the two codes of a byte change places": on_bytes(lambda codes: codes >> 4 | codes << 4),
    "the bytes of an integer change places": on_bytes(lambda codes: codes.view(-1, 4).flip(1).view_as(codes)),
    "rows of codes move by one": on_bytes(lambda codes: codes.roll(1, dims=0)),
    "every other code is lost": on_bytes(lambda codes: codes & 0x0F | 0x80),
    "scales move by one row": on_scales(lambda scales: scales.roll(1, dims=0)),
    "scales of a row doubled": on_scales(first_row(lambda scales: scales * 2)),
    "scales of 15/14, as of a range to 7": on_scales(lambda scales: scales.float() * 15 / 14),
    "scales 2 % too large": on_scales(lambda scales: scales.float() * 1.02),
    "scales 2 % too small": on_scales(lambda scales: scales.float() * 0.98),
    "scales of one": on_scales(torch.ones_like),
    "experts change places": swapped,
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_changes_what_is_computed_is_found(
    case: str, export: Path, opened: Surgery, pristine: dict[str, Path]
) -> None:
    opened.tensors = Surgery(export).tensors
    CHANGED[case](opened.tensors)
    opened.close()
    report = verify_checkpoint(opened.directory, pristine["source"])
    found = {finding.subject for finding in report.findings if finding.severity is Severity.ERROR}
    assert found
    assert all("down_proj" in subject for subject in found)


def shape_of(*sizes: int) -> Spoil:
    return lambda tensors: tensors.update({f"{DOWN}.weight_shape": torch.tensor(sizes)})


# What is found without the source: subject and check.
BROKEN: dict[str, tuple[Spoil, str, Check]] = {
    "a scale is zero": (on_scales(first_row(torch.zeros_like)), "weight_scale", Check.SCALE_RANGE),
    "a scale is negative": (on_scales(first_row(torch.neg)), "weight_scale", Check.SCALE_RANGE),
    "a scale is NaN": (on_scales(first_row(lambda scales: scales * torch.nan)), "weight_scale", Check.FINITE),
    "scales are lost": (lambda tensors: tensors.pop(f"{DOWN}.weight_scale"), "weight_scale", Check.TENSOR_LAYOUT),
    "scales of other groups": (on_scales(lambda scales: scales.repeat(1, 2)), "weight_scale", Check.TENSOR_LAYOUT),
    "scales in E4M3": (on_scales(lambda it: it.to(torch.float8_e4m3fn)), "weight_scale", Check.TENSOR_LAYOUT),
    "a shape of another weight": (shape_of(128, 64), "weight_shape", Check.TENSOR_LAYOUT),
    "a shape of one axis": (shape_of(128), "weight_shape", Check.TENSOR_LAYOUT),
    "a shape is lost": (lambda tensors: tensors.pop(f"{DOWN}.weight_shape"), "weight_shape", Check.TENSOR_LAYOUT),
    "codes are bytes": (
        lambda tensors: tensors.update({f"{DOWN}.weight_packed": tensors[f"{DOWN}.weight_packed"].view(torch.uint8)}),
        "weight_packed",
        Check.TENSOR_LAYOUT,
    ),
    "zero points of no use": (
        lambda tensors: tensors.update({f"{DOWN}.weight_zero_point": torch.zeros(128, 1, dtype=torch.int32)}),
        "weight_zero_point",
        Check.TENSOR_LAYOUT,
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_found_by_itself(case: str, export: Path, opened: Surgery) -> None:
    spoil, suffix, check = BROKEN[case]
    opened.tensors = Surgery(export).tensors
    spoil(opened.tensors)
    opened.close()
    report = verify_checkpoint(opened.directory)
    found = {(it.subject, it.check) for it in report.findings if it.severity is Severity.ERROR}
    assert (f"{DOWN}.{suffix}", check) in found


@pytest.mark.parametrize(
    "changed",
    [
        {"symmetric": False},
        {"num_bits": 8},
        {"strategy": "channel", "group_size": None},
        {"actorder": "group"},
        {"type": "float"},
    ],
    ids=str,
)
def test_other_integers_are_said_not_to_be_judged(changed: dict[str, object], export: Path, opened: Surgery) -> None:
    opened.tensors = Surgery(export).tensors
    (group,) = opened.quantization_config["config_groups"].values()
    group["weights"] |= changed
    opened.close()
    report = verify_checkpoint(opened.directory)
    assert Check.NOT_JUDGED in report.checks(Severity.ERROR)
