"""A checkpoint to a quantized one without a model: what comes out, what is refused, and how it goes on after a failure.

Every family is held to the bytes of the way through Megatron-Core in tests/families/test_model_free.py.
"""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantplug.errors import (
    ArgumentError,
    DestinationError,
    MappingError,
    QuantplugError,
    ShapeError,
    SourceError,
    UnsupportedModelError,
    UnsupportedQuantizationError,
    WeightError,
    WriteError,
)
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.verify import verify_checkpoint
from tests.export.checkpoints import files_of, read, same_bytes
from tests.export.refusals import offenders, refused

Sources = Callable[[str], Path]
UP = "model.layers.1.mlp.experts.2.up_proj.weight"
GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"


def edited(source: Path, target: Path, tensors: dict[str, torch.Tensor | None], **config: object) -> Path:
    """A copy of a checkpoint with other tensors (None: without it) and settings (None: unset)."""
    target.mkdir()
    settings = {**json.loads((source / "config.json").read_text()), **config}
    settings = {name: value for name, value in settings.items() if value is not None}
    (target / "config.json").write_text(json.dumps(settings))
    changed = {**load_file(source / "model.safetensors"), **tensors}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("name", ["moe_blocks", "dense_blocks", "latent_blocks"])
def test_blocks_are_those_of_the_way_through_megatron(
    name: str, sources: Sources, exports: Callable[..., Path], tmp_path: Path
) -> None:
    result = quantize_checkpoint(sources(name), tmp_path / "out", "fp8_blockwise")
    expected = read(exports(name, "fp8_blockwise"))
    found = read(result.directory)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bytes(found[name], expected[name])] == []


def test_partial_last_blocks_have_scales_of_their_own_and_verify_reads_them(sources: Sources, tmp_path: Path) -> None:
    """As DeepSeek-V3 is published, whose 576 rows of `kv_a_proj_with_mqa` end in half a block."""
    quantize_checkpoint(sources("latent_blocks"), tmp_path / "out", "fp8_blockwise")
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    source, found = read(sources("latent_blocks"))[name].float(), read(tmp_path / "out")
    codes, scales = found[name].float(), found[f"{name}_scale_inv"]
    assert (codes.shape, scales.shape) == ((192, 320), (2, 3))
    for row, column in itertools.product(range(2), range(3)):
        block = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
        assert scales[row, column] == source[block].abs().max() / 448
        # Half a step of E4M3: 3 bits of mantissa, and below 2^-6 steps of 2^-9.
        error = (codes[block] * scales[row, column] - source[block]).abs()
        assert (error <= (source[block].abs() / 16).clamp(min=scales[row, column] * 2.0**-10)).all()
    assert verify_checkpoint(tmp_path / "out", sources("latent_blocks")).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_tensors_keep_their_own_type(dtype: torch.dtype, sources: Sources, tmp_path: Path) -> None:
    tensors = load_file(sources("moe") / "model.safetensors")
    norm = next(name for name in tensors if name.endswith("norm.weight"))
    changed = {name: tensor.to(dtype) for name, tensor in tensors.items() if name != norm}
    said = str(dtype).removeprefix("torch.")
    source = edited(sources("moe"), tmp_path / "in", changed, dtype=said)
    quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    original, quantized = read(source), read(tmp_path / "out")
    plain = [name for name in quantized if name in original and quantized[name].dtype != torch.uint8]
    assert norm in plain
    assert all(same_bytes(quantized[name], original[name]) for name in plain)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == said
    assert verify_checkpoint(tmp_path / "out", source).ok


@pytest.mark.parametrize("exclude", [(), ("model.layers.0.*", "model.layers.1.mlp.*")], ids=["packed", "plain"])
def test_parts_of_one_linear_may_be_of_several_types(
    exclude: tuple[str, ...], sources: Sources, tmp_path: Path
) -> None:
    """Packed they are packed from the values that each holds, plain each keeps its own type."""
    tensors = load_file(sources("moe") / "model.safetensors")
    query = "model.layers.0.self_attn.q_proj.weight"
    # Values that BF16 and FP16 do not hold, and one that FP16 does not: of another part.
    wide = {query: tensors[query].float() * 1.0001, UP: tensors[UP].half()}
    source = edited(sources("moe"), tmp_path / "in", {**wide, GATE: tensors[GATE] * 2**20})
    quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4", exclude=exclude)
    single = {name: tensor.float() for name, tensor in read(source).items()}
    quantize_checkpoint(
        edited(sources("moe"), tmp_path / "single", single, dtype="float32"),
        tmp_path / "expected",
        "w4a16_nvfp4",
        exclude=exclude,
    )
    original, found, expected = read(source), read(tmp_path / "out"), read(tmp_path / "expected")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        is_plain = tensor.dtype is not torch.uint8 and name in original
        assert same_bytes(tensor, original[name] if is_plain else expected[name]), name
    assert (found[query].dtype, found[UP].dtype) == (
        (torch.float32, torch.float16) if exclude else (torch.uint8, torch.uint8)
    )
    assert verify_checkpoint(tmp_path / "out", source).ok


def test_many_files_hold_the_same_tensors(sources: Sources, tmp_path: Path) -> None:
    one = quantize_checkpoint(sources("moe"), tmp_path / "one", "w4a16_nvfp4")
    many = quantize_checkpoint(sources("moe"), tmp_path / "many", "w4a16_nvfp4", max_shard_size=100_000)
    assert one.shards == 1 < many.shards
    expected, found = read(one.directory), read(many.directory)
    assert found.keys() == expected.keys()
    assert all(same_bytes(found[name], expected[name]) for name in expected)


def test_frequencies_of_old_llamas_are_ignored(sources: Sources, tmp_path: Path) -> None:
    frequencies: dict[str, torch.Tensor | None] = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(24) for layer in range(2)
    }
    source = edited(sources("dense"), tmp_path / "in", frequencies)
    quantize_checkpoint(source, tmp_path / "out", "w8a16_fp8")
    quantize_checkpoint(sources("dense"), tmp_path / "expected", "w8a16_fp8")
    found, expected = read(tmp_path / "out"), read(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(same_bytes(found[name], expected[name]) for name in expected)
    assert verify_checkpoint(tmp_path / "out", source).ok
    assert verify_checkpoint(source).ok == verify_checkpoint(sources("dense")).ok


def test_an_empty_quantization_is_none(sources: Sources, tmp_path: Path) -> None:
    source = edited(sources("dense"), tmp_path / "in", {}, quantization_config={})
    quantize_checkpoint(source, tmp_path / "out", "w8a16_fp8")
    assert verify_checkpoint(tmp_path / "out", source).ok


def test_a_disk_without_room_is_found_before_a_file_is_made(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(sources("dense"), tmp_path / "in")
    # A tokenizer can be larger than the weights of a small model.
    (source / "tokenizer.json").write_text(json.dumps({"": "x" * 2**20}))
    quantize_checkpoint(source, tmp_path / "out", "w8a16_fp8")
    needed = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert needed > 2**20
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with refused(WriteError, tmp_path) as caught:
        quantize_checkpoint(source, tmp_path / "again", "w8a16_fp8")
    assert f"{needed:,} needed" in str(caught.value)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    quantize_checkpoint(source, tmp_path / "again", "w8a16_fp8")


def test_an_lm_head_beside_tied_embeddings_is_left_out(sources: Sources, tmp_path: Path) -> None:
    embedding = load_file(sources("tied") / "model.safetensors")["model.embed_tokens.weight"]
    source = edited(sources("tied"), tmp_path / "in", {"lm_head.weight": embedding.clone()})
    quantize_checkpoint(source, tmp_path / "out", "w8a16_fp8")
    assert "lm_head.weight" not in read(tmp_path / "out")


def test_the_source_is_not_changed(sources: Sources, tmp_path: Path) -> None:
    before = files_of(sources("moe"))
    quantize_checkpoint(sources("moe"), tmp_path / "out", "w4a16_nvfp4")
    assert files_of(sources("moe")) == before


def test_excluded_modules_stay_and_are_announced(sources: Sources, tmp_path: Path) -> None:
    quantize_checkpoint(sources("moe"), tmp_path / "out", "w4a16_nvfp4", exclude=["model.layers.0.*", "lm_head"])
    original, quantized = read(sources("moe")), read(tmp_path / "out")
    assert all(same_bytes(quantized[name], original[name]) for name in original if ".layers.0." in name)
    assert quantized["model.layers.1.self_attn.q_proj.weight"].dtype == torch.uint8
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.0.self_attn.q_proj" in ignored
    assert verify_checkpoint(tmp_path / "out", sources("moe")).ok


def test_progress_counts_the_bytes_of_all_weights(sources: Sources, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    result = quantize_checkpoint(
        sources("moe"), tmp_path / "out", "w4a16_nvfp4", progress=lambda *said: seen.append(said)
    )
    size = sum(tensor.nbytes for tensor in read(sources("moe")).values())
    assert result.weight_bytes == size
    for stage in ("Checking weights", "Packing and writing"):
        counts = [(done, total) for name, done, total in seen if name == stage]
        assert counts == sorted(counts)
        assert counts[-1] == (size, size)


def test_a_killed_run_goes_on_and_another_is_refused(sources: Sources, tmp_path: Path) -> None:
    settings = {"format": "w4a16_nvfp4", "max_shard_size": 100_000}
    out = tmp_path / "out"

    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("Packing") and done > total // 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        quantize_checkpoint(sources("moe"), out, **settings, progress=stop)
    assert not out.exists()
    left = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert left

    other = edited(
        sources("moe"), tmp_path / "in", {GATE: load_file(sources("moe") / "model.safetensors")[GATE].flip(0)}
    )
    with pytest.raises(DestinationError, match="unfinished export"):
        quantize_checkpoint(other, out, **settings)
    with pytest.raises(DestinationError, match="unfinished export"):
        quantize_checkpoint(sources("moe"), out, **settings, exclude=["model.layers.1.*"])
    assert {path: path.stat().st_mtime_ns for path in left} == left

    packed: list[int] = []
    result = quantize_checkpoint(
        sources("moe"), out, **settings, progress=lambda stage, done, total: packed.append(total)
    )
    assert packed[-1] < result.weight_bytes
    assert all((out / path.name).stat().st_mtime_ns == changed for path, changed in left.items())
    assert sorted(tmp_path.iterdir()) == sorted([out, other])
    expected = quantize_checkpoint(sources("moe"), tmp_path / "again", **settings)
    assert files_of(out) == files_of(expected.directory)


def test_what_happened_to_an_unfinished_export_meanwhile_is_not_published(sources: Sources, tmp_path: Path) -> None:
    """A flipped bit in a finished file, and a file that somebody put beside it."""
    settings = {"format": "w4a16_nvfp4", "max_shard_size": 100_000}
    out = tmp_path / "out"

    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("Packing") and done > total // 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        quantize_checkpoint(sources("moe"), out, **settings, progress=stop)
    finished = sorted(tmp_path.rglob("*.safetensors"))[0]
    content = bytearray(finished.read_bytes())
    content[-1] ^= 1
    finished.write_bytes(content)
    stray = finished.with_name("modeling_own.py")
    stray.write_text("")
    with pytest.raises(DestinationError, match=r"modeling_own\.py"):
        quantize_checkpoint(sources("moe"), out, **settings)
    assert not out.exists()
    stray.unlink()
    quantize_checkpoint(sources("moe"), out, **settings)
    expected = quantize_checkpoint(sources("moe"), tmp_path / "again", **settings)
    assert files_of(out) == files_of(expected.directory)


def test_side_files_are_chosen_and_said(sources: Sources, tmp_path: Path) -> None:
    source = edited(sources("moe"), tmp_path / "in", {})
    (tmp_path / "secret").write_text("token")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    (source / "tokenizer.json").write_text("{}")
    (source / "helper.so").touch()
    result = quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    assert result.side_files.carried == ("tokenizer.json",)
    assert result.side_files.left_out.keys() == {"notes.txt", "helper.so"}
    assert {"tokenizer.json"} == files_of(tmp_path / "out").keys() - {
        "config.json",
        "hf_quant_config.json",
        "model.safetensors.index.json",
        "model-00001-of-00001.safetensors",
    }


def test_a_run_that_fails_before_its_first_file_leaves_nothing(sources: Sources, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("Packing"):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        quantize_checkpoint(sources("moe"), tmp_path / "parent" / "out", "w4a16_nvfp4", progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_name_every_tensor(value: float, sources: Sources, tmp_path: Path) -> None:
    tensors = load_file(sources("moe") / "model.safetensors")
    for name in (UP, "model.norm.weight"):
        tensors[name].view(-1)[3] = value
    source = edited(sources("moe"), tmp_path / "in", tensors)
    with refused(WeightError, tmp_path) as caught:
        quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    assert offenders(caught) == {(UP, 2), ("model.norm.weight", None)}
    assert "[0, 3]" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "format_name", "up", "expert"),
    [("moe", "w4a16_nvfp4", UP, 2), ("dense", "w8a16_fp8", "model.layers.0.mlp.up_proj.weight", None)],
)
def test_an_outlier_that_would_drown_its_weight_is_refused(
    name: str, format_name: str, up: str, expert: int | None, sources: Sources, tmp_path: Path
) -> None:
    tensors: dict[str, torch.Tensor | None] = {**load_file(sources(name) / "model.safetensors")}
    # Of random normal weights every block of 16 has an amax, and gate and up are scaled by one amax.
    weight = tensors[up]
    assert weight is not None
    weight[3, 7] = 3e38
    source = edited(sources(name), tmp_path / "in", tensors)
    with refused(WeightError, tmp_path) as caught:
        quantize_checkpoint(source, tmp_path / "out", format_name)
    (offender,) = caught.value.offenders
    blocks = 2 * weight.numel() // 16
    assert (offender.expert, f"{blocks - 1} of {blocks} blocks" in offender.reason) == (expert, True), offender


def test_an_outlier_that_costs_no_block_is_taken(sources: Sources, tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor | None] = {**load_file(sources("moe") / "model.safetensors")}
    weight = tensors[UP]
    assert weight is not None
    weight[3, 7] = 1000 * weight.abs().amax()
    quantize_checkpoint(edited(sources("moe"), tmp_path / "in", tensors), tmp_path / "out", "w4a16_nvfp4")


REFUSALS: list[tuple[dict[str, torch.Tensor | None], dict[str, object], type[QuantplugError], str]] = [
    ({UP: None}, {}, MappingError, UP),
    ({"model.layers.0.stray.weight": torch.zeros(2)}, {}, MappingError, "model.layers.0.stray.weight"),
    ({"model.layers.0.self_attn.o_proj.bias": torch.zeros(160)}, {}, MappingError, "biases that are not served"),
    ({UP: torch.zeros(2, 2, dtype=torch.int8)}, {}, SourceError, UP),
    ({UP: torch.zeros(96, 160, dtype=torch.float64)}, {}, SourceError, UP),
    ({UP: torch.zeros(94, 160, dtype=torch.bfloat16)}, {}, ShapeError, UP),
    ({UP: torch.zeros(96, 158, dtype=torch.bfloat16)}, {}, ShapeError, GATE),
    ({"model.norm.weight": torch.zeros((), dtype=torch.bfloat16)}, {}, ShapeError, "model.norm.weight"),
    ({}, {"num_attention_heads": 3}, ShapeError, "model.layers.0.self_attn.q_proj.weight"),
    ({}, {"moe_intermediate_size": 48}, ShapeError, GATE),
    ({}, {"num_experts": 3}, MappingError, "model.layers.0.mlp.experts.3.gate_proj.weight"),
    ({}, {"hidden_size": None}, SourceError, "hidden_size"),
    ({}, {"num_hidden_layers": "two"}, SourceError, "sizes"),
    ({}, {"architectures": None}, SourceError, "names no architecture"),
    ({}, {"architectures": ["BertModel"]}, UnsupportedModelError, "BertModel"),
    ({}, {"quantization_config": {"quant_method": "fp8"}}, SourceError, "remove quantization_config from config.json"),
    (
        {UP: torch.zeros(96, 160).to(torch.float8_e4m3fn)},
        {"quantization_config": {"quant_method": "fp8"}},
        SourceError,
        "is FP8 without its *_scale",
    ),
    (
        {f"{UP}_scale": torch.ones(1)},
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        SourceError,
        "quantized already",
    ),
    ({}, {"num_experts": "4"}, SourceError, "num_experts: is '4', not a whole number"),
    ({}, {"moe_intermediate_size": "96"}, SourceError, "moe_intermediate_size: is '96', not a whole number"),
    ({}, {"num_hidden_layers": 2.0}, SourceError, "num_hidden_layers: is 2.0, not a whole number"),
]


@pytest.mark.parametrize(("tensors", "config", "kind", "named"), REFUSALS)
def test_a_source_that_is_not_what_it_says_is_refused(
    tensors: dict[str, torch.Tensor | None],
    config: dict[str, object],
    kind: type[QuantplugError],
    named: str,
    sources: Sources,
    tmp_path: Path,
) -> None:
    source = edited(sources("moe"), tmp_path / "in", tensors, **config)
    with refused(kind, tmp_path) as caught:
        quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    assert named in str(caught.value)


def test_plain_tensors_are_held_against_the_config(sources: Sources, tmp_path: Path) -> None:
    """Those of a pruned model whose config was edited, and others that only readers would find."""
    layer = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        f"{layer}mlp.gate.weight": (8, 160),
        f"{layer}self_attn.q_norm.weight": (64,),
        f"{layer}self_attn.k_norm.weight": (1, 32),
        f"{layer}input_layernorm.weight": (1, 160),
        "model.norm.weight": (128,),
        "lm_head.weight": (300, 160),
    }
    wrong: dict[str, torch.Tensor | None] = {
        name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()
    }
    source = edited(sources("moe"), tmp_path / "in", wrong)
    with refused(ShapeError, tmp_path) as caught:
        quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    assert {name for name, _ in offenders(caught)} == shapes.keys()


def test_sizes_that_do_not_divide_are_named_as_in_the_checkpoint(sources: Sources, tmp_path: Path) -> None:
    with refused(ShapeError, tmp_path) as caught:
        quantize_checkpoint(sources("moe"), tmp_path / "out", "fp8_blockwise")
    assert (f"{GATE} and {UP}", 2) in offenders(caught)
    assert "decoder." not in str(caught.value)


@pytest.mark.parametrize("name", ["w8a8", "fp8_weight_only", ""])
def test_a_format_that_is_not_known_is_refused(name: str, sources: Sources, tmp_path: Path) -> None:
    with refused(ArgumentError, tmp_path) as caught:
        quantize_checkpoint(sources("moe"), tmp_path / "out", name)
    assert "w4a16_nvfp4, nvfp4, fp8, w8a16_fp8, fp8_blockwise, fp8_dynamic, int4, mxfp8" in str(caught.value)


@pytest.mark.parametrize(("name", "instead"), [("nvfp4", "w4a16_nvfp4"), ("fp8", "w8a16_fp8")])
def test_a_format_of_activations_is_refused_with_the_one_that_works(
    name: str, instead: str, sources: Sources, tmp_path: Path
) -> None:
    with refused(UnsupportedQuantizationError, tmp_path) as caught:
        quantize_checkpoint(sources("dense"), tmp_path / "out", name)
    assert caught.value.remedy.startswith(f"Use {instead}:")
    quantize_checkpoint(sources("dense"), tmp_path / "out", instead)


def test_a_shard_size_that_cannot_be_is_refused(sources: Sources, tmp_path: Path) -> None:
    with refused(ArgumentError, tmp_path) as caught:
        quantize_checkpoint(sources("moe"), tmp_path / "out", "w8a16_fp8", max_shard_size=0)
    assert offenders(caught) == {("max_shard_size", None)}


def test_a_destination_that_holds_files_is_refused(sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with refused(DestinationError, tmp_path):
        quantize_checkpoint(sources("moe"), tmp_path / "out", "w8a16_fp8")


def test_a_source_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with refused(SourceError, tmp_path):
        quantize_checkpoint(tmp_path / "absent", tmp_path / "out", "w8a16_fp8")
