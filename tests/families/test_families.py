"""Every family in both directions. The table of docs/architectures.md has one column for each of these tests."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from transformers import AutoConfig

from quantplug.mappings.families import find_family
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import Family
from quantplug.megatron.models.build import LayerSpec
from quantplug.megatron.parameters import iter_parameters
from tests.export.checkpoints import build, load, one_rank, read, same_bytes
from tests.families.cases import Tensors
from tests.families.served import errors_of
from tests.logits import VOCABULARY, megatron_logits, transformers_logits

PADDED_VOCABULARY = 640
WORD_MATRICES = ("embedding.word_embeddings.weight", "output_layer.weight")

Checkpoint = Callable[[str], Path]
Export = Callable[..., Path]


def family_of(directory: Path) -> tuple[Family, ModelDimensions]:
    config = AutoConfig.from_pretrained(directory).to_dict()
    found = find_family(config["architectures"][0])
    return found, found.dimensions(config)


def held_by_megatron(directory: Path) -> Tensors:
    """The tensors of a checkpoint that parameters of Megatron stand for, each once."""
    found, dims = family_of(directory)
    left_out = found.duplicates(dims)
    tensors = read(directory)
    beside = tuple(beginning for beginning in found.passthrough if not (dims.mtp_layers and beginning == "mtp."))
    return {name: it for name, it in tensors.items() if name not in left_out and not name.startswith(beside)}


def one_by_one(tensors: Tensors, directory: Path) -> Tensors:
    """The tensors of a checkpoint with a tensor for each expert, where its architecture writes quantized ones so."""
    found, dims = family_of(directory)
    written: Tensors = {}
    for name, tensor in tensors.items():
        experts, _, linear = name.rpartition(".")
        if not experts.endswith(".experts") or found.name in ("gpt_oss", "llama4"):
            written[name] = tensor
            continue
        matrices = tensor if tensor.shape[2 if linear == "gate_up_proj" else 1] == dims.hidden_size else tensor.mT
        for expert, matrix_of in enumerate(matrices):
            parts = matrix_of.chunk(2) if linear == "gate_up_proj" else (matrix_of,)
            names = ("gate_proj", "up_proj") if linear == "gate_up_proj" else ("down_proj",)
            written |= {f"{experts}.{expert}.{each}.weight": part for each, part in zip(names, parts, strict=True)}
    return written


def test_config(family: str, checkpoint: Checkpoint) -> None:
    """The Megatron model built from the config has as many weights as the checkpoint, padding apart."""
    with one_rank():
        parameters = list(iter_parameters(build(checkpoint(family))))
    padding = sum(
        (PADDED_VOCABULARY - VOCABULARY) * parameter.tensor.shape[1]
        for parameter in parameters
        if parameter.key.name in WORD_MATRICES
    )
    expected = sum(tensor.numel() for tensor in held_by_megatron(checkpoint(family)).values())
    assert sum(parameter.tensor.numel() for parameter in parameters) - padding == expected


def test_import(family: str, checkpoint: Checkpoint) -> None:
    """Whatever the layouts, Megatron holds the values of the checkpoint, each as often as it is there.

    Its norm after a gated delta net multiplies with 1 + weight, transformers' (`Qwen3NextRMSNormGated`) with weight.
    """
    with one_rank():
        imported = sorted_values(parameter.tensor for parameter in iter_parameters(load(checkpoint(family))))
    stored = held_by_megatron(checkpoint(family)).items()
    expected = (tensor.float() - int(name.endswith("linear_attn.norm.weight")) for name, tensor in stored)
    assert torch.equal(imported, sorted_values(expected))


def sorted_values(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """All values but zeros, which Megatron's padding holds."""
    values = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
    assert not values.isnan().any()
    return values[values != 0].sort().values


def test_export(family: str, checkpoint: Checkpoint, export: Export) -> None:
    """Names, shapes and dtypes are those of the checkpoint that transformers saved."""
    specs = [
        {name: (tensor.shape, tensor.dtype) for name, tensor in read(directory).items()}
        for directory in (checkpoint(family), export(family))
    ]
    assert specs[0] == specs[1]


def test_round_trip(family: str, checkpoint: Checkpoint, export: Export) -> None:
    """HF to Megatron to HF without quantization gives the same bytes."""
    original, exported = read(checkpoint(family)), read(export(family))
    assert original.keys() == exported.keys()
    assert [name for name in original if not same_bytes(original[name], exported[name])] == []


def test_logits(family: str, checkpoint: Checkpoint) -> None:
    """Megatron's own forward of the imported model gives transformers' logits."""
    with one_rank():
        logits = megatron_logits(load(checkpoint(family), LayerSpec.LOCAL, dtype=torch.float32))
    expected = transformers_logits(checkpoint(family))
    assert expected.std() > 0.1
    # Both sum in FP32, in orders that depend on the processor's vector units: on some machines a gated delta net's two
    # ways of the same recurrence differ by 1.6e-5. A setting that is read wrong moves logits by 1e-2 and more.
    torch.testing.assert_close(logits[..., :VOCABULARY], expected, rtol=1e-4, atol=1e-4)


def test_nvfp4(family: str, checkpoint: Checkpoint, export: Export) -> None:
    """Weight-only: codes and scales are ModelOpt's of the source, all else is the source, and verify finds no fault."""
    original = one_by_one(read(checkpoint(family)), checkpoint(family))
    exported = read(export(family, "w4a16_nvfp4"))
    quantized = [name for name, tensor in exported.items() if tensor.dtype == torch.uint8]
    assert quantized
    for name in quantized:
        scale = exported[beside(name, "weight_scale_2")]
        for index, weight in matrices(original[name]):
            packed, block_scales, _ = NVFP4QTensor.quantize(weight, 16, weights_scaling_factor_2=scale)
            assert same_bytes(matrix(exported[name], index), packed._quantized_data), name
            assert same_bytes(matrix(exported[beside(name, "weight_scale")], index), block_scales), name
    check_scales(original, exported, quantized, "weight_scale_2", 448 * 6)
    check_rest(original, exported, quantized)
    assert errors_of(export(family, "w4a16_nvfp4"), checkpoint(family)) == set()


def test_fp8(family: str, checkpoint: Checkpoint, export: Export) -> None:
    """With activations: codes are the source over its scale, all else is the source, and verify finds no fault."""
    original, exported = one_by_one(read(checkpoint(family)), checkpoint(family)), read(export(family, "fp8"))
    quantized = [name for name, tensor in exported.items() if tensor.dtype == torch.float8_e4m3fn]
    assert quantized
    for name in quantized:
        scaled = original[name].float() / exported[beside(name, "weight_scale")]
        assert same_bytes(exported[name], scaled.clamp(-448, 448).to(torch.float8_e4m3fn)), name
        assert exported[beside(name, "input_scale")] > 0
    check_scales(original, exported, quantized, "weight_scale", 448)
    check_rest(original, exported, quantized)
    assert errors_of(export(family, "fp8"), checkpoint(family)) == set()


def beside(name: str, scale: str) -> str:
    """Name of a weight's scale; the experts of a layer in one tensor have theirs as ModelOpt names it."""
    module, _, last = name.rpartition(".")
    return f"{module}.{scale}" if last == "weight" else f"{name}_{scale}"


def matrices(weight: torch.Tensor) -> list[tuple[int | None, torch.Tensor]]:
    """Its [out, in] matrices: itself, or those of all experts, which are stored transposed."""
    return [(None, weight)] if weight.dim() == 2 else [(index, matrix(weight, index)) for index in range(len(weight))]


def matrix(stored: torch.Tensor, index: int | None) -> torch.Tensor:
    return stored if index is None else stored[index].mT


def check_scales(original: Tensors, exported: Tensors, quantized: list[str], suffix: str, largest: float) -> None:
    """A scale of one tensor is the amax, over the tensors beside it that share it, by the format's largest value.

    Megatron has all projections into a gated delta net in one weight, those that are kept too.
    """
    amaxes: dict[tuple[str, float], float] = {}
    for name in quantized:
        parent, scale = name.removesuffix(".weight").rpartition(".")[0], exported[beside(name, suffix)].item()
        projections = [other for other in original if other.startswith(f"{parent}.in_proj_") and ".in_proj_" in name]
        amax = max(original[other].abs().max().item() for other in (name, *projections))
        amaxes[parent, scale] = max(amaxes.get((parent, scale), 0.0), amax)
    for (parent, scale), amax in amaxes.items():
        assert torch.tensor(scale) == torch.tensor(amax) / torch.tensor(largest), parent


def check_rest(original: Tensors, exported: Tensors, quantized: list[str]) -> None:
    assert all(same_bytes(exported[name], tensor) for name, tensor in original.items() if name not in quantized)
    scales = {name for name in exported if name.endswith(("weight_scale", "weight_scale_2", "input_scale"))}
    assert exported.keys() - scales == original.keys()
