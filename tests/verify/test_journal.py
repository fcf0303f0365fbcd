"""A verify that was interrupted goes on where it was, and never finds less than one that looks at everything."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from quantplug import quantize_checkpoint
from quantplug.checkpoint.lock import take_lock
from quantplug.errors import ArgumentError
from quantplug.verify import VerifyReport, journal, verify_checkpoint
from quantplug.verify.inventory.checkpoint import Checkpoint
from tests.made_once import MadeOnce

Read = list[str]


@pytest.fixture(scope="session")
def made(tiny_qwen3_moe_dir: Path, made_once: MadeOnce) -> Path:
    """An export. Nobody may change it."""

    def make(directory: Path) -> None:
        quantize_checkpoint(tiny_qwen3_moe_dir, directory, "w4a16_nvfp4")

    return made_once("journal_export", make)


@pytest.fixture
def export(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "export")


@pytest.fixture
def progress(tmp_path: Path) -> Path:
    return tmp_path / "progress"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    """Names of tensors, as they are read."""
    names: Read = []
    part = Checkpoint.part

    def noting(checkpoint: Checkpoint, name: str, index: tuple[int | slice, ...]) -> object:
        names.append(name)
        return part(checkpoint, name, index)

    monkeypatch.setattr(Checkpoint, "part", noting)
    return names


def stop_after(tensors: int) -> Callable[[int, int], None]:
    """Progress that ends in Ctrl-C."""
    left = iter(range(tensors))

    def on_progress(done: int, total: int) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return on_progress


def stopped(export: Path, source: Path, progress: Path, tensors: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        verify_checkpoint(export, source, stop_after(tensors), resume=progress)


def broken(export: Path, source: Path) -> VerifyReport:
    """The report on an export with a finding in both stages: NaN in a norm, and a router that is not the source's."""
    path = export / "model-00001-of-00001.safetensors"
    path = path if path.exists() else next(export.glob("*.safetensors"))
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    tensors["model.layers.0.mlp.gate.weight"][0] *= 2
    save_file(tensors, path, {"format": "pt"})
    return verify_checkpoint(export, source)


# In the first stage, near its end, and in the second one.
@pytest.mark.parametrize("tensors", [1, 60, 150, 170])
def test_it_goes_on_to_the_same_report(
    tensors: int, export: Path, tiny_qwen3_moe_dir: Path, progress: Path, read: Read
) -> None:
    expected = broken(export, tiny_qwen3_moe_dir)
    assert {"finite", "source-values"} <= {str(check) for check in expected.checks()}
    read.clear()
    verify_checkpoint(export, tiny_qwen3_moe_dir)
    whole = len(read)
    stopped(export, tiny_qwen3_moe_dir, progress, tensors)
    stopped(export, tiny_qwen3_moe_dir, progress, tensors + 5)
    read.clear()

    report = verify_checkpoint(export, tiny_qwen3_moe_dir, resume=progress)

    assert report == expected
    assert len(read) < whole - tensors
    assert not progress.exists()


def test_what_has_changed_since_is_looked_at(
    export: Path, tiny_qwen3_moe_dir: Path, progress: Path, read: Read
) -> None:
    """Also where size and time of the file are what they were: whoever writes cannot set back the time of its entry."""
    (path,) = export.glob("*.safetensors")
    before = path.stat()
    stopped(export, tiny_qwen3_moe_dir, progress, 170)
    content = bytearray(path.read_bytes())
    # The last bytes are of block scales or codes: whichever, another sign or exponent.
    content[-4096:] = bytes(byte ^ 0x60 for byte in content[-4096:])
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    expected = verify_checkpoint(export, tiny_qwen3_moe_dir)
    assert not expected.ok

    assert verify_checkpoint(export, tiny_qwen3_moe_dir, resume=progress) == expected


def test_other_code_begins_anew(
    export: Path, tiny_qwen3_moe_dir: Path, progress: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify_checkpoint(export, tiny_qwen3_moe_dir)
    whole = len(read)
    stopped(export, tiny_qwen3_moe_dir, progress, 170)
    monkeypatch.setattr(journal, "_code", lambda: "of another version")
    read.clear()
    assert verify_checkpoint(export, tiny_qwen3_moe_dir, resume=progress).ok
    assert len(read) == whole


def test_another_source_begins_anew(export: Path, tiny_qwen3_moe_dir: Path, tmp_path: Path, progress: Path) -> None:
    stopped(export, tiny_qwen3_moe_dir, progress, 170)
    other = shutil.copytree(tiny_qwen3_moe_dir, tmp_path / "other")
    expected = broken(other, tiny_qwen3_moe_dir).tensors
    report = verify_checkpoint(export, other, resume=progress)
    assert (report.ok, report.tensors > expected) == (False, True)


@pytest.mark.parametrize("place", [0.01, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("damage", ["cut", "flipped", "zeros", "line lost"])
def test_a_damaged_journal_spares_less_work_and_no_finding(
    damage: str, place: float, export: Path, tiny_qwen3_moe_dir: Path, progress: Path
) -> None:
    expected = broken(export, tiny_qwen3_moe_dir)
    stopped(export, tiny_qwen3_moe_dir, progress, 170)
    content = progress.read_bytes()
    first = content.index(b"\n") + 1
    at = first + int(place * (len(content) - first))
    lines = content.splitlines(keepends=True)
    damaged = {
        "cut": content[:at],
        "flipped": content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :],
        "zeros": content[:at] + bytes(len(content) - at),
        "line lost": b"".join(lines[: 1 + int(place * len(lines))] + lines[2 + int(place * len(lines)) :]),
    }[damage]
    progress.write_bytes(damaged)
    assert verify_checkpoint(export, tiny_qwen3_moe_dir, resume=progress) == expected


def test_it_is_refused_where_it_would_do_harm(export: Path, tiny_qwen3_moe_dir: Path, tmp_path: Path) -> None:
    other, pipe = tmp_path / "notes.txt", tmp_path / "pipe"
    other.write_text("my notes")
    os.mkfifo(pipe)
    places = (export / "progress", tiny_qwen3_moe_dir / "x" / "p", other, pipe, tmp_path, tmp_path / "absent" / "p")
    before = sorted(tmp_path.rglob("*"))
    for place in places:
        with pytest.raises(ArgumentError) as caught:
            verify_checkpoint(export, tiny_qwen3_moe_dir, resume=place)
        assert [offender.parameter for offender in caught.value.offenders] == [str(place)]
    assert (other.read_text(), sorted(tmp_path.rglob("*"))) == ("my notes", before)


def test_two_verifies_do_not_share_one(export: Path, tiny_qwen3_moe_dir: Path, progress: Path) -> None:
    descriptor = take_lock(progress)
    with pytest.raises(ArgumentError, match="in use"):
        verify_checkpoint(export, tiny_qwen3_moe_dir, resume=progress)
    os.close(descriptor)


def test_files_that_change_while_they_are_read_prove_nothing(export: Path, tiny_qwen3_moe_dir: Path) -> None:
    (path,) = export.glob("*.safetensors")
    report = verify_checkpoint(export, tiny_qwen3_moe_dir, lambda done, total: path.touch())
    assert [(str(it.check), it.subject) for it in report.findings if it.severity == "error"] == [("files", path.name)]
