"""A quantized KV cache: what config says it, and what is refused. The oracle of the config is ModelOpt's own."""

import copy
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.export.quant_utils import get_kv_cache_scaling_factor
from modelopt.torch.quantization.nn import TensorQuantizer
from safetensors.torch import load_file, save_file

from quantplug import (
    export_checkpoint,
    export_hf_weights_quant,
    export_mcore_gpt_to_hf,
    load_checkpoint,
    quant_cfg,
    quantize_checkpoint,
    save_checkpoint,
)
from quantplug.calibration.quantizers import needs_amax
from quantplug.errors import ArgumentError, CalibrationError, UnsupportedQuantizationError
from quantplug.export.live_plan import plan_export
from quantplug.verify import Severity, verify_checkpoint
from quantplug.verify.checks import Check
from tests.export.checkpoints import assert_same_export, load, one_rank, read, same_bytes
from tests.export.mixed import mixed_cfg
from tests.export.refusals import offenders, refused, rules
from tests.families.cases import make
from tests.logits import transformers_logits
from tests.made_once import MadeOnce

pytestmark = pytest.mark.usefixtures("single_rank")

Sources = Callable[[str], Path]

CAST: dict[str, Any] = {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": (4, 3), "use_constant_amax": True}}
FP8: dict[str, Any] = {"num_bits": (4, 3)}
NVFP4: dict[str, Any] = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
KEYS, VALUES = (f"decoder.layers.0.self_attention.core_attention.{letter}_bmm_quantizer" for letter in "kv")


def cast_model(source: Path, *more: dict[str, Any]) -> torch.nn.Module:
    return mtq.quantize(load(source), rules(CAST, *more))


def configs(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    return config, json.loads((directory / "hf_quant_config.json").read_text())


def test_a_cast_is_said_by_both_configs_as_modelopt_says_it(sources: Sources, tmp_path: Path) -> None:
    config = quant_cfg("w4a16_nvfp4", sources("moe"), kv_cache="fp8_cast")
    model = mtq.quantize(load(sources("moe")), config)
    enabled = [
        name
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer) and module.is_enabled and "_bmm_" in name
    ]
    assert len(enabled) == 2 * 2
    export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    ours, legacy = configs(tmp_path / "out")
    assert legacy["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert ours["kv_cache_scheme"] == convert_hf_quant_config_format(copy.deepcopy(legacy))["kv_cache_scheme"]
    assert verify_checkpoint(tmp_path / "out", sources("moe")).ok
    # Nothing else changes: a cast has no tensors.
    quantize_checkpoint(sources("moe"), tmp_path / "plain", "w4a16_nvfp4")
    tensors, plain = read(tmp_path / "out"), read(tmp_path / "plain")
    assert tensors.keys() == plain.keys()
    assert all(same_bytes(tensors[name], plain[name]) for name in plain)


def test_a_checkpoint_is_asked_for_the_same(sources: Sources, tmp_path: Path) -> None:
    export_mcore_gpt_to_hf(cast_model(sources("moe")), sources("moe"), export_dir=tmp_path / "live")
    quantize_checkpoint(sources("moe"), tmp_path / "direct", "w4a16_nvfp4", kv_cache="fp8_cast")
    assert configs(tmp_path / "live") == configs(tmp_path / "direct")


def test_a_cast_survives_a_megatron_checkpoint(sources: Sources, tmp_path: Path) -> None:
    save_checkpoint(cast_model(sources("moe")), tmp_path / "saved", extra={})
    model = load(sources("moe"))
    load_checkpoint(model, tmp_path / "saved")
    export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    assert configs(tmp_path / "out")[1]["quantization"]["kv_cache_quant_algo"] == "FP8"


REFUSED: dict[str, tuple[tuple[dict[str, Any], ...], set[str]]] = {
    "keys alone": (
        ({"quantizer_name": "*v_bmm_quantizer", "enable": False},),
        {f"decoder.layers.{layer}.self_attention.core_attention" for layer in range(2)},
    ),
    "one layer": (
        ({"quantizer_name": "*layers.1.*_bmm_quantizer", "enable": False},),
        {"decoder.layers.1.self_attention.core_attention"},
    ),
    "blocks": (
        ({"quantizer_name": KEYS, "cfg": {"num_bits": (2, 1), "block_sizes": {-1: 16}, "use_constant_amax": True}},),
        {KEYS},
    ),
    "one layer calibrated": (
        ({"quantizer_name": "*layers.0.*[kv]_bmm_quantizer", "cfg": {"num_bits": (4, 3)}},),
        {"decoder.layers.1.self_attention.core_attention"},
    ),
    "one layer in NVFP4": (
        ({"quantizer_name": "*layers.1.*[kv]_bmm_quantizer", "cfg": {**NVFP4, "use_constant_amax": True}},),
        {name.replace("layers.0", "layers.1") for name in (KEYS, VALUES)},
    ),
    "queries too": (
        ({"quantizer_name": "*layers.0.*q_bmm_quantizer", "cfg": {"num_bits": (4, 3), "use_constant_amax": True}},),
        {KEYS.replace("k_bmm", "q_bmm")},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_server_is_told_is_refused_by_name(case: str, sources: Sources, tmp_path: Path) -> None:
    more, names = REFUSED[case]
    model = mtq.quantize(load(sources("moe")), rules(CAST, *more, algorithm=None))
    with refused(UnsupportedQuantizationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    assert names <= {name for name, _ in offenders(caught)}


def calibrated_model(source: Path, settings: dict[str, Any] = FP8) -> torch.nn.Module:
    """With amaxes set by hand: a forward of Transformer Engine's attention needs a GPU."""
    model = mtq.quantize(load(source), rules({**CAST, "cfg": dict(settings)}))
    for layer in range(2):
        core = model.decoder.layers[layer].self_attention.core_attention
        core.k_bmm_quantizer.amax = torch.tensor(3.0 + layer)
        core.v_bmm_quantizer.amax = torch.tensor(900.0 + layer)
    return model


@pytest.mark.parametrize(("settings", "algorithm"), [(FP8, "FP8"), (NVFP4, "NVFP4")], ids=["fp8", "nvfp4"])
def test_calibrated_scales_are_modelopt_s_beside_k_and_v(
    settings: dict[str, Any], algorithm: str, sources: Sources, tmp_path: Path
) -> None:
    model = calibrated_model(sources("moe"), settings)
    export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    tensors = read(tmp_path / "out")
    for layer in range(2):
        core = model.decoder.layers[layer].self_attention.core_attention
        expected = get_kv_cache_scaling_factor(core)
        for projection, scale, modelopts in zip(("k_proj", "v_proj"), ("k_scale", "v_scale"), expected, strict=True):
            ours = tensors[f"model.layers.{layer}.self_attn.{projection}.{scale}"]
            assert ours.shape == ()
            assert same_bytes(ours, modelopts.reshape(()).float())
    quantize_checkpoint(sources("moe"), tmp_path / "plain", "w4a16_nvfp4")
    plain = read(tmp_path / "plain")
    assert {name for name in tensors if name.endswith(("k_scale", "v_scale"))} == tensors.keys() - plain.keys()
    assert all(same_bytes(tensors[name], plain[name]) for name in plain)
    ours, legacy = configs(tmp_path / "out")
    assert legacy["quantization"]["kv_cache_quant_algo"] == algorithm
    assert ours["kv_cache_scheme"] == convert_hf_quant_config_format(copy.deepcopy(legacy))["kv_cache_scheme"]
    assert verify_checkpoint(tmp_path / "out", sources("moe")).ok
    streamed = dict(export_hf_weights_quant(model, sources("moe"), quant_format="as_quantized"))
    assert streamed.keys() == tensors.keys()
    save_checkpoint(model, tmp_path / "saved", extra={})
    export_checkpoint(tmp_path / "saved", tmp_path / "straight", sources("moe"))
    assert_same_export(tmp_path / "straight", tmp_path / "out")
    # As a user asks for it by name.
    by_name = quant_cfg("w4a16_nvfp4", sources("moe"), kv_cache=algorithm.lower())["quant_cfg"][-1]
    assert by_name == {**CAST, "cfg": settings}


def test_a_cast_to_nvfp4_is_a_line_of_each_config(sources: Sources, tmp_path: Path) -> None:
    """By ModelOpt's rule and by name; vLLM 0.32 reads the same type from either file."""
    rule = quant_cfg("w4a16_nvfp4", sources("moe"), kv_cache="nvfp4_cast")["quant_cfg"][-1]
    assert rule == {**CAST, "cfg": {**NVFP4, "use_constant_amax": True}}
    export_mcore_gpt_to_hf(
        mtq.quantize(load(sources("moe")), rules(rule)), sources("moe"), export_dir=tmp_path / "live"
    )
    quantize_checkpoint(sources("moe"), tmp_path / "direct", "w4a16_nvfp4", kv_cache="nvfp4_cast")
    assert_same_export(tmp_path / "live", tmp_path / "direct")
    ours, legacy = configs(tmp_path / "live")
    assert (ours["kv_cache_scheme"], legacy["quantization"]["kv_cache_quant_algo"]) == ("NVFP4", "NVFP4")
    assert not any(name.endswith(("k_scale", "v_scale")) for name in read(tmp_path / "live"))
    report = verify_checkpoint(tmp_path / "live", sources("moe"))
    assert report.ok
    assert any("SGLang keeps 16 bits" in finding.message for finding in report.findings)


def test_where_no_server_reads_nvfp4_it_is_refused(sources: Sources, tmp_path: Path) -> None:
    for number, (name, settings) in enumerate(
        {
            "latent_blocks": {"kv_cache": "nvfp4_cast"},
            "moe": {"kv_cache": "nvfp4_cast", "dialect": "compressed-tensors"},
        }.items()
    ):
        with refused(UnsupportedQuantizationError, tmp_path) as caught:
            quantize_checkpoint(sources(name), tmp_path / str(number), "w4a16_nvfp4", **settings)
        assert offenders(caught) == {("kv_cache", None)}
    with refused(UnsupportedQuantizationError, tmp_path) as caught:
        quantize_checkpoint(sources("moe"), tmp_path / "data", "w4a16_nvfp4", kv_cache="nvfp4")
    assert "Use nvfp4_cast: the same type" in str(caught.value)
    # Scales in a mix, which vLLM would leave aside; a cast has none.
    config = mixed_cfg({**CAST, "cfg": NVFP4})
    with refused(UnsupportedQuantizationError, tmp_path) as caught:
        plan_export(mtq.quantize(load(sources("moe")), {**config, "algorithm": None}), sources("moe"), calibrated=False)
    assert "vLLM leaves its scales aside in MIXED_PRECISION; nvfp4_cast has none" in str(caught.value)


@pytest.mark.parametrize("quant_format", ["w4a16_nvfp4", "fp8_dynamic"])
def test_beside_compressed_tensors_a_cast_is_its_own_scheme_of_a_cache(
    quant_format: str, sources: Sources, tmp_path: Path
) -> None:
    quantize_checkpoint(
        sources("moe"), tmp_path / "out", quant_format, kv_cache="fp8_cast", dialect="compressed-tensors"
    )
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(written).kv_cache_scheme
    # What llm-compressor's recipes ask for (examples/quantization_kv_cache), and all that vLLM's method takes.
    assert scheme == QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
    # Which transformers multiplies with; where they are missing, with memory that nobody has filled.
    scales = {name: it for name, it in read(tmp_path / "out").items() if name.endswith(("k_scale", "v_scale"))}
    assert scales.keys() == {f"model.layers.{layer}.self_attn.{letter}_scale" for layer in range(2) for letter in "kv"}
    assert all((it.dtype, it.tolist()) == (torch.float32, [1.0]) for it in scales.values())
    assert verify_checkpoint(tmp_path / "out", sources("moe")).ok


def test_transformers_computes_with_a_cast_beside_compressed_tensors(sources: Sources, tmp_path: Path) -> None:
    source = sources("dense_blocks")
    for name, cache in (("plain", None), ("cast", "fp8_cast")):
        quantize_checkpoint(source, tmp_path / name, "w8a16_fp8", kv_cache=cache)
    plain, cast = (transformers_logits(tmp_path / name) for name in ("plain", "cast"))
    # Keys and values in E4M3 move the logits, and by no more than the weights in it have.
    assert 0 < (cast - plain).norm() < 2 * (plain - transformers_logits(source)).norm()
    # Without its scales it computes something else, and a reader who may want that is told.
    (file,) = (tmp_path / "cast").glob("*.safetensors")
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(("k_scale", "v_scale"))}
    save_file(tensors, file, metadata={"format": "pt"})
    report = verify_checkpoint(tmp_path / "cast")
    assert Check.TRANSFORMERS in report.checks(Severity.WARNING)


def test_calibrated_scales_stand_beside_the_projections_in_compressed_tensors(sources: Sources, tmp_path: Path) -> None:
    model = calibrated_model(sources("moe"))
    for dialect in ("modelopt", "compressed-tensors"):
        export_mcore_gpt_to_hf(model, sources("moe"), tmp_path / dialect, dialect=dialect)
    ours, theirs = read(tmp_path / "compressed-tensors"), read(tmp_path / "modelopt")
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn"
        for letter in "kv":
            scale = ours[f"{attention}.{letter}_scale"]
            assert (scale.dtype, scale.shape) == (torch.float32, (1,))
            assert scale.tolist() == [theirs[f"{attention}.{letter}_proj.{letter}_scale"].item()]
    assert verify_checkpoint(tmp_path / "compressed-tensors", sources("moe")).ok
    streamed = export_hf_weights_quant(model, sources("moe"), quant_format="as_quantized", dialect="compressed-tensors")
    assert dict(streamed).keys() == ours.keys()


@pytest.mark.parametrize("name", ["qwen3_5_moe", "glm4_moe"])
@pytest.mark.parametrize("cast", [True, False])
def test_drafts_are_left_alone_as_modelopt_s_recipes_leave_them(
    cast: bool, name: str, made_once: MadeOnce, tmp_path: Path
) -> None:
    """Layers of multi-token prediction, by names of their own or numbered on after the decoder's."""
    source = made_once(f"family_{name}", partial(make, name))
    on = CAST if cast else {**CAST, "cfg": {"num_bits": (4, 3)}}
    model = mtq.quantize(load(source), rules(on, {"quantizer_name": "*mtp*", "enable": False}))
    for place, module in model.named_modules():
        if place.endswith(("k_bmm_quantizer", "v_bmm_quantizer")) and needs_amax(module):
            module.amax = torch.tensor(900.0)
    export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out", source).ok
    scales = [tensor for tensor in read(tmp_path / "out") if tensor.endswith("k_scale")]
    assert bool(scales) is not cast
    assert not any(tensor.startswith("mtp.") for tensor in scales)
    if not cast:
        # Of one layer of the decoder, as a whole, it is missed.
        first = min(scales).removesuffix("k_proj.k_scale")
        gone = [f"{first}{letter}_proj.{letter}_scale" for letter in "kv"]
        hurt = with_changed(tmp_path / "out", tmp_path / "hurt", lambda t: [t.pop(tensor) for tensor in gone])
        missed = {it.subject for it in verify_checkpoint(hurt).findings if it.check is Check.KV_SCALES}
        assert missed == set(gone)


def with_changed(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of an export with other tensors."""
    shutil.copytree(source, target)
    (file,) = target.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    index = target / "model.safetensors.index.json"
    index.write_text(
        json.dumps(
            {
                "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
                "weight_map": dict.fromkeys(tensors, file.name),
            }
        )
    )
    return target


SCALE = "model.layers.1.self_attn.k_scale"
BROKEN: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "missing": lambda tensors: tensors.pop(SCALE),
    "zero": lambda tensors: tensors[SCALE].zero_(),
    "negative": lambda tensors: tensors[SCALE].neg_(),
    "nan": lambda tensors: tensors[SCALE].fill_(torch.nan),
    "of every head": lambda tensors: tensors.update({SCALE: torch.ones(2)}),
}


@pytest.fixture(scope="module")
def with_calibrated_cache(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "out"
    with one_rank():
        export_mcore_gpt_to_hf(calibrated_model(sources("moe")), sources("moe"), out, dialect="compressed-tensors")
    return out


@pytest.mark.parametrize("case", BROKEN)
def test_verify_judges_their_scales(case: str, with_calibrated_cache: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        BROKEN[case](tensors)

    report = verify_checkpoint(with_changed(with_calibrated_cache, tmp_path / "broken", change))
    assert [finding.subject for finding in report.findings if finding.severity is Severity.ERROR] == [SCALE]


def test_verify_takes_both_spellings_of_a_scale(with_calibrated_cache: Path, tmp_path: Path) -> None:
    """VLLM and SGLang read both (`maybe_remap_kv_scale_name` of vLLM 0.33's weight_utils.py)."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[SCALE.replace("k_scale", "k_proj.k_scale")] = tensors.pop(SCALE)

    assert verify_checkpoint(with_changed(with_calibrated_cache, tmp_path / "below", change)).ok


def test_scales_come_straight_from_a_megatron_checkpoint(sources: Sources, tmp_path: Path) -> None:
    model = calibrated_model(sources("moe"))
    export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "live")
    live = read(tmp_path / "live")
    save_checkpoint(model, tmp_path / "saved", extra={})
    export_checkpoint(tmp_path / "saved", tmp_path / "out", sources("moe"))
    assert configs(tmp_path / "out") == configs(tmp_path / "live")
    tensors = read(tmp_path / "out")
    assert tensors.keys() == live.keys()
    assert [name for name in live if not same_bytes(tensors[name], live[name])] == []
    # A format by name leaves out what quantizers say, and then only a cast needs no data.
    with refused(UnsupportedQuantizationError, tmp_path):
        export_checkpoint(tmp_path / "saved", tmp_path / "no", sources("moe"), "w4a16_nvfp4", kv_cache="fp8")


@pytest.mark.parametrize("amax", [None, 0.0, torch.inf, torch.nan])
def test_an_amax_that_is_none_is_refused(amax: float | None, sources: Sources, tmp_path: Path) -> None:
    model = calibrated_model(sources("moe"))
    quantizer = model.decoder.layers[0].self_attention.core_attention.k_bmm_quantizer
    if amax is None:
        quantizer.reset_amax()
    else:
        quantizer.amax = torch.tensor(amax)
    with refused(CalibrationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    assert offenders(caught) == {(KEYS, None)}


def test_calibrated_scales_of_a_latent_have_no_place(sources: Sources, tmp_path: Path) -> None:
    source = sources("latent_blocks")
    config = quant_cfg("w4a16_nvfp4", source, kv_cache="fp8")
    model = mtq.quantize(load(source), {**config, "algorithm": None})
    with refused(UnsupportedQuantizationError, tmp_path) as caught:
        plan_export(model, source, calibrated=False)
    assert {KEYS, VALUES} <= {name for name, _ in offenders(caught)}
    cast = mtq.quantize(load(source), {**quant_cfg("w4a16_nvfp4", source, kv_cache="fp8_cast"), "algorithm": None})
    assert plan_export(cast, source, calibrated=False).plan.quant_config is not None


def test_a_cache_without_quantized_weights_has_no_config(sources: Sources, tmp_path: Path) -> None:
    config = {"quant_cfg": [{"quantizer_name": "*", "enable": False}, CAST], "algorithm": None}
    with refused(UnsupportedQuantizationError, tmp_path):
        export_mcore_gpt_to_hf(mtq.quantize(load(sources("moe")), config), sources("moe"), export_dir=tmp_path / "out")


def test_deepseek_s_blocks_have_no_place_for_it(sources: Sources, tmp_path: Path) -> None:
    with refused(UnsupportedQuantizationError, tmp_path) as caught:
        quantize_checkpoint(sources("moe_blocks"), tmp_path / "out", "fp8_blockwise", kv_cache="fp8_cast")
    assert offenders(caught) == {("kv_cache", None)}


def test_an_unknown_cache_is_an_argument_error(sources: Sources, tmp_path: Path) -> None:
    with refused(ArgumentError, tmp_path):
        quantize_checkpoint(sources("moe"), tmp_path / "out", "w4a16_nvfp4", kv_cache="int8")
    with refused(UnsupportedQuantizationError, tmp_path):
        quantize_checkpoint(sources("moe"), tmp_path / "out", "w4a16_nvfp4", kv_cache="fp8")
    with refused(ArgumentError, tmp_path):
        quant_cfg("w4a16_nvfp4", sources("moe"), kv_cache="int8")
