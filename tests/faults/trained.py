"""What can be wrong with a directory of Megatron-Core's `torch_dist`: random, but the same for the same seed.

As of Hugging Face directories (`mutations.py`), a mutation need not make a checkpoint wrong. Pickles are written by
instructions of their own where Python's pickler would not write them so: an endless list, a list that is in memory once
and endless to whoever walks it, a name that runs when a reader of pickles comes to it.
"""

import io
import json
import os
import pickle
import random
import shutil
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from tests.checkpoint.torch_dist.written import Touching, edit_index
from tests.faults.mutations import ESCAPES, Mutation, junk

RAN = "it ran"
"""Name of a file beside the checkpoint that is there when something of the checkpoint has run."""


def iteration_of(directory: Path) -> Path:
    """The directory that holds the index: what a trainer saved to has one iteration, what we save is one."""
    return next(directory.rglob("common.pt"), directory / "gone").parent


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def bytes_flipped(directory: Path, rng: random.Random) -> None:
    path = rng.choice(files_of(directory))
    content = bytearray(path.read_bytes())
    # Data is most of a file: damage near its ends hits what describes it.
    places = rng.choice(
        (range(len(content)), range(min(len(content), 400)), range(max(0, len(content) - 400), len(content)))
    )
    for _ in range(rng.choice((1, 1, 4, 32))):
        content[rng.choice(places)] = rng.randrange(256)
    path.write_bytes(content)


def file_cut(directory: Path, rng: random.Random) -> None:
    path = rng.choice(files_of(directory))
    content = path.read_bytes()
    place = rng.choice((0, 1, rng.randrange(len(content)), len(content) - 1))
    path.write_bytes(rng.choice((content[:place], content + b"\0" * (place + 1), content[place:] + content[:place])))


def not_a_file(directory: Path, rng: random.Random) -> None:
    """A pipe, a device, a directory or a link in place of a file: opening some of them would wait for ever."""
    path = rng.choice(files_of(directory))
    content, outside = path.read_bytes(), directory.parent / "outside"
    path.unlink()

    def moved() -> None:
        (outside / path.name).write_bytes(content)  # The very file, but outside of the checkpoint.
        path.symlink_to(outside / path.name)

    rng.choice(
        (
            lambda: os.mkfifo(path),
            lambda: path.symlink_to("/dev/zero"),
            lambda: path.symlink_to("/dev/tty"),
            lambda: path.symlink_to(outside / "secret.txt"),
            moved,
            lambda: path.symlink_to(path.name),
            lambda: path.symlink_to("gone"),
            path.mkdir,
            lambda: None,
        )
    )()


def not_a_directory(directory: Path, rng: random.Random) -> None:
    """A link, a file or nothing in place of a directory, or one more beside it."""
    inner = [path for path in directory.rglob("*") if path.is_dir()] or [directory / "modelopt_state"]
    path = rng.choice(inner)
    outside = directory.parent / "outside" / "moved"
    if path.exists():
        shutil.move(path, outside)
    else:
        outside.mkdir()
    rng.choice(
        (
            lambda: path.symlink_to(outside),
            lambda: path.symlink_to(path.name),
            lambda: path.symlink_to("/dev"),
            lambda: path.write_text("text"),
            lambda: os.mkfifo(path),
            lambda: None,
        )
    )()


def json_text(directory: Path, rng: random.Random) -> None:
    names = ("metadata.json", "quantplug.json", "modelopt_state/metadata.json")
    path = iteration_of(directory) / rng.choice(names)
    texts = [
        b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 200_000, b'{"a":' * 200_000, b"\0" * 64,
        b'{"sharded_backend": "zarr"}', b'{"sharded_backend": 7}', b'{"sharded_backend": ["torch_dist"]}',
        b'{"sharded_backend": "torch_dist", "sharded_backend_version": "x"}', b'{"sharded_backend": "\\u001b[31m"}',
        b'{"extra": {}, "files": {"../../outside/secret.txt": {"bytes": 3}}}',
        b'{"extra": {}, "files": {"a\\u0000": 1}}',
        b'{"extra": {}, "files": [1]}', b'{"extra": {}, "files": {"common.pt": ' + b"9" * 6000 + b"}}",
        b'{"extra": {}, "zero_centred_norms": "yes", "files": {"": {}, "/dev/zero": {}}}',
        json.dumps(junk(rng)).encode("utf-8", "surrogatepass"),
        json.dumps({"extra": junk(rng), "files": junk(rng), "versions": junk(rng)}).encode("utf-8", "surrogatepass"),
    ]  # fmt: skip
    if path.parent.is_dir():
        path.write_bytes(rng.choice(texts))


def tracker(directory: Path, rng: random.Random) -> None:
    """What a trainer notes of its iterations, and more directories that could be some."""
    texts = [
        b"", b"release", b"-1", b"../outside", b"9" * 60, b"1\n2", b"\x1b[31m", "\u0661\u0660\u0660".encode(), b"100\0",
        b"0100", b"1e2", b"x" * 70, b"release/../../outside", b"\xff",
    ]  # fmt: skip
    if rng.random() < 0.8:
        (directory / "latest_checkpointed_iteration.txt").write_bytes(rng.choice(texts))
    else:
        (directory / "latest_checkpointed_iteration.txt").unlink(missing_ok=True)
    for _ in range(rng.choice((0, 1, 2))):
        name = rng.choice(
            (
                "iter_0000200",
                "iter_" + "\u0660" * 7,
                "release",
                "iter_" + ESCAPES,
                "iter_999999999999",
                "mp_rank_00",
            )
        )
        path = directory / name
        if not os.path.lexists(path):
            rng.choice((path.mkdir, lambda: path.symlink_to(directory.parent / "outside"), lambda: os.mkfifo(path)))()  # noqa: B023


def yaml_text(directory: Path, rng: random.Random) -> None:
    """Megatron-Bridge's notes, of which one setting a line is read."""
    said = f"  {rng.choice(('num_layers', 'kv_channels', 'rotary_base', 'layernorm_epsilon'))}: {junk(rng)!r}\n"
    texts = [
        "", "model:\n", "model: [\n", "model:\n" + said * 3, "a: &a [x,x]\nb: &b [*a,*a]\nmodel: *b\n",
        "model: !!python/object/apply:os.system ['true']\n", "model:\n" + "  a: 1\n" * 200_000,
        "model:\n" + " " * 10**6, "model:\n  num_query_groups: " + "[" * 50_000 + "\n", "model:\n" + said + ESCAPES,
    ]  # fmt: skip
    (iteration_of(directory) / "run_config.yaml").write_bytes(rng.choice(texts).encode("utf-8", "surrogatepass"))


def index_entries(directory: Path, rng: random.Random) -> None:
    """Places, sizes, types and names that there is no data for, or other data."""
    odd: list[Any] = [
        -1, 0, 1, 2**31, 2**48 + 1, 2**62, True, 0.5, None, "x", [], (), (1,), [2**40] * 9, "../outside/secret.txt",
        "/dev/zero", "..", "", "a\0b", ESCAPES, "common.pt", "\udc80", torch.Size([1]),
    ]  # fmt: skip

    def edit(metadata: Metadata) -> None:
        stored, places = metadata.state_dict_metadata, metadata.storage_data
        assert places is not None
        for _ in range(rng.choice((1, 1, 2))):
            key = rng.choice(sorted(stored))
            of_key = [place for place in places if place.fqn == key]
            entry, place = stored[key], rng.choice(of_key) if of_key else rng.choice(list(places))
            change = rng.randrange(8)
            if change == 0:
                setattr(places[place], rng.choice(("offset", "length", "relative_path")), rng.choice(odd))
            elif change == 1 and isinstance(entry, TensorStorageMetadata):
                entry.size = rng.choice([*odd, torch.Size([*entry.size][::-1]), torch.Size([*entry.size, 1])])
            elif change == 2 and isinstance(entry, TensorStorageMetadata) and entry.chunks:
                setattr(rng.choice(entry.chunks), rng.choice(("offsets", "sizes")), rng.choice(odd))
            elif change == 3 and isinstance(entry, TensorStorageMetadata):
                entry.properties = TensorProperties(
                    rng.choice([torch.float32, torch.int8, torch.float8_e4m3fn, torch.bool])
                )
            elif change == 4 and isinstance(entry, TensorStorageMetadata):
                entry.chunks = rng.choice([[], entry.chunks * 2, entry.chunks * 2000, entry.chunks[1:], None])
            elif change == 5:
                stored[rng.choice(["x", "", ESCAPES, f"{key}.more", "decoder.layers.99.x.weight", "module." + key])] = (
                    stored.pop(key)
                )
            elif change == 6:
                stored[key] = rng.choice(
                    [
                        BytesStorageMetadata(),
                        None,
                        7,
                        TensorStorageMetadata(
                            TensorProperties(torch.bfloat16),
                            torch.Size([2]),
                            [ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))],
                        ),
                    ]
                )  # type: ignore[assignment]
            else:
                places.pop(place)

    edit_index(iteration_of(directory), edit)


def pickle_of(rng: random.Random, touched: Path) -> bytes:
    """A pickle that nobody who writes checkpoints writes."""
    # Each level holds the one below it so many times: little to read, endless to walk, or to show.
    levels = (
        b"("
        + b"h\x00" * 100
        + b"l"
        + b"".join(b"q" + bytes([n]) + b"0(" + (b"h" + bytes([n])) * 100 + b"l" for n in range(1, 9))
    )
    many = b"]q\x00Na0" + levels
    endless = b"]q\x00h\x00a"
    deep = b"]" * 50_000 + b"a" * 49_999
    calls = pickle.dumps({"args": Touching(touched), "state": [Touching(touched)]})
    return rng.choice(
        (
            b"\x80\x02" + endless + b".",
            b"\x80\x02" + many + b".",
            b"\x80\x02}X\x04\x00\x00\x00args" + many + b"s.",
            b"\x80\x02}X\x04\x00\x00\x00args" + endless + b"s.",
            b"\x80\x02" + deep + b".",
            calls,
            b"cposix\nsystem\n(S'true'\ntR.",
            b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
            b"\x80\x02\x8b\xff\xff\xff\x7f" + b"9" * 64,
            b"\x80\x02(i",
            pickle.dumps(Namespace(num_layers=junk(rng, 1))),
            pickle.dumps({"args": Namespace(num_attention_heads=10**4000, rotary_base="\x1b[31m")}),
        )
    )


def index_pickle(directory: Path, rng: random.Random) -> None:
    """Another pickle for the index, or one in the place of a size, or of a table."""
    path, made = iteration_of(directory) / ".metadata", pickle_of(rng, directory.parent / RAN)
    index = path.read_bytes()
    if rng.random() < 0.5:
        path.write_bytes(made)
        return
    # In place of the number 0 of an offset, or of an empty dict: without the header and the end of a pickle.
    inner, old = made.removeprefix(b"\x80\x02").removesuffix(b"."), rng.choice((b"K\x00", b"}", b"K "))
    at = index.find(old, rng.randrange(len(index)))
    path.write_bytes(index[:at] + inner + index[at + len(old) :])


def saved_archive(path: Path, pickled: bytes, rng: random.Random) -> None:
    """What `torch.save` writes, with that pickle in it."""
    buffer = io.BytesIO()
    way = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(buffer, "w", way) as archive:
        archive.writestr(rng.choice(("archive/data.pkl", "archive/data.pkl", "data.pkl", "a/b/data.pkl")), pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", rng.choice(("little", "little", "big", "x" * 99)))
    path.write_bytes(buffer.getvalue())


def noted(directory: Path, rng: random.Random) -> None:
    """What a trainer noted beside the tensors: settings of any type, or what is no data at all."""
    root = iteration_of(directory)
    path = rng.choice((root / "common.pt", root / "common.pt", root / "modelopt_state" / "common.pt"))
    if not path.parent.is_dir():
        path = root / "common.pt"
    if rng.random() < 0.5:
        saved_archive(path, pickle_of(rng, directory.parent / RAN), rng)
        return
    names = (
        "num_layers", "num_attention_heads", "num_query_groups", "group_query_attention", "kv_channels", "norm_epsilon",
        "rotary_base", "rotary_percent", "moe_router_topk", "apply_layernorm_1p", "make_vocab_size_divisible_by",
        "tensor_model_parallel_size", "moe_router_load_balancing_type", "normalization", "position_embedding_type",
    )  # fmt: skip
    said = {name: junk(rng, 1) for name in rng.sample(names, rng.choice((1, 1, 3)))}
    torch.save({"args": Namespace(**said), "iteration": junk(rng), "modelopt_state_dict": junk(rng)}, path)


def object_in_place(directory: Path, rng: random.Random) -> None:
    """Another pickle in the place of an object: settings of a quantizer, random numbers, Transformer Engine's own."""
    root = iteration_of(directory)

    def edit(metadata: Metadata) -> None:
        assert metadata.storage_data is not None
        objects = sorted(
            key for key, it in metadata.state_dict_metadata.items() if isinstance(it, BytesStorageMetadata)
        )
        if not objects:
            return
        key = rng.choice(objects)
        saved_archive(root / "more.distcp", pickle_of(rng, directory.parent / RAN), rng)
        place = next(place for place in metadata.storage_data if place.fqn == key)
        it = metadata.storage_data[place]
        it.relative_path, it.offset, it.length = "more.distcp", 0, (root / "more.distcp").stat().st_size

    edit_index(root, edit)


TRAINED: Mapping[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (
        bytes_flipped, file_cut, not_a_file, not_a_directory, json_text, tracker, yaml_text, index_entries,
        index_pickle, noted, object_in_place,
    )
}  # fmt: skip
