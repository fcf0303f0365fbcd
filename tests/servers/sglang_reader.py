"""Builds SGLang's models of checkpoints and loads these into them: run in the environment that `make servers` makes.

    python tests/servers/sglang_reader.py PLAIN CHECKPOINT...

PLAIN is any plain checkpoint, of which the server's own settings are made. SGLang has no build for these machines, so
that nothing is computed. Its own code reads the config, chooses a method for each module, maps names, and loads into
parameters that were poisoned before.

Prints a line of JSON for each checkpoint: `config` (class of its quantization), `model` (its class), `methods` (module
to the class of its method), `unloaded` (names of parameters), or `error`.
"""

# ruff: noqa: E402  What stands above the imports is read by them.

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sglang_stubs

sglang_stubs.install()

import torch
from safetensors.torch import load_file
from sglang.srt import runtime_context
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
from sglang.srt.layers.dp_attention import initialize_dp_attention_flags
from sglang.srt.model_loader import loader
from sglang.srt.server_args import ServerArgs

POISON = 0x7F
"""In a byte: NaN in E4M3, and a number that no weight is full of in the others."""


def start(plain: str) -> None:
    """Publishes settings, and groups of one process."""
    arguments = ServerArgs(model_path=plain, device="cpu", skip_tokenizer_init=True)
    runtime_context.publish(arguments, role="scheduler")
    store = f"file://{tempfile.mkdtemp()}/store"
    init_distributed_environment(backend="gloo", world_size=1, rank=0, local_rank=0, distributed_init_method=store)
    sizes = ("pp_size", "attn_dp_size", "attn_tp_size", "attn_dcp_size", "moe_ep_size", "moe_dp_size", "moe_tp_size")
    ranks = ("tp_rank", "pp_rank", "attn_dp_rank", "attn_tp_rank", "attn_cp_rank", "moe_ep_rank", "moe_tp_rank")
    runtime_context.get_parallel().override_permanently(**dict.fromkeys(sizes, 1), **dict.fromkeys(ranks, 0))
    initialize_model_parallel()
    initialize_dp_attention_flags(arguments)
    torch.set_default_dtype(torch.bfloat16)
    # It asks what the GPU is before it chooses a method.
    torch.cuda.get_device_capability = lambda device=None: (10, 0)
    runtime_context.override_platform(is_blackwell=True).__enter__()


def read(directory: str) -> dict[str, Any]:
    model_config, load_config = ModelConfig(directory, dtype="bfloat16"), LoadConfig(load_format="auto")
    quantization = loader._get_quantization_config(model_config, load_config)
    model = loader._initialize_model(model_config, load_config, quantization)
    methods = {
        name: type(it.quant_method).__name__ for name, it in model.named_modules() if hasattr(it, "quant_method")
    }
    for parameter in model.parameters():
        poison(parameter.data)
    model.load_weights(tensors(directory))
    unloaded = [name for name, parameter in model.named_parameters() if is_poisoned(parameter.data)]
    kinds = {"config": type(quantization).__name__, "model": type(model).__name__}
    return {**kinds, "methods": methods, "unloaded": unloaded}


def tensors(directory: str) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(Path(directory).glob("*.safetensors")):
        yield from load_file(file).items()


def poison(data: torch.Tensor) -> None:
    if data.is_floating_point() and data.itemsize > 1:
        data.fill_(torch.nan)
    else:
        data.reshape(-1).view(torch.uint8).fill_(POISON)


def is_poisoned(data: torch.Tensor) -> bool:
    """Whether a value was not loaded; of integers, whether none was."""
    if data.is_floating_point():
        return bool(data.float().isnan().any())
    return bool((data.reshape(-1).view(torch.uint8) == POISON).all())


def main(plain: str, *checkpoints: str) -> None:
    start(plain)
    for checkpoint in checkpoints:
        try:
            answer = read(checkpoint)
        except Exception as error:  # Whatever SGLang raises is what is asked for.
            answer = {"error": f"{type(error).__name__}: {error}"}
            if os.environ.get("TRACE"):
                raise
        sys.stdout.write(f"READ {json.dumps({'checkpoint': checkpoint, **answer})}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
