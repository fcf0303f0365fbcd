"""Loads a checkpoint into vLLM, then a stream over it, in place: run in the environment that `make servers` makes.

    python tests/servers/vllm_refit.py TOKENS.json CHECKPOINT BUCKETS.pt

BUCKETS.pt is a list of (U8 bytes, names, shapes, dtypes, sizes), of which vLLM's own `unpack_tensor` makes tensors, and
the model's own `load_weights` takes them. Between the two loads all parameters are poisoned once more. Prints what
`vllm_reader` prints.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import vllm_reader
from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor
from vllm.model_executor.model_loader import default_loader


def main(tokens: str, directory: str, buckets: str) -> None:
    load_first = default_loader.DefaultModelLoader.load_weights

    def load_both(self: Any, model: torch.nn.Module, *args: Any) -> None:
        load_first(self, model, *args)
        for name, parameter in model.named_parameters():
            if not name.endswith(vllm_reader.CACHE_SCALES):
                vllm_reader.poison(parameter.data)
        # A bucket at a time, as they arrive.
        for packed, names, shapes, dtypes, sizes in torch.load(buckets, weights_only=True):
            model.load_weights(unpack_tensor(packed, names, shapes, dtypes, sizes))

    vllm_reader.prepare(load_both)
    logprobs = vllm_reader.logprobs_of(directory, json.loads(Path(tokens).read_text()), mtp=False)
    sys.stdout.write(f"READ {json.dumps({'logprobs': logprobs, 'unloaded': vllm_reader.unloaded})}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
