"""What compressed-tensors' config says beside the layout of weights: what would mean other numbers is found.

The tensors are those of a good export throughout, and so only the config tells.
"""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantplug import quantize_checkpoint
from quantplug.verify import Severity, verify_checkpoint
from quantplug.verify.checks import Check
from quantplug.verify.rules.compressed import argument_problems, input_types_computed_otherwise
from tests.made_once import MadeOnce

Config = dict[str, Any]
E5M2 = torch.float8_e5m2
GROUPS, KV = "config-groups", "kv_cache_scheme"


@pytest.fixture(scope="session")
def made(tiny_qwen3_moe_dir: Path, made_once: MadeOnce) -> Path:
    """FP8 with a scale a row and a KV cache by cast. Nobody may change it."""

    def make(directory: Path) -> None:
        quantize_checkpoint(tiny_qwen3_moe_dir, directory, "fp8_dynamic", kv_cache="fp8_cast")

    return made_once("compressed_export", make)


@pytest.fixture(scope="session")
def nvfp4(tiny_qwen3_moe_dir: Path, made_once: MadeOnce) -> Path:
    """NVFP4 with quantized inputs and a KV cache by cast. Nobody may change it."""

    def make(directory: Path) -> None:
        options: Config = {"input_scale": 1.0, "dialect": "compressed-tensors", "kv_cache": "fp8_cast"}
        quantize_checkpoint(tiny_qwen3_moe_dir, directory, "nvfp4", **options)

    return made_once("compressed_nvfp4", make)


def weights(**said: Any) -> Callable[[Config], object]:
    return lambda config: config["config_groups"]["group_0"]["weights"].update(said)


def inputs(**said: Any) -> Callable[[Config], object]:
    return lambda config: config["config_groups"]["group_0"]["input_activations"].update(said)


def group(**said: Any) -> Callable[[Config], object]:
    return lambda config: config["config_groups"]["group_0"].update(said)


def cache(**said: Any) -> Callable[[Config], object]:
    return lambda config: config[KV].update(said)


def whole(**said: Any) -> Callable[[Config], object]:
    return lambda config: config.update(said)


def another_group(config: Config) -> None:
    more = copy.deepcopy(config["config_groups"]["group_0"]) | {"targets": ["re:.*q_proj"]}
    more["weights"]["strategy"] = "tensor"
    config["config_groups"]["group_1"] = more


HADAMARD = {"config_groups": {"u": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}}
SPOILED: dict[str, tuple[Callable[[Config], object], str]] = {
    "weights by tensor": (weights(strategy="tensor"), "tensor-layout"),
    "weights by group": (weights(strategy="group", group_size=16), "not-judged"),
    "weights of 4 bits": (weights(num_bits=4), GROUPS),
    "integer weights": (weights(type="int"), GROUPS),
    "weights with zero points": (weights(symmetric=False), GROUPS),
    "weights quantized anew": (weights(dynamic=True), GROUPS),
    "inputs of 4 bits": (inputs(num_bits=4), GROUPS),
    "integer inputs": (inputs(type="int"), GROUPS),
    "inputs with zero points": (inputs(symmetric=False), GROUPS),
    "static inputs": (inputs(dynamic=False), "input-scale"),
    "inputs by tensor": (inputs(strategy="tensor"), "served-experts"),
    "inputs in 16 bits": (group(input_activations=None), "served-experts"),
    "outputs too": (group(output_activations={"num_bits": 8, "type": "float", "strategy": "tensor"}), GROUPS),
    "for embeddings": (group(targets=["Embedding"]), GROUPS),
    "for experts alone": (group(targets=["re:.*experts.*"]), "coverage"),
    "another group for q": (another_group, "tensor-layout"),
    "a group in another format": (group(format="pack-quantized"), GROUPS),
    "the whole in another format": (whole(format="int-quantized"), GROUPS),
    "integer KV cache": (cache(type="int"), GROUPS),
    "KV cache of 4 bits": (cache(num_bits=4), GROUPS),
    "KV cache by token": (cache(dynamic=True), GROUPS),
    "KV cache by head": (cache(strategy="attn_head"), GROUPS),
    "KV cache with zero points": (cache(symmetric=False), GROUPS),
    "sparse weights": (whole(sparsity_config={"format": "sparse-24-bitmask", "targets": ["Linear"]}), "not-judged"),
    "rotated inputs": (whole(transform_config=HADAMARD), "not-judged"),
    "inputs that are neither": (inputs(dynamic={"x": True}), GROUPS),
    "a setting of a group that nobody knows": (group(made_up=None), GROUPS),
    "a format that is no name": (group(format=True), GROUPS),
    "a list of what is plain with a number": (lambda config: config["ignore"].append(3), "exclude-pattern"),
    "no weights yet": (whole(quantization_status="frozen"), "quantization-status"),
    "no word on the weights yet": (lambda config: config.pop("quantization_status"), "quantization-status"),
    "a KV cache that is none": (whole(kv_cache_scheme=3), GROUPS),
    "inputs by a strategy that is none": (inputs(strategy="tokens"), GROUPS),
    "inputs of which nothing is said": (group(input_activations={}), GROUPS),
    "inputs of null bits": (inputs(num_bits=None), GROUPS),
    "groups beside another strategy": (weights(group_size=16), GROUPS),
    "a KV cache of null": (cache(symmetric=None), GROUPS),
    "a head quantized": (lambda config: config["ignore"].remove("lm_head"), "exclude-missing"),
    "q left out": (lambda config: config["ignore"].append("model.layers.0.self_attn.q_proj"), "coverage"),
}
# What llm-compressor writes beside, or leaves out, that means the same.
SPELLINGS: dict[str, Callable[[Config], object]] = {
    "as it is": whole(),
    "nothing sparse": whole(sparsity_config={}, transform_config={}),
    "dense": whole(sparsity_config={"format": "dense"}),
    "no format of its own": lambda config: config["config_groups"]["group_0"].pop("format"),
    "the older name": whole(format="naive-quantized"),
    "defaults left out": lambda config: config["config_groups"]["group_0"]["weights"].pop("symmetric"),
    "null where it may be": weights(group_size=None, block_structure=None, actorder=None, observer="minmax"),
}


def meant(said: Config) -> QuantizationArgs | None:
    """What compressed-tensors' own class makes of it; None where it refuses."""
    try:
        return QuantizationArgs.model_validate(said)
    except (ValueError, NotImplementedError):
        return None


# PyTorch's, in both spellings, and what is no type of its.
NAMES_OF_TYPES = (
    None,
    "torch.bfloat16",
    "bfloat16",
    "half",
    "torch.uint8",
    "torch.torch.uint8",
    "nn",
    "F8",
    "",
    7,
    True,
)
ARGUMENTS: Config = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}


@pytest.mark.parametrize(
    "said",
    [
        *({name: None} for name in ARGUMENTS),
        *({"group_size": size} for size in (None, -1, 0, 1, True, 16, "16")),
        *({"group_size": size, "strategy": None} for size in (None, -1, 16)),
        *({"group_size": size, "strategy": "group"} for size in (None, -1, 16)),
        *({"group_size": size, "strategy": "tensor_group"} for size in (None, 16)),
        *({"block_structure": [128, 128], "strategy": strategy} for strategy in ("block", "channel", None)),
        *({"block_structure": None, "strategy": strategy} for strategy in ("block", "channel")),
        *({key: name} for key in ("scale_dtype", "zp_dtype") for name in NAMES_OF_TYPES),
    ],
    ids=str,
)
def test_arguments_that_the_library_refuses_are_found(said: Config) -> None:
    try:
        refused = meant(ARGUMENTS | said) is None
    except TypeError:  # Of a size that is text, which it compares.
        refused = True
    assert bool(list(argument_problems(ARGUMENTS | said))) is refused


VALUES_OF_ARGUMENTS: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 8, 8.5, "8", "", [1], {}, {"x": 1}, "float", "true", "local", "Local", "channel",
    "minmax", float("inf"), "weight", "Weight", "static", "group", "dynamic",
)  # fmt: skip


@pytest.mark.parametrize("strategy", ["channel", "token", "tensor", "tensor_group", "group"])
@pytest.mark.parametrize("key", ["dynamic", "actorder", "observer", "observer_kwargs", "an_argument_of_tomorrow"])
def test_values_that_the_library_refuses_are_found_and_no_others(key: str, strategy: str) -> None:
    size = {"group_size": 16} if "group" in strategy else {}
    said = {**ARGUMENTS, **size, "strategy": strategy, "dynamic": strategy == "token"}
    for value in VALUES_OF_ARGUMENTS:
        # Which 0.20 takes for true after it has refused that, and 0.17, which vLLM 0.32 comes with, for another order.
        if key == "actorder" and value is not True and value in (1, "true"):
            continue
        found = list(argument_problems({**said, key: value}))
        assert bool(found) is (meant({**said, key: value}) is None), value
        assert {name for name, _ in found} <= {key}, value


SETTINGS = ("num_bits", "type", "symmetric", "strategy", "dynamic", "group_size")


@pytest.mark.parametrize("format_name", ["fp8_dynamic", "nvfp4"])
@pytest.mark.parametrize("part", ["weights", "input_activations", KV])
@pytest.mark.parametrize("left_out", SETTINGS)
def test_what_is_left_out_means_the_librarys_default(
    format_name: str, part: str, left_out: str, made: Path, nvfp4: Path, tmp_path: Path
) -> None:
    verdict = ""

    def leave_out(config: Config) -> None:
        nonlocal verdict
        said = config[KV] if part == KV else config["config_groups"]["group_0"][part]
        before = meant(dict(said))
        said.pop(left_out, None)
        # Of a KV cache vLLM 0.32 reads these two itself, without the library's defaults (`validate_kv_cache_scheme`).
        read_as_it_stands = part == KV and left_out in ("num_bits", "type")
        verdict = "another" if read_as_it_stands or meant(dict(said)) != before else "the same"

    errors = errors_of(nvfp4 if format_name == "nvfp4" else made, None, tmp_path / "it", leave_out)
    # No tool leaves out how many bits weights have, and readers need not know the default.
    if verdict == "another" or (part, left_out) == ("weights", "num_bits"):
        assert errors & {GROUPS, "not-judged", "input-scale", "served-experts", "kv-scales"}
    else:
        assert errors == set()


TYPES = sorted({str(it) for it in vars(torch).values() if isinstance(it, torch.dtype)})


def scales_in_transformers(said: Config, dtype: torch.dtype) -> torch.Tensor | None:
    """Scales of inputs that compressed-tensors finds in a model of a type; None where it stops."""
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    # Of NVFP4 there is one for the tensor, too; with this one all scales of blocks are normal numbers of FP8.
    whole = torch.tensor([100.0]) if said["num_bits"] == 4 else None
    arguments = QuantizationArgs.model_validate(said)
    try:
        return compute_dynamic_scales_and_zp(inputs, arguments, torch.nn.Linear(64, 3), global_scale=whole)[0].float()
    except (RuntimeError, TypeError):  # NotImplementedError is the first of them.
        return None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("format_name", ["fp8_dynamic", "nvfp4"])
@pytest.mark.parametrize("key", ["scale_dtype", "zp_dtype"])
def test_types_of_inputs_are_told_where_transformers_stops_or_rounds_to_them(
    key: str, format_name: str, dtype: torch.dtype, made: Path, nvfp4: Path
) -> None:
    directory = nvfp4 if format_name == "nvfp4" else made
    config = json.loads((directory / "config.json").read_text())
    said = config["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    right = scales_in_transformers({**said, "scale_dtype": None}, dtype)
    assert right is not None
    # Floats of 16 bits round a scale by less than 0.4 %, which the next conversion does anyhow. FP8, in which servers
    # have those of NVFP4, does so by up to 6.25 %: no type may do more.
    most = {"fp8_dynamic": 0.004, "nvfp4": 0.0625}[format_name]
    for spelled in TYPES:
        found = scales_in_transformers({**said, key: spelled}, dtype)
        is_right = found is not None and bool(((found - right).abs() <= most * right).all())
        told = list(input_types_computed_otherwise({**said, key: spelled}, dtype, is_nvfp4=format_name == "nvfp4"))
        # Whole numbers, and FP8 of another bias, are right for scales of this size alone.
        assert told == ([] if is_right else [key]) or (told == [key] and spelled in OF_THIS_SIZE), spelled


OF_THIS_SIZE = {f"torch.{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)} | {"torch.float8_e4m3fnuz"}


def errors_of(made: Path, source: Path | None, directory: Path, spoil: Callable[[Config], object]) -> set[str]:
    shutil.copytree(made, directory)
    config = json.loads((directory / "config.json").read_text())
    spoil(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))
    report = verify_checkpoint(directory, source)
    return {str(check) for check in report.checks(Severity.ERROR)}


@pytest.mark.parametrize("name", SPOILED)
def test_what_would_be_computed_otherwise_is_found(
    name: str, made: Path, tiny_qwen3_moe_dir: Path, tmp_path: Path
) -> None:
    spoil, check = SPOILED[name]
    assert check in errors_of(made, tiny_qwen3_moe_dir, tmp_path / "it", spoil)


@pytest.mark.parametrize("name", SPELLINGS)
def test_what_means_the_same_is_none(name: str, made: Path, tiny_qwen3_moe_dir: Path, tmp_path: Path) -> None:
    assert errors_of(made, tiny_qwen3_moe_dir, tmp_path / "it", SPELLINGS[name]) == set()


def logits(directory: Path) -> torch.Tensor | None:
    """What transformers computes of a checkpoint; None where it stops."""
    try:
        model = AutoModelForCausalLM.from_pretrained(directory)
    except NotImplementedError:
        return None
    with torch.no_grad():
        return model(torch.arange(7)[None]).logits


def test_types_of_nvfp4_scales_are_told_where_transformers_reads_others(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny_qwen3_dir, tmp_path / "it", "w4a16_nvfp4", dialect="compressed-tensors")
    written = json.loads((tmp_path / "it" / "config.json").read_text())
    right = logits(tmp_path / "it")
    assert right is not None
    for spelled in (None, "torch.float8_e4m3fn", "bfloat16", "float8_e5m2", "uint8", "int16", "int3"):
        config = copy.deepcopy(written)
        weights(scale_dtype=spelled)(config["quantization_config"])
        (tmp_path / "it" / "config.json").write_text(json.dumps(config))
        read = logits(tmp_path / "it")
        report = verify_checkpoint(tmp_path / "it", tiny_qwen3_dir)
        told = [it.subject for it in report.findings if it.check is Check.TRANSFORMERS]
        is_same = read is not None and torch.equal(read, right)
        assert told == ([] if is_same else ["config.json config_groups.group_0.weights.scale_dtype"]), spelled
        assert report.ok


def test_a_type_of_inputs_is_told_with_its_place_and_what_is_no_type_is_an_error(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "it")
    config = json.loads((made / "config.json").read_text())
    inputs(scale_dtype="torch.uint8", zp_dtype="torch.nothing")(config["quantization_config"])
    (tmp_path / "it" / "config.json").write_text(json.dumps(config))

    told = {it.subject: it for it in verify_checkpoint(tmp_path / "it").findings}

    where = "config.json config_groups.group_0.input_activations"
    assert told[f"{where}.scale_dtype"].severity is Severity.WARNING
    assert "leave it out" in told[f"{where}.scale_dtype"].message
    assert told[f"{where}.zp_dtype"].severity is Severity.ERROR
    assert "no type of PyTorch" in told[f"{where}.zp_dtype"].message


DOWN = "model.layers.1.mlp.experts.3.down_proj"
GATE, UP = DOWN.replace("down", "gate"), DOWN.replace("down", "up")
Tensors = dict[str, torch.Tensor]


def swapped(tensors: Tensors, *suffixes: str) -> None:
    for suffix in suffixes:
        one, other = f"{GATE}.{suffix}", f"{UP}.{suffix}"
        tensors[one], tensors[other] = tensors[other], tensors[one]


def bits(tensors: Tensors, rows: int | slice) -> torch.Tensor:
    return tensors[f"{DOWN}.weight"].view(torch.uint8)[rows]


def moved(scales: torch.Tensor) -> None:
    scales.copy_(scales.roll(1, 0))


def largest_for_smallest(codes: torch.Tensor) -> None:
    codes[(codes & 0x7F).argmin()] = 0x7E


VALUES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "scales of a weight 2 % larger": (lambda t: t[f"{DOWN}.weight_scale"].mul_(1.02), "gain"),
    "all scales 1.5 % larger": (lambda t: [it.mul_(1.015) for name, it in t.items() if "weight_scale" in name], "gain"),
    "scales one row further": (lambda t: moved(t[f"{DOWN}.weight_scale"]), "error-bound"),
    "a negative scale": (lambda t: t[f"{DOWN}.weight_scale"][1].neg_(), "scale-range"),
    "a scale of zero": (lambda t: t[f"{DOWN}.weight_scale"][1].zero_(), "scale-range"),
    "a row of zeros": (lambda t: bits(t, 2).zero_(), "error-bound"),
    "signs of a row": (lambda t: bits(t, 2).bitwise_xor_(0x80), "error-bound"),
    "the largest code for the smallest": (lambda t: largest_for_smallest(bits(t, 2)), "error-bound"),
    "scales of gate and up": (lambda t: swapped(t, "weight_scale"), "error-bound"),
    "gate and up": (lambda t: swapped(t, "weight", "weight_scale"), "error-bound"),
    "no scale": (lambda t: t.pop(f"{DOWN}.weight_scale"), "tensor-layout"),
    "a zero point": (lambda t: t.update({f"{DOWN}.weight_zero_point": torch.zeros(160, 1)}), "tensor-layout"),
    "another float": (lambda t: t.update({f"{DOWN}.weight": bits(t, slice(None)).view(E5M2)}), "tensor-layout"),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_values_that_are_not_the_sources_are_found(
    name: str, made: Path, tiny_qwen3_moe_dir: Path, tmp_path: Path
) -> None:
    spoil, check = VALUES[name]
    shutil.copytree(made, tmp_path / "it")
    (path,) = (tmp_path / "it").glob("*.safetensors")
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path, {"format": "pt"})
    report = verify_checkpoint(tmp_path / "it", tiny_qwen3_moe_dir)
    assert check in {str(it) for it in report.checks(Severity.ERROR)}
