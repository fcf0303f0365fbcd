"""The same bytes on a GPU as on the CPU."""

import pytest
import torch

from quantplug.formats import FP8, FP8_BLOCK, FP8_ROW, INT4, INT4_32, MXFP4, MXFP8, NVFP4
from quantplug.formats.encoding import NVFP4_ENCODING
from quantplug.formats.kernels import Encoded, kernels_for
from quantplug.formats.kernels.cuda import kernels as cuda
from quantplug.formats.search.candidates import FOUND
from tests.formats.kernels.values import E4M3_SCALES, TENSOR_SCALES, every_block

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SEARCHED = [NVFP4.searched(search) for search in FOUND]
FORMATS = [*SEARCHED, NVFP4, FP8, FP8_ROW, FP8_BLOCK, INT4, INT4_32, MXFP8, MXFP4]
all_of_them = pytest.mark.parametrize("packing", FORMATS, ids=lambda packing: packing.name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_triton_kernels_prove_themselves_here(dtype):
    assert kernels_for(torch.ones(2, 2, dtype=dtype, device="cuda")) is cuda


@all_of_them
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_experts_in_one_launch_have_the_bytes_of_each_on_the_cpu(packing, dtype):
    # Of blocks of 128 x 128 the last ones are partial.
    shape = (300, 1000) if packing is FP8_BLOCK else (384, 1280)
    weights = torch.randn(7, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    amaxes = weights.abs().amax((1, 2)).float() * torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 1e-3, 3.0])
    on_gpu = packing.pack_group([weight.clone() for weight in weights.cuda()], amaxes.cuda())
    for weight, amax, packed in zip(weights, amaxes, on_gpu, strict=True):
        for suffix, tensor in packing.pack(weight, amax).tensors.items():
            made = packed.tensors[suffix].cpu()
            assert torch.equal(made.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), suffix
        there = packing.unpack(packing.pack(weight.cuda(), amax.cuda())).cpu()
        assert torch.equal(there, packing.unpack(packing.pack(weight, amax)))


@all_of_them
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bytes_do_not_depend_on_the_device(packing, dtype):
    weight = torch.randn(384, 1280, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[5, 16:32] = 0
    amax = weight.abs().max().float()
    on_cpu = packing.pack(weight, amax).tensors
    on_gpu = packing.pack(weight.cuda(), amax.cuda()).tensors
    for suffix, tensor in on_cpu.items():
        assert torch.equal(on_gpu[suffix].cpu().reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weight_scale_2", TENSOR_SCALES)
def test_the_triton_kernel_gives_the_bytes_of_the_cpu_for_every_value(dtype, weight_scale_2):
    weight = torch.cat([every_block(dtype, scale, weight_scale_2) for scale in E4M3_SCALES[5::10]])
    amax = torch.tensor(weight_scale_2) * 2688
    on_cpu = NVFP4.pack(weight, amax).tensors
    assert on_cpu["weight_scale_2"].item() == pytest.approx(weight_scale_2)
    codes, scales = on_cpu["weight"].cuda().zero_(), torch.zeros_like(on_cpu["weight_scale"], device="cuda")
    scale_2 = on_cpu["weight_scale_2"].cuda()
    cuda.pack(NVFP4_ENCODING, (weight.cuda(),), Encoded(codes[None], scales[None], scale_2[None]))
    assert torch.equal(codes.cpu(), on_cpu["weight"])
    assert torch.equal(scales.cpu().view(torch.uint8), on_cpu["weight_scale"].view(torch.uint8))
