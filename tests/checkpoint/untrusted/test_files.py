"""Which files of a stranger's directory are read, and how much of them: never a pipe, a device or a way out."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantplug.checkpoint.config.file import read_config_file
from quantplug.checkpoint.reader import INDEX_FILE, HFCheckpoint, weight_files
from quantplug.checkpoint.untrusted import files as untrusted_files
from quantplug.checkpoint.untrusted.files import file_problem, name_problem, read_json
from quantplug.errors import SourceError

Place = Callable[[Path], None]


def to_endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def to_itself(path: Path) -> None:
    path.symlink_to(path)


def to_a_secret(path: Path) -> None:
    secret = path.parent.parent / "secret"
    secret.write_text('{"token": 1}')
    path.symlink_to(secret)


def to_nothing(path: Path) -> None:
    path.symlink_to(path.parent / "gone")


NOT_FILES: dict[str, tuple[Place, str]] = {
    "pipe": (os.mkfifo, "is a named pipe, not a file"),
    "directory": (Path.mkdir, "is a directory, not a file"),
    "device": (to_endless_device, "is a link to a file outside of the directory"),
    "link to a secret": (to_a_secret, "is a link to a file outside of the directory"),
    "link to nothing": (to_nothing, "does not exist"),
    "absent": (lambda path: None, "does not exist"),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


@pytest.mark.parametrize(("place", "reason"), NOT_FILES.values(), ids=NOT_FILES.keys())
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_is_no_file_is_not_opened(place: Place, reason: str, name: str, directory: Path) -> None:
    place(directory / name)
    assert file_problem(directory, name) == reason
    with pytest.raises(SourceError, match=reason):
        HFCheckpoint(directory) if name.endswith("safetensors") else read_config_file(directory)


def test_a_link_that_goes_in_a_ring_is_an_error(directory: Path) -> None:
    to_itself(directory / "config.json")
    with pytest.raises(SourceError, match=r"config\.json"):
        read_config_file(directory)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_not_said_to_be_absent(directory: Path) -> None:
    save_file({"a": torch.zeros(1)}, directory / "model.safetensors")
    (directory / "model.safetensors").chmod(0)
    with pytest.raises(SourceError, match="cannot be read: Permission denied"):
        HFCheckpoint(directory)


def test_permission_is_told_from_absence(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system says to a user who is not root."""
    save_file({"a": torch.zeros(1)}, directory / "model.safetensors")

    def refuse(*arguments: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(untrusted_files.os, "open", refuse)
    assert file_problem(directory, "model.safetensors") == "cannot be read: Permission denied"


BAD_NAMES = ["../x.safetensors", "/etc/passwd", "a/../../x", "..", ".", "", "a\\b", "a\0b", 7, None, ["a"], {}]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_an_index_names_only_files_of_its_directory(name: object, directory: Path) -> None:
    save_file({"a": torch.zeros(1)}, directory / "model.safetensors")
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": name}}))
    assert name_problem(name) is not None
    with pytest.raises(SourceError, match="is not the name of a file") as caught:
        HFCheckpoint(directory)
    assert [offender.parameter for offender in caught.value.offenders] == ["b"]


def test_a_shard_outside_of_the_source_is_not_read(directory: Path) -> None:
    save_file({"a": torch.ones(1)}, directory.parent / "other.safetensors")
    (directory / "one.safetensors").symlink_to("../other.safetensors")
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(SourceError, match="is a link to a file outside of the directory"):
        HFCheckpoint(directory)


def test_shards_in_folders_are_read(directory: Path) -> None:
    (directory / "language").mkdir()
    save_file({"a": torch.ones(1)}, directory / "language" / "one.safetensors")
    save_file({"z": torch.ones(1)}, directory / "consolidated.safetensors")
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "language/one.safetensors"}}))
    with HFCheckpoint(directory) as source:
        assert source.read("a").item() == 1
        assert source.tensors.keys() == {"a"}
    assert weight_files(directory) == ("language/one.safetensors",)


def test_the_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    model = tmp_path / "models--owner--name"
    snapshot = model / "snapshots" / "0123abc"
    (model / "blobs").mkdir(parents=True)
    (snapshot / "sub").mkdir(parents=True)
    save_file({"a": torch.ones(1)}, model / "blobs" / "d1")
    (model / "blobs" / "d2").write_text("{}")
    (tmp_path / "secret").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/d1")
    (snapshot / "sub" / "model.safetensors").symlink_to("../../../blobs/d1")
    (snapshot / "config.json").symlink_to("../../blobs/d2")
    (snapshot / "tokenizer.json").symlink_to("../../../secret")
    assert read_json(snapshot, "config.json") == {}
    assert file_problem(snapshot, "sub/model.safetensors") is None
    assert file_problem(snapshot, "tokenizer.json") == "is a link to a file outside of the directory"
    with HFCheckpoint(snapshot) as source:
        assert source.read("a").item() == 1
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    assert file_problem(linked, "model.safetensors") is None


BAD_JSON = {
    "cut": b"{",
    "not UTF-8": b"\xff\xfe{}",
    # Python's parser reads these bytes, and not the text that transformers and servers make of them.
    "UTF-8 with a mark of byte order": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16-le"),
    "a list": b"[]",
    "a number": b"7",
    "a number of five thousand digits": b'{"a": ' + b"9" * 5000 + b"}",
    "half of a surrogate pair": b'{"a": "\\uDC80"}',
    "200,000 lists in one another": b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "200 objects in one another": b'{"a":' * 200 + b"1" + b"}" * 200,
}


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON.keys())
def test_json_that_is_none(content: bytes, directory: Path) -> None:
    (directory / "config.json").write_bytes(content)
    with pytest.raises(SourceError, match=r"config\.json"):
        read_config_file(directory)


def test_json_is_bounded(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted_files, "MOST_JSON_BYTES", 100)
    (directory / "config.json").write_text('{"a": "' + "x" * 92 + '"}')
    with pytest.raises(SourceError, match="more than 100 bytes"):
        read_json(directory, "config.json")


def test_depth_is_counted_not_size(directory: Path) -> None:
    wide = {f"key{index}": [index, {"inner": []}] for index in range(1000)}
    (directory / "config.json").write_text(json.dumps(wide))
    assert read_json(directory, "config.json") == wide


@pytest.mark.parametrize("key", ["quantization_config", "text_config", "auto_map"])
@pytest.mark.parametrize("value", [7, "x", [1], True])
def test_settings_that_must_be_objects(key: str, value: object, directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({key: value}))
    with pytest.raises(SourceError, match=f"{key} that is not a JSON object"):
        read_config_file(directory)
