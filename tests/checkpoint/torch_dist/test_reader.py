"""Rows of tensors from the chunks that ranks saved, and what a chunk that is not as the index says gives."""

from pathlib import Path

import pytest
import torch

from quantplug.checkpoint.torch_dist.index import read_index
from quantplug.checkpoint.torch_dist.reader import Segment, TorchDistReader
from quantplug.errors import CheckpointError
from tests.checkpoint.torch_dist.written import put_chunks, save
from tests.export.checkpoints import same_bytes

MATRIX = torch.arange(12 * 10, dtype=torch.float32).reshape(12, 10)
STACKED = torch.arange(2 * 3 * 8 * 5, dtype=torch.float32).reshape(2, 3, 8, 5)

Chunks = dict[tuple[int, ...], torch.Tensor]


def cut(whole: torch.Tensor, *sizes: int) -> Chunks:
    """The chunks of a grid, each saved as a rank saves its own."""
    chunks: Chunks = {(): whole}
    for axis, size in enumerate(sizes):
        chunks = {
            (*offsets, start): part.narrow(axis, start, size).clone()
            for offsets, part in chunks.items()
            for start in range(0, whole.shape[axis], size)
        }
    return chunks


GRIDS = {
    "whole": cut(MATRIX, 12, 10),
    "rows": cut(MATRIX, 4, 10),
    "columns": cut(MATRIX, 12, 5),
    "both": cut(MATRIX, 3, 2),
    "as columns lie": {(0, 0): MATRIX.t().contiguous().t()},
    "out of a larger one": {(0, 0): torch.cat([MATRIX, MATRIX, MATRIX])[12:24]},
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoint", {"other": torch.zeros(2)})


@pytest.mark.parametrize("chunks", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8])
def test_rows_are_those_that_were_saved(dtype: torch.dtype, chunks: Chunks, directory: Path) -> None:
    put_chunks(directory, "it", MATRIX.shape, {at: chunk.to(dtype) for at, chunk in chunks.items()})

    with TorchDistReader(read_index(directory)) as reader:
        for start, stop in ((0, 12), (0, 0), (3, 4), (2, 11)):
            assert same_bytes(reader.read(Segment("it"), start, stop), MATRIX.to(dtype)[start:stop])


@pytest.mark.parametrize("sizes", [(2, 3, 8, 5), (1, 1, 8, 5), (1, 1, 4, 5), (2, 1, 2, 5), (1, 3, 8, 5)])
def test_one_layer_and_expert_is_read_of_all(sizes: tuple[int, ...], directory: Path) -> None:
    put_chunks(directory, "it", STACKED.shape, cut(STACKED, *sizes))

    with TorchDistReader(read_index(directory)) as reader:
        for layer in range(2):
            assert torch.equal(reader.read(Segment("it", (layer,))), STACKED[layer])
            for expert in range(3):
                assert torch.equal(reader.read(Segment("it", (layer, expert)), 1, 7), STACKED[layer, expert, 1:7])


def test_segments_lie_one_below_another(directory: Path) -> None:
    put_chunks(directory, "above", (12, 10), {(0, 0): MATRIX})
    put_chunks(directory, "below", (12, 10), {(0, 0): MATRIX + 1000})

    with TorchDistReader(read_index(directory)) as reader:
        segments = (Segment("above"), Segment("below"))
        whole = torch.cat([MATRIX, MATRIX + 1000])
        for start, stop in ((0, 24), (10, 14), (0, 3), (13, 20), (24, 24)):
            rows = reader.empty(segments[0], (stop - start, 10))
            reader.read_rows(segments, start, rows)
            assert torch.equal(rows, whole[start:stop])


def test_a_tensor_without_axes_is_one_value(directory: Path) -> None:
    put_chunks(directory, "amax", (), {(): torch.tensor(2.5)})

    with TorchDistReader(read_index(directory)) as reader:
        assert reader.read(Segment("amax")).item() == 2.5


@pytest.mark.parametrize(
    "chunk",
    [torch.zeros(12, 9), torch.zeros(12, 10, dtype=torch.int64), {"a": 1}],
    ids=["smaller", "wider", "no tensor"],
)
def test_a_chunk_that_is_not_as_the_index_says_is_damage(chunk: object, directory: Path) -> None:
    put_chunks(directory, "it", MATRIX.shape, {(0, 0): MATRIX})
    extent = read_index(directory).tensors["it"].chunks[0].extent
    torch.save(chunk, directory / extent.file)
    # The index goes on saying what it said.
    with (directory / extent.file).open("r+b") as file:
        content = file.read()
        file.seek(0)
        file.write(content.ljust(extent.length, b"\0"))

    with TorchDistReader(read_index(directory)) as reader, pytest.raises(CheckpointError, match=extent.file):
        reader.read(Segment("it"))
