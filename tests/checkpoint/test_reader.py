"""Lazy reading, and every way a source directory can be wrong."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from quantplug.checkpoint import hub
from quantplug.checkpoint.reader import HFCheckpoint, resolve_source
from quantplug.checkpoint.safetensors.rows import data_starts, read_slice
from quantplug.errors import SourceError


@pytest.fixture
def sharded(tmp_path):
    """Two shards of one tensor each, and their index."""
    save_file({"a": torch.arange(12.0).view(4, 3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


def write_index(directory, weight_map):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("fixture", ["tiny_qwen3_dir", "tiny_qwen3_mixed_dir"])
def test_headers_and_data_are_those_of_safetensors(fixture, request):
    directory = request.getfixturevalue(fixture)
    expected = {}
    for file in directory.glob("*.safetensors"):
        expected |= load_file(file)
    with HFCheckpoint(directory) as source:
        assert source.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            header = source.tensors[name]
            assert (header.shape, header.dtype) == (tuple(tensor.shape), tensor.dtype)
            assert torch.equal(source.read(name), tensor)
            assert torch.equal(source.read(name, (slice(5, 17),)), tensor[5:17])
            if tensor.dim() == 2:
                assert torch.equal(source.read(name, (slice(None), slice(5, 17))), tensor[:, 5:17])


def test_empty_slice_and_scalar(tmp_path):
    save_file({"w": torch.ones(4, 3), "s": torch.tensor(2.0)}, tmp_path / "model.safetensors")
    with HFCheckpoint(tmp_path) as source:
        assert source.read("w", (slice(4, 4),)).shape == (0, 3)
        assert source.read("s") == 2


def test_one_entry_of_the_first_axis_and_a_slice_of_another(tmp_path):
    stacked = torch.arange(24.0).reshape(2, 3, 4)
    save_file({"w": stacked}, tmp_path / "model.safetensors")
    with HFCheckpoint(tmp_path) as source:
        assert torch.equal(source.read("w", (1, slice(None), slice(1, 3))), stacked[1, :, 1:3])


def test_every_missing_or_damaged_shard_is_named(sharded):
    (sharded / "one.safetensors").unlink()
    data = (sharded / "two.safetensors").read_bytes()
    (sharded / "two.safetensors").write_bytes(data[:-1])
    with pytest.raises(SourceError) as caught:
        HFCheckpoint(sharded)
    assert [offender.parameter for offender in caught.value.offenders] == [
        str(sharded / "one.safetensors"),
        str(sharded / "two.safetensors"),
    ]


def test_index_that_names_the_wrong_shard(sharded):
    write_index(sharded, {"a": "two.safetensors", "b": "two.safetensors", "c": "one.safetensors"})
    with pytest.raises(SourceError) as caught:
        HFCheckpoint(sharded)
    assert [offender.parameter for offender in caught.value.offenders] == ["a", "c"]


def test_tensor_in_two_shards(sharded):
    shutil.copy(sharded / "one.safetensors", sharded / "three.safetensors")
    write_index(sharded, {"a": "one.safetensors", "b": "two.safetensors", "other": "three.safetensors"})
    with pytest.raises(SourceError, match="more than one file"):
        HFCheckpoint(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_damaged_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(SourceError, match=r"index\.json"):
        HFCheckpoint(sharded)


def test_directory_without_safetensors(tmp_path):
    with pytest.raises(SourceError, match=r"model\.safetensors.*does not exist"):
        HFCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [("pytorch_model.bin", "1 files of pickles"), ("model-00001-of-00002.safetensors", "1 shards, and no index")],
)
def test_what_is_there_in_place_of_weights_is_said(name, said, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(SourceError, match=rf"model\.safetensors: does not exist\n.*{said}"):
        HFCheckpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "mtp.safetensors", "model.safetensors"]
)
def test_weights_beside_the_model_are_refused_by_name(name, sharded):
    (sharded / name).touch()
    with pytest.raises(SourceError, match=f"{name}.*\n.*out of the directory"):
        HFCheckpoint(sharded)


def test_layers_of_mtp_in_a_file_that_the_index_names_are_read(sharded):
    (sharded / "two.safetensors").rename(sharded / "mtp.safetensors")
    write_index(sharded, {"a": "one.safetensors", "b": "mtp.safetensors"})
    with HFCheckpoint(sharded) as source:
        assert source.read("b").tolist() == [1, 1]


def test_directory_is_taken_as_it_is(tmp_path):
    assert resolve_source(tmp_path) == resolve_source(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["/no/such/directory", "./no-such", "~/no-such", "a/b/c"])
def test_paths_are_not_looked_up_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(SourceError, match="does not exist"):
        resolve_source(name)


def test_file_is_no_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="is a file"):
        resolve_source(tmp_path / "file")


def test_hub_that_cannot_be_reached(monkeypatch):
    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError("no network\nand more")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(SourceError, match=r"owner/name.*no network"):
        resolve_source("owner/name")


@pytest.mark.parametrize("name", ["no such name", "owner/na..me"])
def test_name_that_no_hub_model_can_have(name):
    with pytest.raises(SourceError, match=name):
        resolve_source(name)


COMMIT = "0123456789abcdef"
ON_THE_HUB = (
    "config.json",
    "tokenizer.json",
    "additional_chat_templates/tool_use.jinja",
    "model.safetensors",
    "part/model-1.safetensors",
    "model-[2].safetensors",
    "model-2.safetensors",
    "consolidated.safetensors",
    "original/model.safetensors",
    "original/params.json",
    "onnx/model.onnx",
)


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """A stand-in for the hub's downloads, which selects files as those do, and all that is fetched."""
    files = set()
    snapshot = tmp_path / COMMIT
    snapshot.mkdir()

    def download(name, *, cache_dir, revision=None, allow_patterns, ignore_patterns=None):
        assert (name, revision) == ("owner/name", COMMIT if ignore_patterns is None else None)
        files.update(filter_repo_objects(ON_THE_HUB, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", download)
    return files


def test_weights_are_fetched_only_where_asked_for(fetched, tmp_path):
    side_files = {"config.json", "tokenizer.json", "additional_chat_templates/tool_use.jinja"}
    assert resolve_source("owner/name", weights=False) == tmp_path / COMMIT
    assert fetched == side_files
    assert resolve_source("owner/name", tmp_path) == tmp_path / COMMIT
    assert fetched == {*side_files, "model.safetensors"}


def test_weights_that_the_index_names_are_fetched_and_no_others(fetched, tmp_path):
    write_index(tmp_path / COMMIT, {"a": "part/model-1.safetensors", "b": "model-[2].safetensors"})
    resolve_source("owner/name")
    assert {name for name in fetched if name.endswith("safetensors")} == {
        "part/model-1.safetensors",
        "model-[2].safetensors",
    }


INDICES = [(), (slice(1, 4),), (2,), (2, slice(0, 3)), (slice(1, 4), slice(2, 5)), (1, slice(2, 4), slice(3, 6))]
INDICES += [(slice(None), slice(1, 2), slice(0, 7)), (slice(3, 3),), (slice(-2, None),), (-1, -2), (slice(0, 99),)]


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn])
def test_any_slice_is_what_torch_gives(index, dtype, tmp_path):
    tensors = {name: (torch.rand(5, 6, 7) * 100).to(dtype) for name in "ab"}
    save_file(tensors, tmp_path / "model.safetensors")
    with HFCheckpoint(tmp_path) as source:
        for name, tensor in tensors.items():
            found, expected = source.read(name, index), tensor[index] if index else tensor
            assert (found.shape, found.dtype) == (expected.shape, dtype)
            assert torch.equal(found.view(torch.uint8), expected.contiguous().view(torch.uint8))


def test_columns_are_read_some_rows_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("quantplug.checkpoint.safetensors.rows._BLOCK_BYTES", 100)
    tensor = torch.rand(9, 8)
    save_file({"a": tensor, "scalar": torch.tensor(3.0)}, tmp_path / "model.safetensors")
    with HFCheckpoint(tmp_path) as source:
        assert torch.equal(source.read("a", (slice(1, 9), slice(2, 5))), tensor[1:9, 2:5])
        assert torch.equal(source.read("scalar"), torch.tensor(3.0))


def test_a_file_that_is_cut_is_an_error_and_what_was_read_stays(tmp_path):
    """Pages of a mapped file that are behind its end would end the process when they are touched."""
    tensors = {f"t{index}": torch.randn(512, 512) for index in range(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    with HFCheckpoint(tmp_path) as source:
        read = {name: source.read(name) for name in ("t0", "t1")}
        os.truncate(tmp_path / "model.safetensors", 4096)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in read.items())
        with pytest.raises(SourceError, match="has changed while it was read"):
            source.read("t2")


def test_a_file_that_is_cut_amid_a_read_is_told(tmp_path):
    save_file({"a": torch.rand(64, 64)}, tmp_path / "model.safetensors")
    with (tmp_path / "model.safetensors").open("rb+") as file:
        (start,) = data_starts(file.fileno()).values()
        file.truncate(start + 64 * 64 * 2)
        read_slice(file.fileno(), start, (64, 64), torch.float32, (slice(0, 32),))
        with pytest.raises(EOFError):
            read_slice(file.fileno(), start, (64, 64), torch.float32, (slice(16, 48),))


def test_what_was_read_does_not_stay_in_memory(tmp_path):
    save_file(
        {f"t{index}": torch.ones(2**20, dtype=torch.uint8) for index in range(64)}, tmp_path / "model.safetensors"
    )
    with HFCheckpoint(tmp_path) as source:
        before = mapped_bytes()
        for name in source.tensors:
            source.read(name).sum()
        assert mapped_bytes() - before < 16 * 2**20


def mapped_bytes():
    """Pages of files that count as this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))
