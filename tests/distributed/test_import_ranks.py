"""Each rank imports its own slices; Megatron's own resharding then gives the single-rank model back."""

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from transformers import AutoConfig

from quantplug.import_hf.to_model import import_mcore_gpt_from_hf
from quantplug.mappings.families import find_family
from quantplug.megatron import cpu
from quantplug.megatron.models.build import build_model
from quantplug.topology import Shard, ShardAxis
from tests.ranks import run_ranks

SCRIPT = Path(__file__).with_name("import_ranks.py")
LAYOUTS = ["2-1-2-1", "2-2-2-1-2", "2-1-2-2"]  # tp-pp-ep-etp, and virtual stages

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def saved(tiny_qwen3_mixed_dir, tmp_path_factory) -> Path:
    """A directory for each layout, made by four ranks."""
    output = tmp_path_factory.mktemp("layouts")
    ended = run_ranks(4, SCRIPT, tiny_qwen3_mixed_dir, output, *LAYOUTS)
    assert ended.ok, ended.output[-9000:]
    return output


def build(directory: Path):
    config = AutoConfig.from_pretrained(directory).to_dict()
    return build_model(find_family(config["architectures"][0]).megatron_config(config))


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_resharded_import_equals_the_import_on_one_rank(saved, layout, tiny_qwen3_mixed_dir):
    expected, resharded = build(tiny_qwen3_mixed_dir), build(tiny_qwen3_mixed_dir)
    import_mcore_gpt_from_hf(expected, tiny_qwen3_mixed_dir)
    with torch.no_grad():
        for parameter in resharded.parameters():
            parameter.fill_(float("nan"))
    with cpu.checkpointing():
        state = resharded.sharded_state_dict()
        loaded = dist_checkpointing.load(state, str(saved / layout / "weights"))
        resharded.load_state_dict(loaded)
    wanted = dict(expected.named_parameters())
    assert wanted.keys() == dict(resharded.named_parameters()).keys()
    for name, parameter in resharded.named_parameters():
        rows = 523 if "embedding" in name or "output_layer" in name else None
        assert torch.equal(parameter[:rows], wanted[name][:rows]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_knows_global_ids_and_its_slices(saved, layout):
    tp, pp, ep, etp = (int(size) for size in layout.split("-")[:4])
    layers, experts = set(), set()
    for rank in range(4):
        topology, described = torch.load(saved / layout / f"described-{rank}.pt", weights_only=False)
        assert (topology.tp, topology.pp, topology.ep, topology.etp) == (tp, pp, ep, etp)
        shards = {key.module: shard for key, shard, _ in described}
        tp_shard = Shard(ShardAxis.TP, 0, topology.tp_rank, tp)
        assert shards["decoder.layers.*.self_attention.linear_qkv.weight"] == tp_shard
        assert shards["decoder.layers.*.self_attention.linear_qkv.layer_norm_weight"] is None
        if "decoder.layers.*.mlp.experts.linear_fc2.weight*" in shards:
            etp_shard = Shard(ShardAxis.ETP, 1, topology.etp_rank, etp) if etp > 1 else None
            assert shards["decoder.layers.*.mlp.experts.linear_fc2.weight*"] == etp_shard
        layers |= {key.layer for key, _, _ in described} - {None}
        experts |= {(key.layer, key.expert) for key, _, _ in described if key.expert is not None}
        on_this_rank = [key for key, _, _ in described]
        assert len(on_this_rank) == len(set(on_this_rank))
    assert layers == {0, 1, 2, 3}
    assert experts == {(layer, expert) for layer in (0, 2, 3) for expert in range(8)}
