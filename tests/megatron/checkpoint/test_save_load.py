import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from modelopt.torch.opt.plugins import restore_sharded_modelopt_state, save_sharded_modelopt_state
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

import quantplug.plugins  # noqa: F401
from quantplug.errors import CheckpointError, DestinationError
from quantplug.megatron import cpu
from quantplug.megatron.checkpoint.files import results_within_process
from quantplug.megatron.checkpoint.save_load import LoadReport, load_checkpoint, read_extra, save_checkpoint
from tests.plugins.configs import BLOCKWISE, PER_ROW, PER_TENSOR
from tests.plugins.tiny_model import DENSE, tiny_model

pytestmark = pytest.mark.usefixtures("single_rank")
EXTRA = {"hf_model_id": "some/model", "quant_cfg": "w4a16_nvfp4"}


def quantized(config: dict[str, Any] = mtq.W4A16_NVFP4_CFG, **settings: Any) -> nn.Module:
    return mtq.quantize(tiny_model(**settings), config)


def with_values_that_no_calibration_gives(model: nn.Module) -> nn.Module:
    for number, (name, amax) in enumerate(model.named_buffers()):
        if name.endswith("_amax"):
            amax.add_(number / 64)
    return model


def settings(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    return {
        name: (q.is_enabled, q.num_bits, q.block_sizes, q.axis, q.fake_quant)
        for name, q in model.named_modules()
        if isinstance(q, TensorQuantizer)
    }


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    tensors, others = dict(one.named_buffers()), dict(other.named_buffers())
    assert list(tensors) == list(others)
    for name, tensor in [*tensors.items(), *one.named_parameters()]:
        assert torch.equal(tensor, others[name] if name in others else other.get_parameter(name)), name
        assert tensor.dtype == (others[name] if name in others else other.get_parameter(name)).dtype


@pytest.mark.parametrize(
    "config", [*PER_TENSOR.values(), BLOCKWISE, PER_ROW], ids=[*PER_TENSOR, "fp8_blockwise", "fp8_dynamic"]
)
def test_a_fresh_model_gets_weights_quantizers_and_amaxes(config: dict[str, Any], tmp_path: Path) -> None:
    saved = with_values_that_no_calibration_gives(quantized(config))
    save_checkpoint(saved, tmp_path / "q", extra=EXTRA)
    loaded = tiny_model()
    assert load_checkpoint(loaded, tmp_path / "q") == LoadReport(EXTRA)
    assert_equal(saved, loaded)
    assert settings(loaded) == settings(saved)


def test_settings_are_kept_expert_by_expert(tmp_path: Path) -> None:
    saved = quantized()
    saved.decoder.layers[1].mlp.experts.linear_fc2.weight_quantizer[3].disable()
    save_checkpoint(saved, tmp_path / "q", extra={})
    loaded = tiny_model()
    load_checkpoint(loaded, tmp_path / "q")
    quantizers = loaded.decoder.layers[1].mlp.experts.linear_fc2.weight_quantizer
    assert [quantizer.is_enabled for quantizer in quantizers] == [expert != 3 for expert in range(8)]


def test_loading_twice_changes_nothing(tmp_path: Path) -> None:
    saved = with_values_that_no_calibration_gives(quantized())
    save_checkpoint(saved, tmp_path / "q", extra={})
    loaded = tiny_model()
    load_checkpoint(loaded, tmp_path / "q")
    load_checkpoint(loaded, tmp_path / "q")
    assert_equal(saved, loaded)


@pytest.mark.parametrize("kind", [{}, DENSE], ids=["moe", "dense"])
def test_a_model_that_is_not_quantized(kind: dict[str, Any], tmp_path: Path) -> None:
    saved = tiny_model(**kind)
    save_checkpoint(saved, tmp_path / "plain", extra=EXTRA)
    loaded = tiny_model(**kind)
    load_checkpoint(loaded, tmp_path / "plain")
    assert_equal(saved, loaded)
    assert not mto.ModeloptStateManager.is_converted(loaded)


def test_a_quantized_dense_model(tmp_path: Path) -> None:
    saved = with_values_that_no_calibration_gives(quantized(**DENSE))
    save_checkpoint(saved, tmp_path / "q", extra={})
    loaded = tiny_model(**DENSE)
    load_checkpoint(loaded, tmp_path / "q")
    assert_equal(saved, loaded)


def test_modelopts_own_restore_reads_it(tmp_path: Path) -> None:
    saved = with_values_that_no_calibration_gives(quantized())
    save_checkpoint(saved, tmp_path / "q", extra={})
    loaded = tiny_model()
    with cpu.checkpointing():
        restore_sharded_modelopt_state([loaded], str(tmp_path / "q"))
        loaded.load_state_dict(dist_checkpointing.load(loaded.sharded_state_dict(), str(tmp_path / "q")))
    assert_equal(saved, loaded)


def test_it_reads_what_modelopts_own_save_wrote(tmp_path: Path) -> None:
    saved = with_values_that_no_calibration_gives(quantized())
    with cpu.checkpointing(), results_within_process():
        (tmp_path / "q").mkdir()
        dist_checkpointing.save(saved.sharded_state_dict(), str(tmp_path / "q"))
        save_sharded_modelopt_state([saved], str(tmp_path / "q"))
    loaded = tiny_model()
    assert load_checkpoint(loaded, tmp_path / "q") == LoadReport({})
    assert_equal(saved, loaded)


def test_metadata_is_beside_the_tensors(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), tmp_path / "plain", extra=EXTRA)
    assert read_extra(tmp_path / "plain") == EXTRA
    versions = json.loads((tmp_path / "plain" / "quantplug.json").read_text())["versions"]
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_a_directory_that_is_not_empty_is_kept_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(DestinationError, match="is not empty"):
        save_checkpoint(tiny_model(), tmp_path, extra={})
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_empty_directory_and_missing_parents_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "empty", tmp_path / "new" / "q"):
        save_checkpoint(tiny_model(), directory, extra={})
        assert read_extra(directory) == {}


def test_a_save_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("quantplug.megatron.checkpoint.files.write_atomically", full)
    with pytest.raises(CheckpointError, match="no space"):
        save_checkpoint(tiny_model(), tmp_path / "q", extra={})
    assert list(tmp_path.iterdir()) == []


def test_a_save_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    running = multiprocessing.active_children()
    save_checkpoint(tiny_model(), tmp_path / "q", extra={})
    assert multiprocessing.active_children() == running
    assert filesystem_async._results_queue is None


def test_a_killed_save_is_not_a_checkpoint_and_does_not_hinder_the_next(tmp_path: Path) -> None:
    (tmp_path / ".q.partial").mkdir()
    (tmp_path / ".q.partial" / "junk.distcp").write_text("half")
    save_checkpoint(tiny_model(), tmp_path / "q", extra={})
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
    assert not (tmp_path / "q" / "junk.distcp").exists()


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_what_is_not_a_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    model = tiny_model()
    with pytest.raises(CheckpointError, match="There is no such checkpoint"):
        load_checkpoint(model, tmp_path / name)
    assert not mto.ModeloptStateManager.is_converted(model)


def test_another_model_is_refused_naming_every_key(tmp_path: Path) -> None:
    save_checkpoint(quantized(), tmp_path / "q", extra={})
    model = tiny_model(num_layers=3, moe_ffn_hidden_size=80)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(CheckpointError, match="not of this model") as refusal:
        load_checkpoint(model, tmp_path / "q")
    names = {offender.parameter for offender in refusal.value.offenders}
    fc1 = {f"decoder.layers.{i}.mlp.experts.experts.{e}.linear_fc1.weight_w" for i in range(3) for e in range(8)}
    assert fc1 <= names
    assert "decoder.layers.2.self_attention.linear_qkv.weight" in names
    assert "decoder.layers.1.self_attention.linear_qkv.weight" not in names
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_more_in_the_checkpoint_than_in_the_model_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(num_layers=3), tmp_path / "plain", extra={})
    with pytest.raises(CheckpointError, match=r"layers\.2.*is in the checkpoint and not in the model"):
        load_checkpoint(tiny_model(), tmp_path / "plain")


def test_missing_quantizer_state_is_refused_by_name(tmp_path: Path) -> None:
    """The weights of a plain model under the config of a quantized one."""
    save_checkpoint(quantized(), tmp_path / "q", extra={})
    save_checkpoint(tiny_model(), tmp_path / "plain", extra={})
    shutil.copytree(tmp_path / "q" / "modelopt_state", tmp_path / "plain" / "modelopt_state")
    with pytest.raises(CheckpointError, match="lacks the state of quantizers") as refusal:
        load_checkpoint(tiny_model(), tmp_path / "plain")
    names = {offender.parameter for offender in refusal.value.offenders}
    for layer in range(2):
        assert f"decoder.layers.{layer}.self_attention.linear_qkv" in names
        assert f"decoder.layers.{layer}.mlp.experts.linear_fc1" in names


def test_a_quantized_model_does_not_take_a_checkpoint_without_quantizers(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), tmp_path / "plain", extra={})
    with pytest.raises(CheckpointError, match=r"weight_quantizer\._amax.*lacks this quantizer state"):
        load_checkpoint(quantized(), tmp_path / "plain")
