import pytest
import torch

from quantplug.formats.kernels.chunks import CHUNK_ELEMENTS, fp32_row_chunks
from tests.formats.weights import heavy_tailed


@pytest.mark.parametrize("row_multiple", [1, 128])
@pytest.mark.parametrize("shape", [(1, 1), (128, 48), (700, 900), (384, 3000), (2, CHUNK_ELEMENTS + 1), (1000,)])
def test_chunks_are_all_rows_in_order(shape: tuple[int, ...], row_multiple: int) -> None:
    weight = torch.arange(shape[0], dtype=torch.bfloat16).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    chunks = list(fp32_row_chunks(weight, row_multiple))
    assert torch.equal(torch.cat(chunks), weight.float())
    for chunk in chunks:
        assert chunk.dtype == torch.float32
        assert chunk.is_contiguous()
        assert chunk.shape[0] <= row_multiple or chunk.numel() <= CHUNK_ELEMENTS
    assert all(chunk.shape[0] % row_multiple == 0 for chunk in chunks[:-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_chunks_of_a_transposed_view_are_contiguous(dtype: torch.dtype) -> None:
    weight = heavy_tailed((48, 20), dtype).t()
    (chunk,) = fp32_row_chunks(weight)
    assert chunk.is_contiguous()
    assert torch.equal(chunk, weight.float())
