"""INT4 in groups, as compressed-tensors' own compressor makes it of the same weight, and reads it."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import assume, given
from hypothesis import strategies as st

from quantplug.formats import INT4, INT4_32, BlockFormat
from tests.formats.weights import DTYPES, bits, heavy_tailed, weights

GROUPS = {INT4: 128, INT4_32: 32}
both = pytest.mark.parametrize("packing", GROUPS, ids=lambda packing: packing.name)


def w4a16(group: int) -> QuantizationScheme:
    """What llm-compressor writes by its scheme W4A16, with groups of this size."""
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights.group_size = group
    return scheme


def their_scales(weight: torch.Tensor, scheme: QuantizationScheme) -> torch.Tensor:
    groups = weight.unflatten(-1, (-1, scheme.weights.group_size))
    return calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)[0]


def theirs(weight: torch.Tensor, scheme: QuantizationScheme, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compressed in FP32, as its kernel for GPUs divides; on a CPU it would divide in the type of the weight."""
    state = {"weight": weight.float(), "weight_scale": scales.float()}
    return PackedQuantizationCompressor.compress(state, scheme)


@both
@pytest.mark.parametrize("shape", [(48, 256), (1, 128), (5, 3072)])
def test_bytes_and_scales_of_bf16_are_compressed_tensors(packing: BlockFormat, shape: tuple[int, int]) -> None:
    weight, scheme = heavy_tailed(shape, torch.bfloat16), w4a16(GROUPS[packing])
    packed = packing.pack(weight).tensors
    scales = their_scales(weight, scheme)
    assert torch.equal(bits(packed["weight_scale"]), bits(scales))
    compressed = theirs(weight, scheme, scales)
    # Little-endian integers of 32 bits are these bytes: eight codes, the first in the lowest four bits.
    assert torch.equal(packed["weight"].view(torch.int32), compressed["weight_packed"])


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_any_type_are_compressed_tensors_under_the_same_scales(
    packing: BlockFormat, dtype: torch.dtype
) -> None:
    weight, scheme = heavy_tailed((48, 256), dtype), w4a16(GROUPS[packing])
    packed = packing.pack(weight)
    compressed = theirs(weight, scheme, packed.tensors["weight_scale"])
    assert torch.equal(packed.tensors["weight"].view(torch.int32), compressed["weight_packed"])
    decoded = PackedQuantizationCompressor.decompress(compressed, scheme)["weight"]
    assert torch.equal(decoded, packing.unpack(packed))


def test_on_a_cpu_their_compressor_rounds_the_quotient_of_bf16_twice_and_few_codes_differ() -> None:
    """Why the comparison above is in FP32: of quotients that BF16 has rounded to a tie some go the other way."""
    weight, scheme = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)).bfloat16(), w4a16(128)
    packed, scales = INT4.pack(weight).tensors, their_scales(weight, scheme)
    in_bf16 = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scales}, scheme)
    ours, other = (codes.view(torch.uint8).int() for codes in (packed["weight"], in_bf16["weight_packed"]))
    apart = torch.stack(((ours & 15) - (other & 15), (ours >> 4) - (other >> 4)))
    assert apart.abs().max() == 1
    assert 0 < apart.count_nonzero() < 0.03 * weight.numel()


@given(weight=weights(in_features=(128, 256)), packing=st.sampled_from(list(GROUPS)))
def test_any_weight_is_within_half_a_step_of_its_groups_scale(weight: torch.Tensor, packing: BlockFormat) -> None:
    # The code -8 stands for 16/15 of the amax, which of the largest values that there are is beyond FP32.
    assume(weight.abs().max() < 3e38)
    packed = packing.pack(weight)
    scales, values = packed.tensors["weight_scale"], packing.unpack(packed)
    assert scales.isfinite().all()
    assert (scales >= 2.0**-126).all()
    # Half a step; the amax is 7.5 of them, or more by as much as BF16 has rounded the scale down, and is cut off at 7.
    bound = scales.double().repeat_interleave(GROUPS[packing], 1) * (0.5 + 7.5 * 2**-7)
    assert ((values.double() - weight.double()).abs() <= bound).all()


def test_literal_bytes() -> None:
    weight = torch.zeros(2, 32)
    weight[0, :10] = torch.tensor([15.0, -15.0, 1.0, -1.0, 3.0, 5.0, 2.0, -6.0, 14.9, 0.0])
    packed = INT4_32.pack(weight).tensors
    assert packed["weight_scale"].tolist() == [[2.0], [1.0]]
    # 7.5 is cut off at 7 and -7.5 a tie that goes to -8; 0.5 and -0.5 go to 0, 1.5 to 2, 2.5 to 2.
    assert packed["weight"][0, :5].tolist() == [0x0F, 0x88, 0xAA, 0x59, 0x8F]
    assert (packed["weight"].flatten()[5:] == 0x88).all()


@both
def test_a_group_of_zeros_has_scale_1_and_codes_of_0(packing: BlockFormat) -> None:
    weight = heavy_tailed((6, 256), torch.bfloat16)
    weight[3, :128] = 0
    packed = packing.pack(weight)
    groups = 128 // GROUPS[packing]
    assert (packed.tensors["weight_scale"][3, :groups] == 1).all()
    assert (packed.tensors["weight_scale"][3, groups:] < 1).all()
    assert (packing.unpack(packed)[3, :128] == 0).all()


@both
def test_a_group_that_is_not_finite_stays_so_for_every_decoder(packing: BlockFormat) -> None:
    weight = heavy_tailed((6, 256), torch.bfloat16)
    weight[2, 5], weight[4, 6] = float("nan"), float("inf")
    values = packing.unpack(packing.pack(weight))
    assert values[2, : GROUPS[packing]].isnan().all()
    assert not values[4, : GROUPS[packing]].isfinite().any()
    assert values[2:5, GROUPS[packing] :].isfinite().all()


@both
def test_cut_where_it_says_parts_are_the_whole(packing: BlockFormat) -> None:
    assert packing.cut_steps == (1, GROUPS[packing])
    weight = heavy_tailed((12, 512), torch.bfloat16)
    whole = packing.pack(weight).tensors
    for axis, step in ((0, 5), (1, 128)):
        parts = [packing.pack(part).tensors for part in weight.split(step, dim=axis)]
        for name, tensor in whole.items():
            assert torch.equal(bits(torch.cat([part[name] for part in parts], dim=axis)), bits(tensor)), (name, axis)


@pytest.mark.parametrize(
    ("packing", "shape", "problem"),
    [
        (INT4, (1, 128), None),
        (INT4, (4, 96), "in_features 96 is not a multiple of the block size 128"),
        (INT4_32, (4, 96), None),
        (INT4_32, (4, 48), "in_features 48 is not a multiple of the block size 32"),
    ],
)
def test_groups_are_whole(packing: BlockFormat, shape: tuple[int, int], problem: str | None) -> None:
    assert packing.problem(shape) == problem


@both
def test_outputs_are_what_pack_makes_and_a_given_amax_changes_nothing(packing: BlockFormat) -> None:
    weight = heavy_tailed((24, 128), torch.bfloat16)
    packed, other = packing.pack(weight).tensors, packing.pack(weight, torch.tensor(1e9)).tensors
    made = [(suffix, tuple(tensor.shape), tensor.dtype) for suffix, tensor in packed.items()]
    assert made == [(spec.name, spec.shape, spec.dtype) for spec in packing.outputs((24, 128))]
    assert all(torch.equal(bits(packed[suffix]), bits(other[suffix])) for suffix in packed)
