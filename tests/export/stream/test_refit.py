"""Streams in the forms in which servers take them: the same tensors, whatever the form, of the model as it is now."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from quantplug import RefitSource, flattened_buckets, plan_stream
from quantplug.errors import ArgumentError
from quantplug.export.stream.refit import FlattenedBucket
from tests.export.checkpoints import load, same_bytes

pytestmark = pytest.mark.usefixtures("single_rank")

Sources = Callable[[str], Path]


def received(bucket: FlattenedBucket) -> dict[str, torch.Tensor]:
    """What SGLang 0.5.23 makes of a bucket: bytes [start_idx, end_idx) viewed as the type, then as the shape."""
    return {
        place.name: bucket.flattened_tensor[place.start_idx : place.end_idx].view(place.dtype).reshape(place.shape)
        for place in bucket.metadata
    }


def test_a_source_declares_what_it_gives_and_gives_it_anew_each_time(sources: Sources) -> None:
    model = load(sources("moe"))
    source = RefitSource(plan_stream(model, sources("moe"), quant_format="w4a16_nvfp4"))
    before = dict(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2
    after = dict(source)

    for given in (before, after):
        assert [(it.name, it.dtype, tuple(it.shape)) for it in source.metadata()] == [
            (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in given.items()
        ]
    assert source.metadata() is source.metadata()
    assert source.held_names() is None
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale_2"
    assert torch.equal(after[name], 2 * before[name])


def test_layers_are_whole_and_in_order(sources: Sources) -> None:
    """vLLM loads a layer when all of it has come, and its groups (`layerwise_groups`) are layers in ascending order."""
    names = [
        it.name
        for it in RefitSource(plan_stream(load(sources("mixed")), sources("mixed"), quant_format="mxfp8")).metadata()
    ]
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]

    assert layers == sorted(layers)
    inside = [index for index, name in enumerate(names) if name.startswith("model.layers.")]
    assert inside == list(range(inside[0], inside[-1] + 1))


@pytest.mark.parametrize("bucket_bytes", [1, 20_000, 10**9])
@pytest.mark.parametrize(
    ("source", "form"), [("moe", "w4a16_nvfp4"), ("mixed", "fp8_dynamic"), ("tied", "w8a16_fp8"), ("gpt_oss", "mxfp4")]
)
def test_buckets_hold_the_stream_and_keep_families_together(
    source: str, form: str, bucket_bytes: int, sources: Sources, tiny_gpt_oss_dir: Path
) -> None:
    directory = tiny_gpt_oss_dir if source == "gpt_oss" else sources(source)
    plan = plan_stream(load(directory), directory, quant_format=form)
    family = plan.families()
    wanted = dict(plan.tensors())
    buckets = list(flattened_buckets(plan, bucket_bytes))

    got = {name: tensor for bucket in buckets for name, tensor in received(bucket).items()}
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not same_bytes(got[name], wanted[name])] == []
    assert sum(len(bucket.metadata) for bucket in buckets) == len(wanted)
    held = [{family[place.name] for place in bucket.metadata} for bucket in buckets]
    assert len(set().union(*held)) == sum(map(len, held))
    for bucket, families in zip(buckets, held, strict=True):
        assert bucket.flattened_tensor.dtype == torch.uint8
        assert bucket.flattened_tensor.nbytes <= bucket_bytes or len(families) == 1
        # Without gaps, as SGLang's receiver lays its own bucket out by names, dtypes and shapes alone.
        assert all(one.end_idx == next_one.start_idx for one, next_one in pairwise(bucket.metadata))
        assert bucket.metadata[-1].end_idx == bucket.flattened_tensor.nbytes
        assert [getattr(torch, name) for name in bucket.dtypes] == [place.dtype for place in bucket.metadata]
    if bucket_bytes == 10**9:
        assert len(buckets) == 1


def test_what_servers_merge_is_one_family(sources: Sources) -> None:
    family = plan_stream(load(sources("moe")), sources("moe"), quant_format="w4a16_nvfp4").families()
    expert = "model.layers.1.mlp.experts.3"

    halves = [f"{expert}.{part}_proj.{what}" for part in ("gate", "up") for what in ("weight", "weight_scale")]
    assert len({family[name] for name in halves}) == 1
    assert len({family[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"}) == 1
    assert family[f"{expert}.up_proj.weight"] != family[f"{expert}.down_proj.weight"]
    assert family[f"{expert}.up_proj.weight"] != family["model.layers.1.mlp.experts.2.up_proj.weight"]


def test_a_bucket_without_room_is_refused_at_the_call(sources: Sources) -> None:
    plan = plan_stream(load(sources("moe")), sources("moe"), quant_format="w4a16_nvfp4")
    with pytest.raises(ArgumentError, match="bucket_bytes: is 0"):
        flattened_buckets(plan, 0)
