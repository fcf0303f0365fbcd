"""The stream on one rank, against the export to disk, the source's own bytes and the caller's function."""

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from quantplug import QuantplugError, export_hf_weights_quant
from quantplug.errors import (
    ArgumentError,
    MappingError,
    TopologyError,
    UnsupportedModelError,
    UnsupportedQuantizationError,
    WeightError,
)
from quantplug.export.plan.source import Source
from quantplug.export.stream.api import plan_stream
from quantplug.export.stream.broadcast import BroadcastBucket
from quantplug.export.stream.rounds import Delivery, Run
from quantplug.formats.names import QuantFormat
from tests.export.blockwise import blockwise_fp8
from tests.export.checkpoints import linear_weights, load, quantize, raw, read, same_bytes

pytestmark = pytest.mark.usefixtures("single_rank")

Sources = Callable[[str], Path]
BLOCK = (32, 64)  # Divides neither the head size 48 nor the width 160 of the tiny models.


def assert_same_tensors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in expected if not same_bytes(got[name], expected[name])] == []


def quantized_by(
    quant_fn: Callable[..., tuple[torch.Tensor, torch.Tensor]], source: dict[str, torch.Tensor], chosen: set[str]
) -> dict[str, torch.Tensor]:
    """What a gather-then-quantize loop over Hugging Face tensors gives."""
    expected = {}
    for name, tensor in source.items():
        if name in chosen:
            expected[name], expected[f"{name}_scale_inv"] = quant_fn(tensor, BLOCK)
        else:
            expected[name] = tensor
    return expected


@pytest.mark.parametrize(
    ("name", "quant_format"),
    [
        ("moe", "w4a16_nvfp4"),
        ("mixed", QuantFormat.W4A16_NVFP4),
        ("tied", "w8a16_fp8"),
        ("moe_blocks", "fp8_blockwise"),
        ("latent_blocks", "fp8_blockwise"),
        ("moe", "fp8_dynamic"),
        ("moe", "mxfp8"),
    ],
)
def test_a_model_without_quantizers_streams_what_a_calibrated_one_exports(
    name: str, quant_format: str, sources: Sources, exports: Callable[..., Path]
) -> None:
    stream = export_hf_weights_quant(load(sources(name)), sources(name), quant_format=quant_format)
    assert_same_tensors(dict(stream), read(exports(name, str(quant_format))))


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8", "w4a16_nvfp4", "fp8_dynamic", "mxfp8"])
def test_as_quantized_streams_the_export_of_the_same_model(
    scheme: str, sources: Sources, exports: Callable[..., Path]
) -> None:
    model = quantize(load(sources("moe")), scheme)
    stream = export_hf_weights_quant(model, sources("moe"), quant_format="as_quantized")
    assert_same_tensors(dict(stream), read(exports("moe", scheme)))


def test_quantizers_of_the_model_do_not_count_for_a_format_by_name(sources: Sources) -> None:
    plain, quantized = load(sources("moe")), quantize(load(sources("moe")), "fp8")
    expected = dict(export_hf_weights_quant(plain, sources("moe"), quant_format="w4a16_nvfp4"))
    assert_same_tensors(dict(export_hf_weights_quant(quantized, sources("moe"), quant_format="w4a16_nvfp4")), expected)


@pytest.mark.parametrize("name", ["moe", "mixed", "tied"])
def test_a_function_is_given_whole_hugging_face_weights(name: str, sources: Sources) -> None:
    source = read(sources(name))
    stream = export_hf_weights_quant(load(sources(name)), sources(name), None, blockwise_fp8, BLOCK)
    assert_same_tensors(dict(stream), quantized_by(blockwise_fp8, source, set(linear_weights(source))))


def test_the_checker_sees_global_names_and_chooses(sources: Sources) -> None:
    asked: list[str] = []

    def checker(name: str) -> bool:
        asked.append(name)
        return ".experts." in name or "layers.1.self_attention.linear_qkv" in name

    source = read(sources("moe"))
    stream = dict(export_hf_weights_quant(load(sources("moe")), sources("moe"), checker, blockwise_fp8, BLOCK))

    chosen = {name for name in linear_weights(source) if ".experts." in name}
    chosen |= {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"}
    assert_same_tensors(stream, quantized_by(blockwise_fp8, source, chosen))
    assert "decoder.layers.1.mlp.experts.linear_fc1.weight3" in asked
    assert {"embedding.word_embeddings.weight", "output_layer.weight"} <= set(asked)
    assert not [name for name in asked if "norm" in name or "router" in name]


def test_a_checker_chooses_linears_of_a_format_by_name(sources: Sources) -> None:
    plan = plan_stream(
        load(sources("moe")), sources("moe"), lambda name: "self_attention" not in name, quant_format="w4a16_nvfp4"
    )
    quantized = {name for name in plan.expected() if name.endswith(".weight_scale")}
    assert quantized
    assert all(".experts." in name for name in quantized)
    assert plan.quant_config is not None
    assert "model.layers.0.self_attn.q_proj" in plan.quant_config.config_json["ignore"]


def test_a_checker_that_says_no_gives_the_plain_bytes(sources: Sources) -> None:
    stream = export_hf_weights_quant(load(sources("mixed")), sources("mixed"), lambda name: False, blockwise_fp8, BLOCK)
    assert_same_tensors(dict(stream), read(sources("mixed")))


@pytest.mark.parametrize(
    "arguments", [{"quant_format": "w4a16_nvfp4"}, {"quant_fn": blockwise_fp8, "quant_block_size": BLOCK}]
)
def test_scales_follow_their_weight_and_layers_follow_each_other(arguments: dict, sources: Sources) -> None:
    names = [name for name, _ in export_hf_weights_quant(load(sources("moe")), sources("moe"), **arguments)]
    weights = [index for index, name in enumerate(names) if name.endswith(".weight")]
    for start, stop in zip(weights, [*weights[1:], len(names)], strict=True):
        module = names[start].removesuffix("weight")
        assert all(name.startswith(f"{module}weight_scale") for name in names[start + 1 : stop])
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers)


@pytest.mark.parametrize("bucket_bytes", [1, 20_000])
def test_the_size_of_buckets_changes_nothing(bucket_bytes: int, sources: Sources) -> None:
    model = load(sources("moe"))
    expected = list(export_hf_weights_quant(model, sources("moe"), quant_format="w4a16_nvfp4"))
    small = list(export_hf_weights_quant(model, sources("moe"), quant_format="w4a16_nvfp4", bucket_bytes=bucket_bytes))
    assert [name for name, _ in small] == [name for name, _ in expected]
    assert_same_tensors(dict(small), dict(expected))


def test_the_suffix_of_scales_is_the_callers(sources: Sources) -> None:
    plan = plan_stream(load(sources("moe")), sources("moe"), None, blockwise_fp8, BLOCK, scale_suffix="_scale")
    assert "model.layers.0.self_attn.o_proj.weight_scale" in plan.expected()
    assert not [name for name in plan.expected() if name.endswith("_inv")]


def test_a_plan_serves_every_step_of_a_training(sources: Sources) -> None:
    model = load(sources("moe"))
    plan = plan_stream(model, sources("moe"), quant_format="w4a16_nvfp4")
    first = dict(plan.tensors())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    second = dict(plan.tensors())
    assert_same_tensors(second, dict(export_hf_weights_quant(model, sources("moe"), quant_format="w4a16_nvfp4")))
    scale = "model.layers.0.self_attn.o_proj.weight_scale_2"
    assert not same_bytes(first[scale], second[scale])
    assert list(second) == list(plan.expected())
    for name, spec in plan.expected().items():
        assert (tuple(second[name].shape), second[name].dtype) == (spec.shape, spec.dtype)


def test_nothing_that_is_done_to_the_tensors_reaches_the_model(sources: Sources) -> None:
    def careless(weight: torch.Tensor, block_size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        result = blockwise_fp8(weight, block_size)
        weight.zero_()
        return result

    model = load(sources("moe"))
    before = {name: raw(parameter) for name, parameter in model.named_parameters()}
    for name, tensor in export_hf_weights_quant(model, sources("moe"), None, careless, BLOCK):
        assert not tensor.requires_grad, name
        assert tensor.grad_fn is None
        tensor.view(torch.uint8).zero_()
    assert {name: raw(parameter) for name, parameter in model.named_parameters()} == before
    assert torch.is_grad_enabled()


def test_a_tensor_that_is_kept_does_not_keep_its_bucket(sources: Sources) -> None:
    for _, tensor in export_hf_weights_quant(load(sources("moe")), sources("moe"), quant_format="w4a16_nvfp4"):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_bucket_is_gone_before_the_next_is_packed(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[BroadcastBucket]] = []
    alive = []
    deliver = Delivery._deliver

    def watched(self: Delivery, run: Run, source: Source) -> BroadcastBucket:
        alive.append(sum(bucket() is not None for bucket in made))
        bucket = deliver(self, run, source)
        made.append(weakref.ref(bucket))
        return bucket

    monkeypatch.setattr(Delivery, "_deliver", watched)
    plan = plan_stream(load(sources("moe")), sources("moe"), quant_format="w4a16_nvfp4", bucket_bytes=20_000)
    assert len(list(plan.tensors())) == len(plan.expected())
    assert len(alive) > 2
    assert not any(alive)


class TestTied:
    def everything(self, name: str) -> bool:
        return True

    def test_lm_head_is_left_out_as_in_the_checkpoint(self, sources: Sources) -> None:
        plan = plan_stream(load(sources("tied")), sources("tied"), self.everything, blockwise_fp8, BLOCK)
        assert "model.embed_tokens.weight_scale_inv" in plan.expected()
        assert "lm_head.weight" not in plan.expected()

    @pytest.mark.parametrize("quantized", [True, False])
    def test_lm_head_comes_with_its_scale_where_it_is_asked_for(self, quantized: bool, sources: Sources) -> None:
        # Padding rows that Megatron adds must not count in the scale of the last block of rows.
        model = load(sources("tied"))
        with torch.no_grad():
            model.embedding.word_embeddings.weight[523:] = 1e4
        stream = list(
            export_hf_weights_quant(
                model,
                sources("tied"),
                lambda name: quantized,
                blockwise_fp8,
                BLOCK,
                emit_tied=True,
            )
        )
        embedding = read(sources("tied"))["model.embed_tokens.weight"]
        assert len(embedding) == 523
        suffixes = ["weight", "weight_scale_inv"] if quantized else ["weight"]
        assert [name for name, _ in stream[: 2 * len(suffixes)]] == [
            f"{module}.{suffix}" for module in ("model.embed_tokens", "lm_head") for suffix in suffixes
        ]
        expected = blockwise_fp8(embedding, BLOCK) if quantized else (embedding,)
        for (name, tensor), wanted in zip(stream, (*expected, *expected), strict=False):
            assert same_bytes(tensor, wanted), name


def three(weight: torch.Tensor, block_size: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    return weight, weight, weight


def fails(weight: torch.Tensor, block_size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    raise ValueError("no kernel for this GPU")


def forgetful(name: str) -> bool:
    return {}[name]


FUNCTION = {"quant_fn": blockwise_fp8, "quant_block_size": BLOCK}


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({}, UnsupportedQuantizationError, "neither given"),
        ({**FUNCTION, "quant_format": "w8a16_fp8"}, UnsupportedQuantizationError, "both given"),
        (
            {"quant_format": "int3"},
            ArgumentError,
            "w4a16_nvfp4, nvfp4, fp8, w8a16_fp8, fp8_blockwise, fp8_dynamic, int4, mxfp8",
        ),
        ({"quant_format": "nvfp4"}, UnsupportedQuantizationError, "Use w4a16_nvfp4: the same weights"),
        ({"quant_format": "fp8"}, UnsupportedQuantizationError, "Use w8a16_fp8: the same weights"),
        ({"quant_format": "w8a16_fp8", "quant_block_size": BLOCK}, UnsupportedQuantizationError, "quant_block_size"),
        ({**FUNCTION, "dialect": "modelopt"}, UnsupportedQuantizationError, "beside quant_fn"),
        ({"quant_format": "w8a16_fp8", "dialect": "modelopt"}, UnsupportedQuantizationError, "has no name for w8a16"),
        ({"quant_format": "w8a16_fp8", "dialect": "gguf"}, ArgumentError, "is 'gguf'"),
        (
            {"quant_format": "mxfp8", "expert_format": "nvfp4"},
            UnsupportedQuantizationError,
            "expert_format: is 'nvfp4'",
        ),
        ({"quant_format": "mxfp8", "expert_format": "int4", "group_size": 64}, ArgumentError, "is 64, with int4"),
        (
            {**FUNCTION, "expert_format": "int4"},
            UnsupportedQuantizationError,
            "expert_format: is given without the name",
        ),
        ({**FUNCTION, "quant_block_size": 128}, UnsupportedQuantizationError, r"is 128, not \(rows, columns\)"),
        ({**FUNCTION, "quant_block_size": (0, 128)}, UnsupportedQuantizationError, r"not \(rows, columns\)"),
        ({**FUNCTION, "scale_suffix": ""}, UnsupportedQuantizationError, "scale_suffix"),
        (
            {"quant_format": "as_quantized", "quantization_checker": bool},
            UnsupportedQuantizationError,
            "leaves the choice to the quantizers",
        ),
        ({"quant_format": "w8a16_fp8", "receiver_ranks": [1]}, TopologyError, r"receiver_ranks: is \[1\]"),
        ({"quant_format": "w8a16_fp8", "receiver_ranks": []}, TopologyError, r"is \[\]"),
        ({"quant_format": "w8a16_fp8", "receiver_ranks": [0, 0]}, TopologyError, r"is \[0, 0\]"),
        ({"quant_format": "fp8_blockwise"}, QuantplugError, "end inside a block of 128 rows, and servers merge"),
        ({"quant_fn": three}, UnsupportedQuantizationError, "does not return two tensors"),
        ({"quant_fn": fails}, UnsupportedQuantizationError, "raised ValueError .*no kernel for this GPU"),
        ({**FUNCTION, "quantization_checker": forgetful}, UnsupportedQuantizationError, "raised KeyError"),
        (
            {**FUNCTION, "quantization_checker": lambda name: not name.endswith("linear_fc2.weight2")},
            UnsupportedQuantizationError,
            r"(?s)experts of one layer.*linear_fc2.weight2 \(expert 2\): no, yes for others of layer 0",
        ),
    ],
)
def test_what_is_wrong_is_raised_by_the_call(
    arguments: dict, error: type[QuantplugError], says: str, sources: Sources
) -> None:
    with pytest.raises(error, match=says):
        export_hf_weights_quant(load(sources("moe")), sources("moe"), **arguments)


def test_adapters_that_are_not_merged_are_refused_by_the_call(sources: Sources) -> None:
    class LoraLinear(nn.Module):
        def __init__(self, wrapped: nn.Module) -> None:
            super().__init__()
            self.to_wrap = wrapped
            self.adapter = nn.ModuleDict({"linear_in": nn.Linear(192, 8), "linear_out": nn.Linear(8, 160)})

    model = load(sources("moe"))
    attention = model.decoder.layers[1].self_attention
    attention.linear_proj = LoraLinear(attention.linear_proj)
    with pytest.raises(UnsupportedModelError, match="Merge them") as caught:
        export_hf_weights_quant(model, sources("moe"), quant_format="w4a16_nvfp4")
    names = {offender.parameter for offender in caught.value.offenders}
    linear = "decoder.layers.1.self_attention.linear_proj"
    assert {f"{linear}.to_wrap.weight", f"{linear}.adapter.linear_in.weight"} <= names
    assert all(name.startswith(linear) for name in names)


def test_one_nan_ends_the_stream_before_its_first_tensor(sources: Sources) -> None:
    model = load(sources("moe"))
    plan = plan_stream(model, sources("moe"), quant_format="w4a16_nvfp4")
    with torch.no_grad():
        model.decoder.layers[1].mlp.experts.linear_fc2.weight2[3, 5] = torch.nan
    with pytest.raises(WeightError, match=r"linear_fc2.weight2 \(expert 2\): 1 NaN; first at \[3, 5\]"):
        next(plan.tensors())


@pytest.mark.parametrize("way", ["w4a16_nvfp4", "as_quantized"])
def test_an_outlier_that_would_drown_its_weight_ends_the_stream_before_its_first_tensor(
    way: str, sources: Sources
) -> None:
    model = load(sources("moe"))
    with torch.no_grad():
        model.decoder.layers[1].mlp.experts.linear_fc1.weight2[3, 7] = 3e38
    if way == "as_quantized":
        quantize(model, "w4a16_nvfp4")
    plan = plan_stream(model, sources("moe"), quant_format=way)
    with pytest.raises(WeightError, match="1919 of 1920 blocks of 16 would become zero") as caught:
        next(plan.tensors())
    assert [offender.expert for offender in caught.value.offenders] == [2]
    # The next step of the training may be a good one.
    with torch.no_grad():
        model.decoder.layers[1].mlp.experts.linear_fc1.weight2[3, 7] = 0.0
    if way == "w4a16_nvfp4":
        assert dict(plan.tensors()).keys() == plan.expected().keys()


def test_a_plain_weight_that_overflows_is_refused(sources: Sources) -> None:
    model = load(sources("moe_fp32"), dtype=torch.float32)
    with torch.no_grad():
        model.decoder.layers[0].mlp.router.weight[0, 0] = 1e5
    stream = export_hf_weights_quant(model, sources("moe_fp32"), quant_format="w4a16_nvfp4", dtype=torch.float16)
    with pytest.raises(WeightError, match=r"router\.weight: overflows torch\.float16"):
        next(stream)


def test_a_function_may_not_change_its_mind(sources: Sources) -> None:
    calls = 0

    def fickle(weight: torch.Tensor, block_size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        codes, scale = blockwise_fp8(weight, block_size)
        return codes, scale.squeeze() if calls > 12 else scale[..., None]

    stream = export_hf_weights_quant(load(sources("moe")), sources("moe"), None, fickle, BLOCK)
    with pytest.raises(UnsupportedQuantizationError, match="where it gave"):
        list(stream)


def test_other_amaxes_need_another_plan_where_they_count(sources: Sources) -> None:
    model = quantize(load(sources("moe")), "fp8")
    by_name = plan_stream(model, sources("moe"), quant_format="w4a16_nvfp4")
    as_quantized = plan_stream(model, sources("moe"), quant_format="as_quantized")
    model.decoder.layers[0].self_attention.linear_proj.weight_quantizer.amax = torch.tensor(7.0)
    dict(by_name.tensors())  # Which does not look at quantizers.
    with pytest.raises(MappingError, match=r"linear_proj\.weight: has another .*quantizer\n.*plan_stream"):
        next(as_quantized.tensors())


def test_a_model_that_lost_a_weight_needs_another_plan(sources: Sources) -> None:
    model = load(sources("moe"))
    plan = plan_stream(model, sources("moe"), quant_format="w4a16_nvfp4")
    del model.decoder.layers[1].mlp.experts.linear_fc2._parameters["weight2"]
    with pytest.raises(MappingError, match=r"linear_fc2\.weight2 \(expert 2\): is gone"):
        next(plan.tensors())


def test_what_did_not_come_is_named_at_the_end(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Delivery.rounds
    monkeypatch.setattr(Delivery, "rounds", lambda self, runs, source: whole(self, runs[:-1], source))
    stream = export_hf_weights_quant(load(sources("moe")), sources("moe"), quant_format="w4a16_nvfp4", bucket_bytes=1)
    with pytest.raises(MappingError, match=r"experts\.3\.down_proj\.weight_scale on rank 0: is missing"):
        list(stream)
