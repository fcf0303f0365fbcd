"""What the tests of the export share: models read from a source, ways to quantize them, and plain looks at files."""

import copy
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file
from transformers import AutoConfig

from quantplug import import_mcore_gpt_from_hf
from quantplug.calibration.quantizers import needs_amax
from quantplug.mappings.families import find_family
from quantplug.megatron.models.build import LayerSpec, build_model
from quantplug.megatron.parallel import initialize_parallel, set_virtual_stages
from quantplug.megatron.parameters import LanguageModel
from quantplug.plugins import quant_cfg  # and registers the wrappers

INPUTS_OFF = {"quantizer_name": "*input_quantizer", "enable": False}


def _with(config: dict[str, Any], *rules: dict[str, Any]) -> dict[str, Any]:
    return {**config, "quant_cfg": [*copy.deepcopy(config["quant_cfg"]), *rules]}


SCHEMES: dict[str, dict[str, Any]] = {
    "w4a16_nvfp4": mtq.W4A16_NVFP4_CFG,
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
    "w8a16_fp8": _with(mtq.FP8_DEFAULT_CFG, INPUTS_OFF),
    "fp8_blockwise": mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
    "fp8_dynamic": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "int4": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
    "mxfp8": mtq.MXFP8_DEFAULT_CFG,
}


@contextmanager
def one_rank() -> Iterator[None]:
    """Megatron's parallel state of one rank, which stays for the tests that follow.

    Models keep the groups that they were made with, and every group has threads: one set for each test would be
    thousands of them.
    """
    if not parallel_state.model_parallel_is_initialized():
        initialize_parallel()
    set_virtual_stages(None)  # A test before may have built some.
    yield


def build(
    source: Path,
    layer_spec: LayerSpec = LayerSpec.TRANSFORMER_ENGINE,
    dtype: torch.dtype = torch.bfloat16,
    **changes: Any,
) -> LanguageModel:
    """An empty model of a checkpoint's config, all NaN: what the import does not write must show."""
    config = {**AutoConfig.from_pretrained(source).to_dict(), **changes}
    family = find_family(config["architectures"][0])
    model = build_model(family.megatron_config(config), layer_spec=layer_spec, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    return model


def load(source: Path, layer_spec: LayerSpec = LayerSpec.TRANSFORMER_ENGINE, **settings: Any) -> LanguageModel:
    model = build(source, layer_spec, **settings)
    import_mcore_gpt_from_hf(model, source)
    return model


def quantize(
    model: LanguageModel, scheme: str, source: Path | None = None, *, keep_experts: bool = False
) -> LanguageModel:
    """Quantizes with calibrated weights, and input amaxes set by hand: a forward of TE's modules needs a GPU.

    By ModelOpt's own config; or by ours, which knows what servers of the model of a source cannot read.
    """
    ours = None if source is None else quant_cfg(scheme, source, keep_experts=keep_experts, preset="all")
    config = ours or SCHEMES[scheme]
    mtq.quantize(model, config)
    for name, module in model.named_modules():
        if name.endswith(".input_quantizer") and needs_amax(module):
            module.amax = torch.tensor(input_amax(name.removesuffix(".input_quantizer")))
    return model


def input_amax(linear: str) -> float:
    """An amax of its own for the input of every linear, by its Megatron name."""
    return 0.25 + zlib.crc32(linear.encode()) / 2**28


def read(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory of safetensors, by safetensors' own reader."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        loaded = load_file(path)
        assert not tensors.keys() & loaded.keys()
        tensors |= loaded
    return tensors


def raw(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes: unlike `==`, they tell -0.0 from 0.0, and a NaN is equal to itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (first.dtype, first.shape) == (second.dtype, second.shape) and raw(first) == raw(second)


def assert_same_export(found: Path, expected: Path) -> None:
    """The same tensors byte for byte, in files of the same names, and the same JSON."""
    tensors, others = read(found), read(expected)
    assert tensors.keys() == others.keys()
    assert [name for name in others if not same_bytes(tensors[name], others[name])] == []
    assert {path.name for path in found.iterdir()} == {path.name for path in expected.iterdir()}
    for path in expected.glob("*.json"):
        assert (found / path.name).read_text() == path.read_text(), path.name


def files_of(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def scale_group(name: str) -> str:
    """What shares scales with a source weight: q, k and v of a layer; gate and up of an MLP or expert; else itself."""
    module, projection, _ = name.rsplit(".", 2)
    groups = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
    return f"{module}.{groups.get(projection, projection)}"


def linear_weights(source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that every scheme of these tests quantizes: all projections, no router, no vocabulary."""
    return {name: tensor for name, tensor in source.items() if name.endswith("_proj.weight")}


def group_amaxes(source: dict[str, torch.Tensor]) -> dict[str, float]:
    """max |w| of every scale group, from the source's own tensors, by weight name."""
    linears = linear_weights(source)
    groups: dict[str, float] = {}
    for name, tensor in linears.items():
        group = scale_group(name)
        groups[group] = max(groups.get(group, 0.0), tensor.abs().max().item())
    return {name: groups[scale_group(name)] for name in linears}
