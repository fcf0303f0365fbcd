"""Loads checkpoints into vLLM and says what it computes of them: run in the environment that `make servers` makes.

    python tests/servers/vllm_reader.py TOKENS.json [mtp=]CHECKPOINT...

vLLM's CPU build has no kernels for most of these formats. So their matrix products are replaced, and nothing else is:
its own config classes choose, its own names are mapped, its own loaders fill parameters that were poisoned before.
Then the parameters become the dense values that they stand for (`vllm_decode`), with which vLLM runs in FP32. With
`mtp=` the checkpoint's layers of multi-token prediction are loaded beside, as the drafter of speculative decoding, and
nothing is computed: that needs kernels for GPUs.

Prints a line of JSON for each checkpoint: `logprobs` [prompts][positions][vocabulary], `loaded` (classes of models),
`unloaded` (names of their parameters, the drafter's behind its class), or `error`.
"""

# ruff: noqa: E402  What stands above the imports is read by them.

import gc
import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

# Its operators are compiled for another torch; what is asked of it here needs none, and only registers them.
sys.modules["torchvision._meta_registrations"] = ModuleType("torchvision._meta_registrations")

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import compressed_tensors, fp8, modelopt, mxfp4
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader import base_loader, default_loader
from vllm.model_executor.models import registry
from vllm_decode import dense
from vllm_operators import UngatedExperts, replace_operators

POISON = 0x7F
"""In a byte: NaN in E4M3, and a number that no weight is full of in the others."""

PLAIN = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale", ".prob_scale")

loaded: list[str] = []
unloaded: list[str] = []
scales_of_caches: dict[str, float] = {}


class DraftersAreLoaded(Exception):  # noqa: N818  It is no error.
    """Ends the work on a checkpoint whose layers of multi-token prediction are asked for: no more is done."""


class Kernel:
    """Stands for a kernel that this machine lacks; whoever calls it finds out that a layer was not made dense."""

    supports_pre_processed_weights = False

    def input_quant_key(self) -> None:
        """Inputs stay as they are."""


def without_kernels() -> None:
    """Lets vLLM choose its methods although there is no kernel for them."""
    backends = {
        "select_nvfp4_moe_backend": NvFp4MoeBackend.MARLIN,
        "select_fp8_moe_backend": Fp8MoeBackend.MARLIN,
        "select_mxfp8_moe_backend": Fp8MoeBackend.MARLIN,
        "select_mxfp4_moe_backend": Mxfp4MoeBackend.TRITON,
        "select_wna16_moe_backend": WNA16MoEBackend.TRITON,
    }
    for found in pkgutil.walk_packages(compressed_tensors.__path__, f"{compressed_tensors.__name__}."):
        with suppress(ImportError):  # Some are for machines of one maker.
            importlib.import_module(found.name)
    of_quantization = [module for name, module in sys.modules.items() if ".layers.quantization" in name]
    assert {compressed_tensors, fp8, modelopt, mxfp4} <= {*of_quantization}
    for module in of_quantization:
        for name in [*vars(module)]:
            if name.startswith("init_") and name.endswith("_linear_kernel"):
                setattr(module, name, lambda *args, **kwargs: Kernel())
            elif name.startswith("select_") and name.endswith("_moe_backend"):
                backend = backends.get(name)
                setattr(module, name, lambda *args, _backend=backend, **kwargs: (_backend, None))
            elif isinstance(kind := getattr(module, name), type) and issubclass(kind, QuantizationConfig):
                # The types are those of the kernels, too.
                kind.get_supported_act_dtypes = classmethod(lambda cls: [torch.float32, torch.bfloat16])


def without_a_platform(post_init: Any) -> Any:
    """Lets experts without a gate pass a check that comes last: that there is a kernel for them."""

    def checked(config: FusedMoEConfig) -> None:
        with suppress(NotImplementedError):
            post_init(config)

    return checked


def poisoned(load_weights: Any) -> Any:
    def load(self: Any, model: torch.nn.Module, *args: Any) -> None:
        # Scales of a cache may be missing, and then are what vLLM has made them.
        ours = {name: it for name, it in model.named_parameters() if not name.endswith(CACHE_SCALES)}
        for parameter in ours.values():
            poison(parameter.data)
        load_weights(self, model, *args)
        kind = type(model).__name__
        names = [name for name, parameter in ours.items() if _is_poisoned(parameter.data)]
        unloaded.extend(f"{kind} {name}" if loaded else name for name in names)
        loaded.append(kind)
        if len(loaded) == 2:
            raise DraftersAreLoaded

    return load


def poison(data: torch.Tensor) -> None:
    if data.is_floating_point() and data.itemsize > 1:
        data.fill_(torch.nan)
    else:
        data.reshape(-1).view(torch.uint8).fill_(POISON)


def _is_poisoned(data: torch.Tensor) -> bool:
    """Whether a value was not loaded; of integers, whether none was."""
    if data.is_floating_point():
        return bool(data.float().isnan().any())
    return bool((data.reshape(-1).view(torch.uint8) == POISON).all())


def made_dense(process: Any) -> Any:
    def processed(model: torch.nn.Module, *args: Any) -> None:
        for name, module in model.named_modules():
            if isinstance(module, RoutedExperts) and not isinstance(module.quant_method, UnquantizedFusedMoEMethod):
                _dense_experts(module)
            elif isinstance(module, LinearBase | ParallelLMHead) and not isinstance(module.quant_method, PLAIN):
                _dense_linear(module)
            scales_of_caches.update(_cache_scales(name, module))
        process(model, *args)

    return processed


def _dense_linear(layer: LinearBase | ParallelLMHead) -> None:
    parameters = dict(layer.named_parameters(recurse=False))
    values = _values(parameters, "", getattr(layer, "logical_widths", None))
    _replace(layer, parameters, {"weight": values, "bias": parameters.get("bias")})
    layer.quant_method = UnquantizedLinearMethod()


def _dense_experts(layer: RoutedExperts) -> None:
    parameters = dict(layer.named_parameters(recurse=False))
    values = {f"{prefix}weight": _values(parameters, prefix, None) for prefix in ("w13_", "w2_")}
    biases = {name: parameters.get(name) for name in ("w13_bias", "w2_bias")}
    _replace(layer, parameters, {**values, **biases})
    method = UnquantizedFusedMoEMethod if layer.moe_config.is_act_and_mul else UngatedExperts
    layer._replace_quant_method(method(layer.moe_config))


def _values(parameters: dict[str, torch.nn.Parameter], prefix: str, widths: list[int] | None) -> torch.Tensor:
    """The values of a weight, by whichever names its format has for them."""

    def given(*names: str) -> torch.Tensor | None:
        return next((parameters[prefix + name].data for name in names if prefix + name in parameters), None)

    weight, scale = given("weight", "weight_packed"), given("weight_scale", "weight_scale_inv")
    inverse = given("weight_global_scale")
    scale_2 = given("weight_scale_2") if inverse is None else inverse
    assert weight is not None, sorted(parameters)
    assert scale is not None, sorted(parameters)
    return dense(weight, scale, scale_2, widths, inverse_scale_2=inverse is not None)


def _replace(layer: torch.nn.Module, old: dict[str, torch.nn.Parameter], new: dict[str, torch.Tensor | None]) -> None:
    for name in old:
        delattr(layer, name)
    for name, value in new.items():
        if value is not None:
            layer.register_parameter(name, torch.nn.Parameter(value.data.float().contiguous(), requires_grad=False))


def _cache_scales(name: str, module: torch.nn.Module) -> Iterator[tuple[str, float]]:
    for scale in ("k_scale", "v_scale"):
        parameter = module._parameters.get(scale)
        if parameter is not None and parameter.numel() == 1:
            yield f"{name}.{scale}", float(parameter)


def logprobs_of(directory: str, prompts: list[list[int]], mtp: bool) -> list[list[list[float]]]:
    config = json.loads(Path(directory, "config.json").read_text())
    text = config.get("text_config", config)
    size = text["vocab_size"]
    engine = LLM(
        directory,
        dtype="float32",
        kv_cache_dtype="auto",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=2,
        max_logprobs=size,
        disable_log_stats=True,
        # Of the attentions of latents on a CPU the plain one: the other is for processors with AMX.
        attention_config={"backend": "CPU_MLA"} if "kv_lora_rank" in text else {},
        **({"language_model_only": True} if "vision_config" in config else {}),
        **({"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}} if mtp else {}),
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=size, temperature=0, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return [[[at[token].logprob for token in range(size)] for at in answer.prompt_logprobs[1:]] for answer in answers]


def prepare(load_weights: Any) -> None:
    """Replaces what this machine cannot compute, and vLLM's loader by one that poisons before and looks behind.

    Args:
        load_weights: Of its `DefaultModelLoader`, or what stands for it.
    """
    without_kernels()
    replace_operators()
    FusedMoEConfig.__post_init__ = without_a_platform(FusedMoEConfig.__post_init__)
    # It looks at each architecture in a process of its own, which imports all of vLLM again.
    registry._run_in_subprocess = lambda function: function()
    default_loader.DefaultModelLoader.load_weights = poisoned(load_weights)
    base_loader.process_weights_after_loading = made_dense(base_loader.process_weights_after_loading)


def main(tokens: str, *checkpoints: str) -> None:
    prompts = json.loads(Path(tokens).read_text())
    prepare(default_loader.DefaultModelLoader.load_weights)
    for checkpoint in checkpoints:
        directory = checkpoint.removeprefix("mtp=")
        loaded.clear()
        unloaded.clear()
        scales_of_caches.clear()
        answer: dict[str, Any] = {"checkpoint": checkpoint}
        try:
            answer["logprobs"] = logprobs_of(directory, prompts, mtp=checkpoint != directory)
        except DraftersAreLoaded:
            answer["drafter"] = loaded[-1]
        except Exception as error:  # Whatever vLLM raises is what is asked for.
            answer["error"] = f"{type(error).__name__}: {error}"
            if os.environ.get("TRACE"):
                raise
        answer |= {"loaded": loaded, "unloaded": unloaded, "cache_scales": scales_of_caches}
        sys.stdout.write(f"READ {json.dumps(answer)}\n")
        sys.stdout.flush()
        cleanup_dist_env_and_memory()
        gc.collect()


if __name__ == "__main__":
    main(*sys.argv[1:])
