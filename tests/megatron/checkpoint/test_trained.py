"""Checkpoints of trainers, loaded on one rank; on several, see tests/distributed/test_trained_checkpoints.py."""

import argparse
import io
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import nn

import quantplug
from quantplug.checkpoint.torch_dist.aside import kind_of
from quantplug.errors import CheckpointError
from quantplug.megatron import cpu
from quantplug.megatron.checkpoint.files import results_within_process
from quantplug.megatron.checkpoint.save_load import load_checkpoint, save_checkpoint
from quantplug.megatron.models.build import LayerSpec
from quantplug.megatron.parameters import iter_parameters
from quantplug.megatron.releases.installed import MEGATRON_CORE
from tests.distributed.test_export_topologies import assert_same_tensors
from tests.export.checkpoints import load, one_rank
from tests.megatron.checkpoint.trained import BESIDE, CHECKPOINTS, save_trained
from tests.plugins.tiny_model import tiny_model

with_samples = pytest.mark.skipif(not CHECKPOINTS.is_dir(), reason="the checkpoints of trainers are not here")


@pytest.fixture(scope="module", autouse=True)
def one_for_all() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two iterations, the newest of them of the tiny model."""
    root = tmp_path_factory.mktemp("trained")
    save_trained([tiny_model(num_layers=1)], root, 50)
    save_trained([seeded()], root, 100, num_layers=2)
    return root


def seeded(**settings: Any) -> nn.Module:
    torch.manual_seed(4)
    return tiny_model(**settings)


def bare_save(state: dict[str, Any], directory: Path) -> Path:
    directory.mkdir(parents=True)
    with cpu.checkpointing(), results_within_process():
        dist_checkpointing.save(state, str(directory))
    return directory


def stacked(model: nn.Module) -> dict[str, Any]:
    with cpu.checkpointing():
        return dict(model.sharded_state_dict(metadata={"singleton_local_shards": False}))


def assert_same_weights(model: nn.Module, expected: nn.Module, vocabulary: int | None = None) -> None:
    wanted = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        # What padding holds is nobody's business.
        rows = vocabulary if name in ("embedding.word_embeddings.weight", "output_layer.weight") else None
        assert torch.equal(parameter[:rows], wanted[name][:rows]), name


@with_samples
def test_megatron_lms_own_is_the_hugging_face_model(tmp_path: Path) -> None:
    model = quantplug.build_model(CHECKPOINTS / "hf")
    report = load_checkpoint(model, CHECKPOINTS / "megatron-lm", iteration=100)
    assert [it.kind for it in report.aside] == ["random number generators"]
    quantplug.export_mcore_gpt_to_hf(model, CHECKPOINTS / "hf", export_dir=tmp_path / "out")
    assert_same_tensors(tmp_path / "out", CHECKPOINTS / "hf")


@with_samples
def test_bridges_own_has_every_amax_of_the_hugging_face_model(tmp_path: Path) -> None:
    model = quantplug.build_model(CHECKPOINTS / "hf")
    report = load_checkpoint(model, CHECKPOINTS / "megatron-bridge-quantized")
    assert_same_weights(model, load(CHECKPOINTS / "hf"))
    assert report.vocabulary == (389, 512)
    weights = dict(model.named_parameters())
    amaxes = {name: amax for name, amax in model.named_buffers() if name.endswith("_amax")}
    assert len(amaxes) == 2 * (2 + 2 * 8)
    for name, amax in amaxes.items():
        above, _, expert = name.removesuffix("._amax").partition(".weight_quantizer")
        assert amax == weights[f"{above}.weight{expert.removeprefix('.')}"].abs().max(), name
    quantplug.export_mcore_gpt_to_hf(model, CHECKPOINTS / "hf", export_dir=tmp_path / "out")
    quantplug.quantize_checkpoint(CHECKPOINTS / "hf", tmp_path / "expected", "w4a16_nvfp4")
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_mixed"])
@pytest.mark.parametrize("alike", [True, False])
def test_stacked_layers_and_experts_are_taken_apart(
    name: str, alike: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if alike and name == "qwen3_mixed":
        pytest.skip("its layers are not alike")
    source = request.getfixturevalue(f"tiny_{name}_dir")
    saved = load(source)
    save_trained([saved], tmp_path, alike=alike)
    model = quantplug.build_model(source)
    before = vars(model.config).copy()
    report = load_checkpoint(model, tmp_path)
    assert_same_weights(model, saved)
    assert {it.kind: it.entries for it in report.aside} == BESIDE
    assert all(it.nbytes > 0 for it in report.aside)
    assert vars(model.config) == before


def test_an_iteration_is_chosen_and_the_newest_is_the_default(trained: Path) -> None:
    model = tiny_model()
    load_checkpoint(model, trained)
    assert_same_weights(model, seeded())
    load_checkpoint(tiny_model(num_layers=1), trained, iteration=50)
    load_checkpoint(tiny_model(num_layers=1), trained / "iter_0000050")
    with pytest.raises(CheckpointError, match="iter_0000050, iter_0000100"):
        load_checkpoint(model, trained, iteration=7)


def test_a_bare_save_with_virtual_stages_names(trained: Path, tmp_path: Path) -> None:
    model = seeded()
    directory = bare_save({"model0": stacked(model)}, tmp_path / "bare")
    loaded = tiny_model()
    assert load_checkpoint(loaded, directory).aside == ()
    assert_same_weights(loaded, model)


def test_another_model_is_told_in_a_few_lines(trained: Path) -> None:
    model = tiny_model(num_layers=4, hidden_size=128, num_moe_experts=4, moe_ffn_hidden_size=64)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, trained)
    assert "hidden size: 160 in the checkpoint, 128 in the model" in caught.value.problem
    assert "layers: 2 in the checkpoint, 4 in the model" in caught.value.problem
    assert "experts: 8 in the checkpoint, 4 in the model" in caught.value.problem
    assert "width of experts: 96 in the checkpoint, 64 in the model" in caught.value.problem
    assert "rows of q" not in caught.value.problem
    assert len(str(caught.value).splitlines()) <= 11
    assert len(caught.value.offenders) == 12
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def test_a_weight_that_the_model_has_no_place_for_is_not_left_aside(tmp_path: Path) -> None:
    model = seeded()
    state = stacked(model)
    extra = {**state, "more": dist_checkpointing.ShardedTensor.from_rank_offsets("decoder.more.weight", torch.ones(3))}
    extra["data"] = ShardedObject("dataset", {"seen": 3}, (1,), (0,))
    directory = bare_save(extra, tmp_path / "bare")
    with pytest.raises(
        CheckpointError, match=r"decoder\.more\.weight.*is in the checkpoint and not in the model"
    ) as it:
        load_checkpoint(tiny_model(), directory)
    assert [offender.parameter for offender in it.value.offenders] == ["decoder.more.weight"]


def test_a_wrapper_that_was_saved_as_a_whole_is_taken_off(tmp_path: Path) -> None:
    model = seeded()
    with cpu.checkpointing():
        state = model.sharded_state_dict(prefix="module.module.", metadata={"singleton_local_shards": False})
    directory = bare_save(state, tmp_path / "wrapped")
    loaded = tiny_model()
    load_checkpoint(loaded, directory)
    assert_same_weights(loaded, model)


AS_TRAINED: dict[str, Any] = {
    "norm_epsilon": 1e-5,
    "apply_layernorm_1p": False,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 48,
    "normalization": "RMSNorm",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "moe_router_topk": 2,
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.01,
    "position_embedding_type": "rope",
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "rotary_seq_len_interpolation_factor": None,
    "window_size": None,
    "window_attn_skip_freq": None,
    "rope_type": None,
    "mscale": 1.0,
    "rotary_scaling_factor": 1.0,
}


@with_samples
def test_an_export_without_a_model_asks_the_config(tmp_path: Path) -> None:
    hf, checkpoint = CHECKPOINTS / "hf", tmp_path / "iter_0000100"
    shutil.copytree(CHECKPOINTS / "megatron-lm" / checkpoint.name, checkpoint)
    (checkpoint / "common.pt").chmod(0o600)
    torch.save({"args": argparse.Namespace(moe_router_topk=4, norm_epsilon=1e-6)}, checkpoint / "common.pt")
    with pytest.raises(CheckpointError, match=r"moe_router_topk: is 4 by the trainer's arguments, 2 in config\.json"):
        quantplug.export_checkpoint(checkpoint, tmp_path / "out", hf)
    assert not (tmp_path / "out").exists()
    quantplug.export_checkpoint(checkpoint, tmp_path / "out", hf, unchecked_settings=["moe_router_topk"])


@with_samples
def test_bridges_settings_are_asked_too(tmp_path: Path) -> None:
    bridge = CHECKPOINTS / "megatron-bridge-quantized" / "iter_0000000"
    copy = tmp_path / "copy"
    shutil.copytree(bridge, copy, copy_function=shutil.copyfile)
    text = (bridge / "run_config.yaml").read_text()
    changed = text.replace("  moe_router_topk: 2\n", "  moe_router_topk: 4\n").replace("1.0e-06", "1.0e-05")
    (copy / "run_config.yaml").write_text(changed.replace("  rotary_base: 10000\n", "  rotary_base: 1000000\n"))
    with pytest.raises(CheckpointError, match="was trained with other settings") as caught:
        quantplug.export_checkpoint(copy, tmp_path / "out", CHECKPOINTS / "hf")
    assert [it.parameter for it in caught.value.offenders] == ["layernorm_epsilon", "rotary_base", "moe_router_topk"]
    with pytest.raises(CheckpointError, match="moe_router_topk: is 4 by the trainer's arguments, 2 in the model"):
        load_checkpoint(quantplug.build_model(CHECKPOINTS / "hf"), copy)


def test_arguments_of_the_model_that_was_trained_are_those_of_this_one(tmp_path: Path) -> None:
    save_trained([seeded()], tmp_path, **AS_TRAINED)
    load_checkpoint(tiny_model(), tmp_path)


def test_norms_of_a_model_trained_around_zero_multiply_with_the_same(tmp_path: Path) -> None:
    around_zero = seeded(layernorm_zero_centered_gamma=True)
    norms = {it.key: it.tensor for it in iter_parameters(around_zero) if it.zero_centred}
    assert len(norms) == 2 * 4 + 1
    with torch.no_grad():
        for norm in norms.values():
            norm.uniform_(-0.5, 0.5)
    save_trained([around_zero], tmp_path, **{**AS_TRAINED, "apply_layernorm_1p": True})
    model = tiny_model()
    report = load_checkpoint(model, tmp_path)
    for parameter in iter_parameters(model):
        if parameter.key in norms:
            assert torch.equal(parameter.tensor, (norms[parameter.key].float() + 1).bfloat16()), parameter.key
    assert report.recentred == len(norms)
    assert "Recentred: 9 norms" in "\n".join(report.said())
    save_checkpoint(around_zero, tmp_path / "own", extra={})
    again = tiny_model()
    assert load_checkpoint(again, tmp_path / "own").recentred == len(norms)
    assert_same_weights(again, model)
    alike = tiny_model(layernorm_zero_centered_gamma=True)
    assert load_checkpoint(alike, tmp_path).recentred == 0
    assert_same_weights(alike, around_zero)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"moe_router_topk": 4}, "moe_router_topk: is 4 by the trainer's arguments, 2 in the model"),
        ({"norm_epsilon": 1e-6}, "layernorm_epsilon: is 1e-06 by the trainer's arguments, 1e-05 in the model"),
        ({"rotary_base": 1e6}, "rotary_base: is 1000000.0 by the trainer's arguments, 10000 in the model"),
        ({"rotary_percent": 0.5}, "rotary_percent"),
        ({"moe_router_pre_softmax": True}, "moe_router_pre_softmax"),
        ({"moe_router_topk_scaling_factor": 2.5}, "moe_router_topk_scaling_factor"),
        ({"num_query_groups": 4}, "num_query_groups"),
        ({"position_embedding_type": "none"}, "position_embedding_type: is None by"),
        ({"rotary_seq_len_interpolation_factor": 4}, "seq_len_interpolation_factor: is 4 by"),
        ({"window_size": (127, 0), "window_attn_skip_freq": 2}, "window_size: is (127, (True, False)) by"),
    ],
)
def test_a_model_that_computes_otherwise_than_it_was_trained_is_refused(
    arguments: dict[str, Any], said: str, tmp_path: Path
) -> None:
    save_trained([seeded()], tmp_path, **{**AS_TRAINED, **arguments})
    with pytest.raises(CheckpointError, match="was trained with other settings") as caught:
        load_checkpoint(tiny_model(), tmp_path)
    assert said in str(caught.value)
    named = [offender.parameter for offender in caught.value.offenders]
    # Without positions there is nothing that rotates either.
    assert len(named) == (1 if "position" not in said else 4)
    load_checkpoint(tiny_model(), tmp_path, unchecked_settings=named)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_of_another_type_are_rounded_and_it_is_said(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = seeded().to(dtype)
    with torch.no_grad():
        saved.decoder.final_layernorm.weight[:2] = torch.tensor([1.00390625 + 2**-10, 0.3333])
    directory = bare_save(stacked(saved), tmp_path / "wide")
    model = tiny_model()
    report = load_checkpoint(model, directory)
    assert_same_weights(model, saved.to(torch.bfloat16))
    (rounded,) = report.rounded
    assert (rounded.stored, rounded.live) == (dtype, torch.bfloat16)
    assert rounded.tensors == 12
    assert f"are {dtype} in the checkpoint and torch.bfloat16 in the model" in "\n".join(report.said())


def test_values_that_stand_for_others_by_a_scale_are_refused(tmp_path: Path) -> None:
    saved = seeded()
    state = stacked(saved)
    entry = state["decoder.layers.0.self_attention.linear_proj.weight"]
    state = {name: it for name, it in state.items() if it.key != entry.key}
    eight = torch.zeros(2, 160, 192, dtype=torch.float8_e4m3fn)
    state["eight"] = dist_checkpointing.ShardedTensor.from_rank_offsets(entry.key, eight)
    directory = bare_save(state, tmp_path / "eight")
    with pytest.raises(CheckpointError, match=r"linear_proj\.weight.*float8_e4m3fn in the checkpoint and torch\.bf"):
        load_checkpoint(tiny_model(), directory)


@pytest.mark.parametrize(
    ("rows", "arguments", "taken"),
    [
        (384, {}, True),
        (389, {}, False),
        (512, {}, True),
        (1024, {}, True),
        (300, {}, True),
        (640, {}, False),
        (2048, {}, False),
        (200, {}, False),
        (1024, {"make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 2}, False),
        (900, {"make_vocab_size_divisible_by": 4096, "tensor_model_parallel_size": 1}, False),
        (512, {"make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 4}, True),
    ],
)
def test_rows_of_a_vocabulary_that_padding_does_not_explain_are_refused(
    rows: int, arguments: dict[str, int], taken: bool
) -> None:
    from quantplug.checkpoint.torch_dist.noted.vocabulary import is_padding

    multiple = arguments.get("make_vocab_size_divisible_by", 0) * arguments.get("tensor_model_parallel_size", 0)
    assert is_padding(rows, 384, 1, multiple or None) is taken


def test_a_vocabulary_that_grew_is_refused(tmp_path: Path) -> None:
    model = seeded()
    state = stacked(model)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        grown = torch.ones(2048, 160, dtype=torch.bfloat16)
        state[name] = dist_checkpointing.ShardedTensor.from_rank_offsets(name, grown)
    directory = bare_save(state, tmp_path / "grown")
    with pytest.raises(CheckpointError, match="has 2048 rows in the checkpoint and 384 in the model"):
        load_checkpoint(tiny_model(), directory)


def test_whether_it_must_be_quantized_is_asked_first(trained: Path, tmp_path: Path) -> None:
    save_checkpoint(mtq.quantize(tiny_model(), mtq.W4A16_NVFP4_CFG), tmp_path / "q", extra={})
    model = tiny_model()
    with pytest.raises(CheckpointError, match=r"quantized model already(.|\n)*examples/export.py"):
        load_checkpoint(model, tmp_path / "q", quantized=False)
    with pytest.raises(CheckpointError, match="not that of a quantized model"):
        load_checkpoint(model, trained, quantized=True)
    assert not mto.ModeloptStateManager.is_converted(model)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("optimizer.state.exp_avg.decoder.layers.mlp.router.weight", "optimizer"),
        ("optimizer.distributed.dp_group_idx_0.param_state/shard_0_1", "optimizer"),
        ("chained_1.optimizer.state.fp32_param.output_layer.weight", "optimizer"),
        ("optimizer_state/shard_0_1", "optimizer"),
        ("rng_state/shard_0.0_1.1", "random number generators"),
        ("rerun_state_machine_state/shard_3_8", "rerun state"),
        ("opt_param_scheduler/shard_0_1", "scheduler"),
        ("train_state/shard_0_1", "train state"),
        ("common_state/shard_0_1", "common state"),
        ("something/shard_0_1", "other objects"),
        ("decoder.layers.mlp.router.weight", None),
        ("optimizers.weight", None),
        ("decoder.layers.self_attention.linear_proj._extra_state/shard_0_2", None),
        ("mtp.layers.0.eh_proj.weight", None),
    ],
)
def test_what_is_left_aside(key: str, kind: str | None) -> None:
    assert kind_of(key) == kind


def quantized_checkpoint(directory: Path) -> Path:
    save_checkpoint(mtq.quantize(seeded(), mtq.W4A16_NVFP4_CFG), directory, extra={})
    (directory / "quantplug.json").unlink()
    return directory


@pytest.mark.skipif(MEGATRON_CORE >= (0, 19), reason="there it always is")
def test_what_modelopt_notes_may_be_an_object(tmp_path: Path) -> None:
    """As Megatron-Core 0.19 keeps it, without a common.pt."""
    directory = quantized_checkpoint(tmp_path / "q")
    noted = torch.load(directory / "modelopt_state" / "common.pt", weights_only=True)
    shutil.rmtree(directory / "modelopt_state")
    part = bare_save({"it": ShardedObject("common_state", noted, (1,), (0,))}, directory / "modelopt_state")
    (part / "common.pt").unlink()
    model = tiny_model()
    load_checkpoint(model, directory)
    assert mto.ModeloptStateManager.is_converted(model)
    assert_same_weights(model, seeded())


def test_notes_of_modelopt_without_quantizers_make_none(trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained / "iter_0000100", tmp_path / "copy")
    bare_save({"modelopt_state_dict": [("kd_loss", {})], "modelopt_version": "0.47.0"}, copy / "modelopt_state")
    model = tiny_model()
    load_checkpoint(model, copy, quantized=False)
    assert not mto.ModeloptStateManager.is_converted(model)
    assert_same_weights(model, seeded())


def test_a_pickle_in_place_of_what_modelopt_notes_does_not_run(tmp_path: Path) -> None:
    directory = quantized_checkpoint(tmp_path / "q")
    torch.save({"modelopt_state_dict": [Hostile(tmp_path / "mark")]}, directory / "modelopt_state" / "common.pt")
    with pytest.raises(CheckpointError, match=r"modelopt_state/common\.pt"):
        load_checkpoint(tiny_model(), directory)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(("saved_as", "loaded_as"), [("LOCAL", "TRANSFORMER_ENGINE"), ("TRANSFORMER_ENGINE", "LOCAL")])
def test_a_norm_may_be_a_module_or_fused_into_a_linear(
    saved_as: str, loaded_as: str, tmp_path: Path, tiny_qwen3_moe_dir: Path
) -> None:
    saved = load(tiny_qwen3_moe_dir, LayerSpec[saved_as])
    save_trained([saved], tmp_path)
    model = quantplug.build_model(tiny_qwen3_moe_dir, layer_spec=LayerSpec[loaded_as])
    load_checkpoint(model, tmp_path)
    expected = {it.key: it.tensor for it in iter_parameters(load(tiny_qwen3_moe_dir, LayerSpec[loaded_as]))}
    for parameter in iter_parameters(model):
        assert torch.equal(parameter.tensor, expected[parameter.key]), parameter.key


class Hostile:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def pickled_save(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def as_bytes(value: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(value), dtype=torch.uint8)


def test_a_pickle_in_place_of_the_index_does_not_run(trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained / "iter_0000100", tmp_path / "copy")
    (copy / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "mark")))
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        load_checkpoint(tiny_model(), copy)
    assert not (tmp_path / "mark").exists()


def test_a_pickle_in_place_of_common_state_does_not_run(trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained / "iter_0000100", tmp_path / "copy")
    torch.save({"args": Hostile(tmp_path / "mark")}, copy / "common.pt")
    load_checkpoint(tiny_model(), copy)
    assert not (tmp_path / "mark").exists()


def test_objects_of_a_model_that_is_not_quantized_are_not_read(tmp_path: Path) -> None:
    """Neither what is beside the model, nor what Transformer Engine keeps of training in FP8, which is a pickle."""
    state = stacked(seeded())
    state["rng"] = ShardedObject("rng_state", [Hostile(tmp_path / "mark")], (1, 1), (0, 0))
    within = as_bytes(pickle.dumps({"recipe": Hostile(tmp_path / "mark")}))
    for name, entry in state.items():
        if isinstance(entry, ShardedObject) and "_extra_state" in name:
            entry.data = within if "linear_qkv" in name else Hostile(tmp_path / "mark")
    model = tiny_model()
    load_checkpoint(model, bare_save(state, tmp_path / "bare"))
    assert_same_weights(model, seeded())
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "entry",
    [
        lambda mark: Hostile(mark),
        lambda mark: as_bytes(pickled_save(Hostile(mark))),
        lambda mark: as_bytes(pickle.dumps(Hostile(mark))),
        lambda mark: {"modelopt_quantizer_state": {}},
        lambda mark: as_bytes(pickled_save([1])),
    ],
    ids=["object", "settings", "pickle", "no tensor", "no settings"],
)
def test_settings_of_quantizers_are_read_as_data(entry: Callable[[Path], object], tmp_path: Path) -> None:
    saved = mtq.quantize(tiny_model(), mtq.W4A16_NVFP4_CFG)
    with cpu.checkpointing():
        state = saved.sharded_state_dict()
    state["decoder.layers.1.self_attention.linear_proj._extra_state"].data = entry(tmp_path / "mark")
    directory = bare_save(state, tmp_path / "q")
    save_checkpoint(saved, tmp_path / "own", extra={})
    shutil.copytree(tmp_path / "own" / "modelopt_state", directory / "modelopt_state")
    model = tiny_model()
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attention\.linear_proj\._extra_state/shard_0_1"):
        load_checkpoint(model, directory)
    assert not (tmp_path / "mark").exists()


def test_transformer_engines_own_state_beside_settings_is_left_aside(tmp_path: Path) -> None:
    saved = mtq.quantize(tiny_model(), mtq.W4A16_NVFP4_CFG)
    with cpu.checkpointing():
        state = saved.sharded_state_dict()
    entry = state["decoder.layers.1.self_attention.linear_proj._extra_state"]
    settings = torch.load(io.BytesIO(entry.data.numpy().tobytes()), weights_only=True)
    settings["extra_state"] = as_bytes(pickle.dumps({"recipe": Hostile(tmp_path / "mark")}))
    entry.data = as_bytes(pickled_save(settings))
    directory = bare_save(state, tmp_path / "q")
    save_checkpoint(saved, tmp_path / "own", extra={})
    shutil.copytree(tmp_path / "own" / "modelopt_state", directory / "modelopt_state")
    model = tiny_model()
    load_checkpoint(model, directory)
    assert_same_weights(model, saved)
    assert not (tmp_path / "mark").exists()
