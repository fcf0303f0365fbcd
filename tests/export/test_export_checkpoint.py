"""A training checkpoint straight to Hugging Face: what is asked for, what is refused, and that nothing of it runs.

That the bytes are those of an export of the model is shown of every family in tests/families/test_checkpoints.py.
"""

import argparse
import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from quantplug import export_checkpoint, quantize_checkpoint
from quantplug.checkpoint.torch_dist.index import read_index
from quantplug.errors import (
    ArgumentError,
    CheckpointError,
    DestinationError,
    MappingError,
    QuantplugError,
    ShapeError,
    SourceError,
    UnsupportedQuantizationError,
    WeightError,
)
from tests.checkpoint.torch_dist.written import Touching, edit_index, put_object, save_model
from tests.export.checkpoints import files_of, read, same_bytes

WORDS = "embedding.word_embeddings.weight"
QKV = "decoder.layers.1.self_attention.linear_qkv.weight"


@pytest.fixture(scope="module")
def saved(tiny_qwen3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, saved one by one. Nobody may change it."""
    return save_model(tiny_qwen3_dir, tmp_path_factory.mktemp("saved") / "dense")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copy")


def resaved(saved: Path, directory: Path, change: Callable[[dict[str, torch.Tensor]], object], hf: Path) -> Path:
    return save_model(hf, directory, change)


def assert_same(found: Path, expected: Path) -> None:
    tensors, others = read(found), read(expected)
    assert tensors.keys() == others.keys()
    assert [name for name in others if not same_bytes(tensors[name], others[name])] == []


def test_the_model_comes_out_as_it_was(saved: Path, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    result = export_checkpoint(saved, tmp_path / "out", tiny_qwen3_dir)

    assert_same(tmp_path / "out", tiny_qwen3_dir)
    assert (result.algorithm, result.checkpoint, result.aside) == (None, saved, ())


@pytest.mark.parametrize("format_name", ["w4a16_nvfp4", "w8a16_fp8", "mxfp8"])
def test_weight_only_formats_are_those_of_quantize(
    format_name: str, saved: Path, tiny_qwen3_dir: Path, tmp_path: Path
) -> None:
    choices: dict[str, Any] = {"exclude": ["model.layers.0.*"]}
    export_checkpoint(saved, tmp_path / "out", tiny_qwen3_dir, format_name, **choices)
    quantize_checkpoint(tiny_qwen3_dir, tmp_path / "expected", format_name, **choices)

    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_an_iteration_is_chosen_of_a_root(saved: Path, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    for iteration in (10, 20):
        shutil.copytree(saved, tmp_path / "root" / f"iter_{iteration:07d}")
    (tmp_path / "root" / "latest_checkpointed_iteration.txt").write_text("20")

    newest = export_checkpoint(tmp_path / "root", tmp_path / "newest", tiny_qwen3_dir)
    first = export_checkpoint(tmp_path / "root", tmp_path / "first", tiny_qwen3_dir, iteration=10)

    assert (newest.checkpoint.name, first.checkpoint.name) == ("iter_0000020", "iter_0000010")


def test_what_is_no_model_is_left_aside_and_said(copy: Path, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    put_object(copy, "rng_state/shard_0_1", [{"seed": 3}])

    result = export_checkpoint(copy, tmp_path / "out", tiny_qwen3_dir)

    assert [aside.kind for aside in result.aside] == ["random number generators"]
    assert any("random number generators, 1 entries" in line for line in result.said())


def test_names_of_wrappers_are_taken_off(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[f"module.{key}"] = tensors.pop(key)

    export_checkpoint(save_model(tiny_qwen3_dir, tmp_path / "wrapped", wrap), tmp_path / "out", tiny_qwen3_dir)

    assert_same(tmp_path / "out", tiny_qwen3_dir)


def test_a_bit_that_flipped_since_the_save_is_found(copy: Path, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    """Where `save_checkpoint` noted the digests of all files; trainers note none."""
    path = next(copy.glob("*.distcp"))
    content = bytearray(path.read_bytes())
    digest = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (copy / "quantplug.json").write_text(json.dumps({"extra": {}, "files": {path.name: digest}}))
    export_checkpoint(copy, tmp_path / "out", tiny_qwen3_dir)

    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256") as caught:
        export_checkpoint(copy, tmp_path / "again", tiny_qwen3_dir)
    assert [offender.parameter for offender in caught.value.offenders] == [str(path)]
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("trained", "said"),
    [
        ({"use_rope_scaling": True, "position_embedding_type": "rope"}, "rope_scaling: is 8.0 by"),
        ({"rotary_seq_len_interpolation_factor": 4}, "seq_len_interpolation_factor: is 4 by"),
        ({"position_embedding_type": "none"}, "position_embedding_type: is None by"),
    ],
)
def test_rotations_that_shapes_do_not_show_are_those_of_the_config(
    trained: dict[str, Any], said: str, copy: Path, tiny_qwen3_dir: Path, tmp_path: Path
) -> None:
    torch.save({"args": argparse.Namespace(**trained)}, copy / "common.pt")
    with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
        export_checkpoint(copy, tmp_path / "out", tiny_qwen3_dir)
    assert not (tmp_path / "out").exists()
    names = [offender.parameter for offender in caught.value.offenders]
    export_checkpoint(copy, tmp_path / "out", tiny_qwen3_dir, unchecked_settings=names)


def test_a_vocabulary_that_grew_is_exported_by_its_number(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    def grow(tensors: dict[str, torch.Tensor]) -> None:
        for key in (WORDS, "output_layer.weight"):
            tensors[key] = torch.cat([tensors[key], *[tensors[key]] * 5])[:2048]

    directory = save_model(tiny_qwen3_dir, tmp_path / "grown", grow)
    with pytest.raises(ShapeError, match="--vocab-size"):
        export_checkpoint(directory, tmp_path / "out", tiny_qwen3_dir)
    export_checkpoint(directory, tmp_path / "out", tiny_qwen3_dir, vocab_size=2000)

    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 2000
    assert {len(read(tmp_path / "out")[name]) for name in ("model.embed_tokens.weight", "lm_head.weight")} == {2000}
    assert read(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"].shape == (224, 160)


@pytest.mark.parametrize("quantizer", ["weight_quantizer", "input_quantizer"])
def test_an_amax_without_settings_is_damage(quantizer: str, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    """Nothing would say how it quantizes, and the weight would pass for one that was never quantized."""
    name = QKV.replace("weight", quantizer)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}._amax"] = torch.ones(())

    directory = save_model(tiny_qwen3_dir, tmp_path / "saved", add)
    with pytest.raises(CheckpointError) as caught:
        export_checkpoint(directory, tmp_path / "out", tiny_qwen3_dir)
    assert [offender.parameter for offender in caught.value.offenders] == [name]
    assert not (tmp_path / "out").exists()


def without(key: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.__delitem__(key)


def with_value(key: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[key].view(-1)[3:4].fill_(value)


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["decoder.layers.1.self_attention.linear_q.weight"] = tensors.pop(QKV)


def twice(tensors: dict[str, torch.Tensor]) -> None:
    key = "decoder.layers.{}.mlp.linear_fc2.weight"
    tensors["decoder.layers.mlp.linear_fc2.weight"] = torch.stack([tensors[key.format(layer)] for layer in range(2)])


def more_layers(tensors: dict[str, torch.Tensor]) -> None:
    key = "decoder.layers.{}.mlp.linear_fc2.weight"
    stacked = torch.stack([tensors.pop(key.format(layer)) for layer in range(2)])
    tensors["decoder.layers.mlp.linear_fc2.weight"] = torch.cat([stacked, stacked])


def more_words(tensors: dict[str, torch.Tensor]) -> None:
    tensors[WORDS] = torch.zeros(2000, tensors[WORDS].shape[1], dtype=torch.bfloat16)


def whole_numbers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[QKV] = tensors[QKV].to(torch.int32)


def narrower(tensors: dict[str, torch.Tensor]) -> None:
    tensors[QKV] = tensors[QKV][:-48]


WRONG: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], type[QuantplugError], str]] = {
    "missing": (without(QKV), MappingError, r"linear_qkv\.weight: needed for model\.layers\.1\.self_attn\.q_proj"),
    "unknown": (rename, MappingError, r"layers\.1\.self_attention\.linear_q\.weight"),
    "twice": (twice, MappingError, "a second time"),
    "more layers": (more_layers, ShapeError, r"stacks \[4\], the config has \[2\]"),
    "another vocabulary": (more_words, ShapeError, "has 2000 rows"),
    "another type": (whole_numbers, CheckpointError, "torch.int32"),
    "another shape": (narrower, ShapeError, "linear_qkv"),
    "NaN": (with_value(QKV, float("nan")), WeightError, "NaN"),
}


@pytest.mark.parametrize(("change", "error", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_is_not_the_model_of_the_config_is_refused_by_name(
    change: Callable[[dict[str, torch.Tensor]], object],
    error: type[QuantplugError],
    said: str,
    tiny_qwen3_dir: Path,
    tmp_path: Path,
) -> None:
    directory = save_model(tiny_qwen3_dir, tmp_path / "wrong", change)

    with pytest.raises(error, match=said):
        export_checkpoint(directory, tmp_path / "out", tiny_qwen3_dir)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("choices", "error"),
    [
        ({"format": "nvfp4"}, UnsupportedQuantizationError),
        ({"format": "int3"}, ArgumentError),
        ({"format": "int4", "group_size": 64}, ArgumentError),
        ({"group_size": 32}, ArgumentError),
        ({"exclude": ["model.layers.0.*"]}, ArgumentError),
        ({"expert_format": "w4a16_nvfp4"}, ArgumentError),
        ({"format": "fp8_dynamic", "expert_format": "w4a16_nvfp4"}, ArgumentError),
        ({"format": "plain", "quantize_mtp": True}, ArgumentError),
        ({"kv_cache": "fp8_cast"}, ArgumentError),
        ({"preset": "mlp_only"}, ArgumentError),
        ({"input_scale": 1.0}, ArgumentError),
        ({"format": "plain", "input_scale": 0.0}, ArgumentError),
        ({"format": "fp8", "input_scale": 0.0}, ArgumentError),
        ({"format": "w4a16_nvfp4", "input_scale": 1.0}, ArgumentError),
        ({"format": "w4a16_nvfp4", "preset": "all_of_it"}, ArgumentError),
        ({"amax": "larger"}, ArgumentError),
        ({"format": "w4a16_nvfp4", "exclude": ["absent"]}, MappingError),
        ({"dtype": torch.int8}, ArgumentError),
        ({"iteration": 3}, CheckpointError),
        ({"vocab_size": 0}, ArgumentError),
    ],
)
def test_choices_that_cannot_be_served_are_refused(
    choices: dict[str, Any], error: type[QuantplugError], saved: Path, tiny_qwen3_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(error):
        export_checkpoint(saved, tmp_path / "out", tiny_qwen3_dir, **choices)
    assert list(tmp_path.iterdir()) == []


def test_a_destination_in_use_is_kept(saved: Path, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()

    with pytest.raises(DestinationError):
        export_checkpoint(saved, tmp_path, tiny_qwen3_dir)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def hostile_index(directory: Path, mark: Path) -> None:
    def edit(metadata: Metadata) -> None:
        metadata.planner_data = Touching(mark)

    edit_index(directory, edit)


def hostile_common(directory: Path, mark: Path) -> None:
    torch.save({"args": Touching(mark)}, directory / "common.pt")


def hostile_settings(directory: Path, mark: Path) -> None:
    put_object(directory, "decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1", Touching(mark))
    (directory / "modelopt_state").mkdir()


def hostile_tensor(directory: Path, mark: Path) -> None:
    extent = read_index(directory).tensors[WORDS].chunks[0].extent
    with (directory / extent.file).open("r+b") as file:
        file.seek(extent.offset)
        file.write(pickle.dumps(Touching(mark)))


@pytest.mark.parametrize("place", [hostile_index, hostile_common, hostile_settings, hostile_tensor])
def test_nothing_in_a_checkpoint_runs(
    place: Callable[[Path, Path], None], copy: Path, tiny_qwen3_dir: Path, tmp_path: Path
) -> None:
    place(copy, tmp_path / "ran")

    with suppress(CheckpointError):
        export_checkpoint(copy, tmp_path / "out", tiny_qwen3_dir)
    assert not (tmp_path / "ran").exists()


def test_a_tensor_that_is_cut_out_of_its_file_is_damage(copy: Path, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    extent = read_index(copy).tensors[WORDS].chunks[0].extent
    with (copy / extent.file).open("r+b") as file:
        file.seek(extent.offset + extent.length - 100)
        file.write(bytes(100))

    with pytest.raises(CheckpointError, match=r"embedding\.word_embeddings\.weight"):
        export_checkpoint(copy, tmp_path / "out", tiny_qwen3_dir)


def doubled(path: Path) -> None:
    """Makes values of the file others where they lie, as a trainer does that saves over its own files."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(512))


def replaced(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy(path, other)
    doubled(other)
    other.replace(path)


def when_packing(checkpoint: Path, change: Callable[[Path], None]) -> Callable[[str, int, int], None]:
    """A progress that changes the files of a checkpoint once they have been looked at."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "Packing and writing" and not changed:
            changed.append(stage)
            for path in list(checkpoint.glob("*.distcp")):
                change(path)

    changed: list[str] = []
    return progress


@pytest.mark.parametrize("change", [doubled, lambda path: os.truncate(path, 100)], ids=["in place", "cut short"])
def test_a_checkpoint_that_changes_is_not_exported(
    change: Callable[[Path], None], copy: Path, tiny_qwen3_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises((SourceError, CheckpointError)):
        export_checkpoint(copy, tmp_path / "out", tiny_qwen3_dir, progress=when_packing(copy, change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [replaced, Path.unlink], ids=["replaced", "removed"])
def test_one_whose_files_go_is_exported_as_it_was(
    change: Callable[[Path], None], copy: Path, tiny_qwen3_dir: Path, tmp_path: Path
) -> None:
    """Files that are open stay what they are."""
    export_checkpoint(copy, tmp_path / "out", tiny_qwen3_dir, progress=when_packing(copy, change))

    assert_same(tmp_path / "out", tiny_qwen3_dir)


def test_a_stopped_export_goes_on_where_it_was(saved: Path, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "Packing and writing" and done > total // 2:
            raise KeyboardInterrupt

    choices = {"max_shard_size": 100_000}
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(saved, tmp_path / "out", tiny_qwen3_dir, progress=stop, **choices)
    kept = {path.name: path.stat().st_ino for path in (tmp_path / ".out.partial" / "checkpoint").glob("*.safetensors")}

    export_checkpoint(saved, tmp_path / "out", tiny_qwen3_dir, **choices)

    assert kept
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in kept} == kept
    assert_same(tmp_path / "out", tiny_qwen3_dir)
