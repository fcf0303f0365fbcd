"""The plan alone: slices and shapes from headers, with parameters that hold no data."""

import pytest
import torch

from quantplug.checkpoint.reader import TensorHeader
from quantplug.findings import Findings
from quantplug.import_hf.plan import ImportTask, part_index, plan_import, whole_shape
from quantplug.mappings.families import find_family
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions
from quantplug.megatron.parameters import MegatronParameter
from quantplug.topology import Shard, ShardAxis

FAMILY = find_family("Qwen3ForCausalLM")
DIMS = ModelDimensions(1, 160, num_attention_heads=4, num_query_groups=2, head_dim=48, vocab_size=523)
QKV = ParamKey("decoder.layers.*.self_attention.linear_qkv.weight", 0)
EMBEDDING = ParamKey("embedding.word_embeddings.weight")


def parameter(key: ParamKey, *shape: int, shard: Shard | None = None) -> MegatronParameter:
    return MegatronParameter(key, key.name, torch.empty(shape, device="meta"), shard)


def headers(**shapes: tuple[int, ...]) -> dict[str, TensorHeader]:
    """Of every tensor the family has; only the shapes given matter."""
    names = [name for row in FAMILY.mappings for key in row.keys(DIMS) for name in row.hf_names(key, DIMS)]
    found = {name: TensorHeader((160,), torch.bfloat16, "file") for name in names}
    for name, shape in shapes.items():
        found[f"model.layers.0.self_attn.{name}.weight"] = TensorHeader(shape, torch.bfloat16, "file")
    return found


def task(key: ParamKey, *shape: int, shard: Shard | None = None) -> ImportTask:
    mapping = FAMILY.by_megatron()[key.module]
    return ImportTask(parameter(key, *shape, shard=shard), mapping, mapping.hf_names(key, DIMS), cuts_cleanly=True)


def test_whole_shape_of_a_slice():
    assert whole_shape(parameter(QKV, 384, 160)) == (384, 160)
    assert whole_shape(parameter(QKV, 192, 160, shard=Shard(ShardAxis.TP, 0, 1, 2))) == (384, 160)
    assert whole_shape(parameter(QKV, 384, 40, shard=Shard(ShardAxis.ETP, 1, 3, 4))) == (384, 160)


@pytest.mark.parametrize(
    ("index", "bounds"),
    # 4 ranks of 256 padded rows each: the third holds the last 11 rows of 523, the fourth padding alone.
    [(0, (0, 256)), (1, (256, 512)), (2, (512, 523)), (3, (523, 523))],
)
def test_vocabulary_is_cut_by_padded_rows(index, bounds):
    rows, columns = part_index(task(EMBEDDING, 256, 160, shard=Shard(ShardAxis.TP, 0, index, 4)), (523, 160))
    assert (rows, columns) == (slice(*bounds), slice(None))


def test_other_parts_are_cut_evenly():
    assert part_index(task(QKV, 384, 160), (192, 160)) == (slice(0, 192), slice(None))
    half = task(QKV, 192, 160, shard=Shard(ShardAxis.TP, 0, 1, 2))
    assert part_index(half, (96, 160)) == (slice(48, 96), slice(None))


def test_fewer_query_groups_than_ranks_are_read_whole():
    spread = parameter(QKV, 96, 160, shard=Shard(ShardAxis.TP, 0, 0, 4))
    tensors = headers(q_proj=(192, 160), k_proj=(96, 160), v_proj=(96, 160))
    (found,) = plan_import([spread], tensors, FAMILY, DIMS, False, Findings())
    assert not found.cuts_cleanly
    assert part_index(found, (192, 160)) == (slice(0, 192), slice(None))


def test_shapes_of_a_slice_are_checked_as_the_whole():
    whole = headers(q_proj=(192, 160), k_proj=(96, 160), v_proj=(96, 160))
    half = parameter(QKV, 192, 160, shard=Shard(ShardAxis.TP, 0, 1, 2))
    findings = Findings()
    (planned,) = plan_import([half], whole, FAMILY, DIMS, False, findings)
    findings.raise_if_any()
    assert planned.sources == tuple(f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")


def test_tied_output_layer_reads_the_embedding():
    output = parameter(ParamKey("output_layer.weight"), 640, 160)
    tensors = headers()
    tensors["model.embed_tokens.weight"] = TensorHeader((523, 160), torch.bfloat16, "file")
    del tensors["lm_head.weight"]
    findings = Findings()
    (planned,) = plan_import([output], tensors, FAMILY, DIMS, True, findings)
    findings.raise_if_any()
    assert planned.sources == ("model.embed_tokens.weight",)
