"""The index of a checkpoint: what PyTorch says of it, and damage and malice named before a weight is read."""

import gc
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItemType

from quantplug.checkpoint.torch_dist import files
from quantplug.checkpoint.torch_dist.index import Index, read_index, require_covered
from quantplug.checkpoint.torch_dist.roots import INDEX_FILE
from quantplug.errors import CheckpointError
from tests.checkpoint.torch_dist.written import Touching, edit_index, save

TENSORS = {
    "scalar": torch.tensor(3.0),
    "matrix": torch.zeros(3, 5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "bytes": torch.zeros(7, dtype=torch.uint8),
    "packed": torch.zeros(4).to(torch.float8_e4m3fn),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoint", TENSORS, settings={"a": 1})


def test_tensors_and_objects_are_where_pytorch_finds_them(directory: Path) -> None:
    index = read_index(directory)

    metadata = FileSystemReader(directory).read_metadata()
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in index.tensors.items()} == {
        key: (tuple(tensor.shape), tensor.dtype) for key, tensor in TENSORS.items()
    }
    assert index.objects.keys() == {
        key for key, entry in metadata.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)
    }
    places = {
        index.fqn: (info.relative_path, info.offset, info.length) for index, info in metadata.storage_data.items()
    }
    extents = {key: tensor.chunks[0].extent for key, tensor in index.tensors.items()} | dict(index.objects)
    assert {key: (extent.file, extent.offset, extent.length) for key, extent in extents.items()} == places
    require_covered(index, index.tensors)


def test_the_plans_of_all_ranks_which_megatron_leaves_in_it_are_no_matter(directory: Path) -> None:
    before = read_index(directory)
    plan = create_default_local_save_plan({**TENSORS, "settings": {"a": 1}}, is_coordinator=True)
    assert {item.type for item in plan.items} == {WriteItemType.TENSOR, WriteItemType.BYTE_IO}

    def edit(metadata: Metadata) -> None:
        metadata.all_local_plans = [replace(plan, planner_data={})]  # type: ignore[attr-defined]  # As Megatron-Core does.

    edit_index(directory, edit)
    assert b"WriteItemType" in (directory / INDEX_FILE).read_bytes()
    assert read_index(directory) == before


def with_chunks(directory: Path, *boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> Index:
    """The index, with a matrix [3, 5] in these chunks: offsets and sizes."""

    def edit(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["matrix"]
        assert isinstance(entry, TensorStorageMetadata)
        (place,) = [place for index, place in metadata.storage_data.items() if index.fqn == "matrix"]
        entry.chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
        for offsets, _ in boxes:
            metadata.storage_data[MetadataIndex("matrix", offsets)] = place

    edit_index(directory, edit)
    return read_index(directory)


@pytest.mark.parametrize(
    "boxes",
    [
        (((0, 0), (3, 2)), ((0, 2), (3, 3))),
        (((0, 0), (1, 5)), ((1, 0), (2, 2)), ((1, 2), (2, 3))),
        # No grid: four boxes around one.
        (((0, 0), (1, 4)), ((1, 0), (2, 1)), ((2, 1), (1, 4)), ((0, 4), (2, 1)), ((1, 1), (1, 3))),
    ],
    ids=["columns", "rows, then columns", "around the middle"],
)
def test_chunks_that_make_up_a_tensor_are_taken(
    boxes: tuple[tuple[tuple[int, ...], ...], ...], directory: Path
) -> None:
    index = with_chunks(directory, *boxes)  # type: ignore[arg-type]

    require_covered(index, ["matrix"])
    assert [(chunk.offsets, chunk.sizes) for chunk in index.tensors["matrix"].chunks] == sorted(boxes)


@pytest.mark.parametrize(
    "boxes",
    [
        (((0, 0), (3, 4)),),
        (((0, 0), (3, 5)), ((0, 0), (1, 1))),
        # As many elements as it has: one column twice, another one not at all.
        (((0, 0), (3, 2)), ((0, 1), (3, 3))),
        (((0, 1), (3, 5)),),
        (((0,), (3,)),),
    ],
    ids=["a hole", "an overlap", "both", "beyond", "fewer axes"],
)
def test_chunks_that_do_not_are_refused_by_name(
    boxes: tuple[tuple[tuple[int, ...], ...], ...], directory: Path
) -> None:
    index = with_chunks(directory, *boxes)  # type: ignore[arg-type]

    with pytest.raises(CheckpointError, match="matrix: "):
        require_covered(index, ["scalar", "matrix"])


def test_what_an_index_may_not_name_is_refused_and_does_not_run(directory: Path, tmp_path: Path) -> None:
    def edit(metadata: Metadata) -> None:
        metadata.planner_data = Touching(tmp_path / "ran")

    edit_index(directory, edit)

    with pytest.raises(CheckpointError, match=r"\.metadata: names (_?io|builtins)\.open"):
        read_index(directory)
    assert not (tmp_path / "ran").exists()


def outside(directory: Path) -> str:
    (directory.parent / "secret").write_bytes(bytes(100_000))
    return "../secret"


def absolute(directory: Path) -> str:
    return str(directory.parent / outside(directory)[3:])


def by_a_link(directory: Path) -> str:
    outside(directory)
    (directory / "link.distcp").symlink_to(directory.parent / "secret")
    return "link.distcp"


def below(directory: Path) -> str:
    (directory / "below").mkdir()
    (directory / "below" / "more.distcp").write_bytes(bytes(100_000))
    return "below/more.distcp"


def pipe(directory: Path) -> str:
    os.mkfifo(directory / "pipe.distcp")
    return "pipe.distcp"


def absent(directory: Path) -> str:
    return "gone.distcp"


@pytest.mark.parametrize("place", [outside, absolute, by_a_link, below, pipe, absent])
def test_files_that_are_not_of_the_checkpoint_are_not_opened(place: Callable[[Path], str], directory: Path) -> None:
    name = place(directory)

    def edit(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = name

    edit_index(directory, edit)

    with pytest.raises(CheckpointError, match=Path(name).name):
        read_index(directory)


def test_a_file_that_is_cut_short_is_named_with_its_size(directory: Path) -> None:
    (file,) = directory.glob("*.distcp")
    os.truncate(file, file.stat().st_size - 1)

    with pytest.raises(CheckpointError, match=rf"{file.name}: is cut short: it has {file.stat().st_size} "):
        read_index(directory)


def no_places(metadata: Metadata) -> None:
    metadata.storage_data = {}


def no_table(metadata: Metadata) -> None:
    metadata.storage_data = None


def transformed(metadata: Metadata) -> None:
    next(iter(metadata.storage_data.values())).transform_descriptors = ["zstd"]


def negative(metadata: Metadata) -> None:
    next(iter(metadata.storage_data.values())).offset = -1


def huge(metadata: Metadata) -> None:
    metadata.state_dict_metadata["matrix"].size = torch.Size([2**60])  # type: ignore[union-attr]


def no_chunks(metadata: Metadata) -> None:
    metadata.state_dict_metadata["matrix"].chunks = None  # type: ignore[union-attr, assignment]


def no_dtype(metadata: Metadata) -> None:
    metadata.state_dict_metadata["matrix"].properties = None  # type: ignore[union-attr, assignment]


def a_number_for_a_key(metadata: Metadata) -> None:
    metadata.state_dict_metadata[3] = BytesStorageMetadata()  # type: ignore[index]


@pytest.mark.parametrize(
    "edit", [no_places, no_table, transformed, negative, huge, no_chunks, no_dtype, a_number_for_a_key]
)
def test_an_index_that_makes_no_sense_is_damage(edit: Callable[[Metadata], None], directory: Path) -> None:
    edit_index(directory, edit)

    with pytest.raises(CheckpointError, match=r"damaged or incomplete(.|\n)*\.metadata"):
        read_index(directory)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", pickle.dumps(None), pickle.dumps([1]), b"PK\3\4"])
def test_an_index_that_is_none_is_damage(content: bytes, directory: Path) -> None:
    (directory / INDEX_FILE).write_bytes(content)

    with pytest.raises(CheckpointError, match="damaged"):
        read_index(directory)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled: bool, directory: Path) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        read_index(directory)
        assert gc.isenabled() is enabled
        (directory / INDEX_FILE).write_bytes(b"")
        with pytest.raises(CheckpointError):
            read_index(directory)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()


def test_an_index_without_end_is_not_read(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.MOST_BYTES == 2**28
    with pytest.raises(CheckpointError, match=r"has more than 10 bytes"):
        files.read_file(directory, INDEX_FILE, 10)
