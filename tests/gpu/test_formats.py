"""The same bytes on a GPU as on the CPU."""

import pytest
import torch

from quantplug.formats import FP8, NVFP4, FP8Block

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("packing", [NVFP4(), FP8(), FP8Block()], ids=lambda packing: packing.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bytes_do_not_depend_on_the_device(packing, dtype):
    weight = torch.randn(384, 1280, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[5, 16:32] = 0
    amax = weight.abs().max().float()
    on_cpu = packing.pack(weight, amax).tensors
    on_gpu = packing.pack(weight.cuda(), amax.cuda()).tensors
    for suffix, tensor in on_cpu.items():
        assert torch.equal(on_gpu[suffix].cpu().reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
