"""What a checkpoint stands for by decoders of others, and what transformers computes of it: the servers' oracle."""

import json
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.logits import transformers_model

Tensors = dict[str, torch.Tensor]

_PARTS = ("weight_scale_2", "weight_scale_inv", "weight_scale", "weight_global_scale", "weight_shape", "input_scale")


def dequantized(export: Path, source: Path, directory: Path) -> Path:
    """The checkpoint that an export stands for, in FP32 and by the names of its source."""
    directory.mkdir(parents=True)
    stored: Tensors = {}
    for file in sorted(export.glob("*.safetensors")):
        stored |= load_file(file)
    plain = {name: tensor.float() for name, tensor in _plain(stored).items()}
    names = {name: tensor.shape for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    values = {name: plain[name] if name in plain else _together(name, shape, plain) for name, shape in names.items()}
    save_file(values, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def logprobs(directory: Path, prompts: list[list[int]]) -> torch.Tensor:
    """[prompts, positions but the last, vocabulary], by transformers in FP32."""
    model = transformers_model(directory)
    with torch.no_grad():
        return model(torch.tensor(prompts), use_cache=False).logits.log_softmax(-1)[:, :-1]


def _plain(stored: Tensors) -> Tensors:
    plain: Tensors = {}
    for name, tensor in stored.items():
        module, _, last = name.rpartition(".")
        if last in _PARTS or last in ("k_scale", "v_scale", "input_global_scale"):
            continue
        if name.endswith(("_scales", *(f"_{part}" for part in _PARTS))):
            continue
        if name.endswith("_blocks"):
            linear = name.removesuffix("_blocks")
            plain[linear] = convert_moe_packed_tensors(tensor, stored[f"{linear}_scales"], dtype=torch.float32)
        elif f"{name}_weight_scale" in stored:
            plain[name] = _all_experts(name, stored)
        elif last == "weight_packed":
            plain[f"{module}.weight"] = _decoded(tensor, module, stored)
        elif last == "weight" and tensor.dtype in (torch.uint8, torch.float8_e4m3fn):
            plain[name] = _decoded(tensor, module, stored)
        else:
            plain[name] = tensor
    return plain


def _decoded(codes: torch.Tensor, module: str, stored: Tensors) -> torch.Tensor:
    parts = {part: stored[f"{module}.{part}"] for part in _PARTS if f"{module}.{part}" in stored}
    scale = parts.get("weight_scale", parts.get("weight_scale_inv"))
    assert scale is not None, module
    if codes.dtype is torch.int32:
        shape = torch.Size(parts["weight_shape"].tolist())
        whole = unpack_from_int32(codes, 4, shape).float()
        return whole * scale.float().repeat_interleave(shape[1] // scale.shape[1], 1)
    if codes.dtype is torch.uint8:
        above = parts.get("weight_scale_2")
        above = 1 / parts["weight_global_scale"] if above is None else above
        packed = NVFP4Tensor(codes, scale, 16, torch.float32, per_tensor_scale=above.reshape(()))
        return packed.dequantize(torch.float32)
    if scale.dtype is torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
        whole = MXTensor(codes, scale, torch.float8_e4m3fn, 32, torch.float32, None, None, False)
        return whole.dequantize(torch.float32)
    if (scale.dim() == 2 and scale.shape[1] > 1) or "weight_scale_inv" in parts:
        tall = scale.repeat_interleave(128, 0)[: codes.shape[0]]
        return codes.float() * tall.repeat_interleave(128, 1)[:, : codes.shape[1]]
    return codes.float() * scale.float()


def _all_experts(name: str, stored: Tensors) -> torch.Tensor:
    """[experts, in, out] of codes [experts, in / 2, out], all with one scale above those of blocks (Llama 4)."""
    codes, scale = (stored[it].mT.contiguous() for it in (name, f"{name}_weight_scale"))
    above = stored[f"{name}_weight_scale_2"].reshape(())
    packed = NVFP4Tensor(codes.flatten(0, 1), scale.flatten(0, 1), 16, torch.float32, per_tensor_scale=above)
    return packed.dequantize(torch.float32).unflatten(0, codes.shape[:2]).mT.contiguous()


def _together(name: str, shape: torch.Size, plain: Tensors) -> torch.Tensor:
    """All experts of a layer in one tensor, as the source has them, of experts that are written one by one."""
    prefix, _, last = name.rpartition(".")
    linears = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
    experts = [
        torch.cat([plain[f"{prefix}.{expert}.{linear}.weight"] for linear in linears]) for expert in range(shape[0])
    ]
    together = torch.stack(experts)
    return together if together.shape == shape else together.mT.contiguous()
