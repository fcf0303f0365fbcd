"""Calibrates with data on 2 ranks, through Megatron's local modules on CPU, for test_calibration_sync.py."""

import sys
from collections.abc import Callable
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

import quantplug.plugins  # noqa: F401
from quantplug import LayerSpec, build_model, import_mcore_gpt_from_hf
from quantplug.calibration.collect import gather_statistics
from quantplug.calibration.policy import CalibrationPolicy, ColdExperts
from quantplug.calibration.run import CalibrationRecord, calibrate
from quantplug.calibration.statistics import AmaxSource, CalibrationTable
from quantplug.errors import CalibrationError, Offender, WeightError
from quantplug.megatron import cpu
from quantplug.megatron.parallel import current_topology, initialize_parallel
from tests.calibration.local_model import build, send_everything_to

SEQUENCES = torch.arange(4 * 20).view(4, 20) * 7 % 500


def relayout(**layout: int) -> None:
    parallel_state.destroy_model_parallel()
    initialize_parallel(**layout)


def run(model: GPTModel) -> None:
    """Every data parallel rank runs its own sequences; together they run all, one forward each."""
    parts, part = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    length = SEQUENCES.shape[1]
    mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), diagonal=1)
    for sequence in SEQUENCES.chunk(parts)[part]:
        with torch.no_grad(), cpu.local_forward():
            model(sequence[None], torch.arange(length)[None], mask)


def placed(directory: Path, layer_spec: LayerSpec = LayerSpec.LOCAL) -> GPTModel:
    model = build(directory, layer_spec)
    import_mcore_gpt_from_hf(model, directory)
    mtq.quantize(model, {**mtq.FP8_DEFAULT_CFG, "algorithm": None})
    return model


def routed(model: GPTModel) -> dict[int, torch.Tensor]:
    """Global layer to the tokens that the router of this rank sent to each expert, counted as they run."""
    sent: dict[int, torch.Tensor] = {}

    def add_up(router: torch.nn.Module, _: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        sent[router.layer_number - 1] = sent.get(router.layer_number - 1, 0) + output[1].sum(0)

    for layer in model.decoder.layers:
        layer.mlp.router.register_forward_hook(add_up)
    return sent


def observed(model: GPTModel) -> dict[str, torch.Tensor]:
    """Name of a linear layer, `*` for any expert, to the largest input that this rank saw."""
    largest: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def note(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if inputs[0].numel():
                largest[name] = torch.maximum(largest[name], inputs[0].abs().max())

        return note

    for name, module in model.named_modules():
        if name.endswith(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")):
            head, _, tail = name.partition("local_experts.")
            common = f"{head}{tail.partition('.')[2]}"
            largest.setdefault(common, torch.tensor(0.0))
            module.register_forward_pre_hook(watch(common))
    return largest


def calibrated(directory: Path, **layout: int) -> tuple[CalibrationTable, CalibrationRecord]:
    relayout(**layout)
    model = placed(directory)
    largest, sent = observed(model), routed(model)

    record = calibrate(model, run)

    for value in largest.values():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    checked = 0
    for name, module in model.named_modules():
        if name.endswith(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")):
            head, _, tail = name.partition("local_experts.")
            assert torch.equal(module.input_quantizer.amax, largest[f"{head}{tail.partition('.')[2]}"]), (layout, name)
            checked += 1
    assert checked == 2 * (2 + 2 * 8 // current_topology().ep)
    for layer, total in sent.items():
        dist.all_reduce(total)
        total //= current_topology().tp  # Tensor parallel ranks route the same tokens.
        assert record.tokens[layer].by_expert == tuple(total.tolist()), (layout, layer)
        assert record.tokens[layer].routed == SEQUENCES.numel() * 2
    return gather_statistics(model, record), record


def layouts(directory: Path) -> None:
    reference, _ = calibrated(directory)
    for layout in ({"ep": 2}, {"tp": 2}, {"tp": 2, "etp": 2}):
        table, _ = calibrated(directory, **layout)
        assert [row.key for row in table.rows] == [row.key for row in reference.rows], layout
        for row, expected in zip(table.rows, reference.rows, strict=True):
            assert (row.tokens, row.coverage) == (expected.tokens, expected.coverage), (layout, row, expected)
            if "input_quantizer" in row.parameter:
                # A row parallel product is the sum of its shards' products, and a token's output that of its experts':
                # rounded otherwise than the whole's, or in another order.
                assert row.amax == pytest.approx(expected.amax, rel=1e-5), (layout, row)
            else:
                assert row.amax == expected.amax, (layout, row, expected)
        done(f"layout {layout}")


def by_stand_in(directory: Path) -> None:
    """Transformer Engine's modules, which have no forward here, with the inputs of Megatron's own: as on one rank."""

    def inputs(table: CalibrationTable) -> dict[str, float | None]:
        # Experts one by one have a row each, of the amax that all of a layer have.
        rows = (row for row in table.rows if row.parameter.endswith("input_quantizer"))
        return {f"{row.key.layer} {row.key.module.replace('.local_experts.*', '')}": row.amax for row in rows}

    reference, _ = calibrated(directory)
    for layout in ({"ep": 2}, {"tp": 2}):
        relayout(**layout)
        model, stand_in = placed(directory, LayerSpec.TRANSFORMER_ENGINE), placed(directory)
        record = calibrate(model, run, stand_in=stand_in)
        table = gather_statistics(model, record)
        assert inputs(table) == pytest.approx(inputs(reference), rel=1e-5), layout
        assert len(inputs(table)) == 2 * 4
        assert not [row for row in table.rows if row.source is AmaxSource.MISSING]
        done(f"stand-in {layout}")


def run_staged(model: GPTModel) -> None:
    """All sequences through a pipeline of two ranks, one after the other."""
    length, first = SEQUENCES.shape[1], parallel_state.is_pipeline_first_stage()
    mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), diagonal=1)
    for sequence in SEQUENCES:
        if not first:
            hidden = torch.empty(length, 1, model.config.hidden_size)
            dist.recv(hidden, 0)
            model.set_input_tensor(hidden)
        with torch.no_grad(), cpu.local_forward():
            output = model(sequence[None], torch.arange(length)[None], mask)
        if first:
            dist.send(output.contiguous(), 1)


def pipelines(directory: Path) -> None:
    """Stages with layers and without: the tokens and amaxes of the whole model."""
    reference, _ = calibrated(directory)
    for layout in ("Et|tL", "E|ttL", "Ett|L"):
        relayout(pp=2)
        model = build_model(directory, layer_spec=LayerSpec.LOCAL, dtype=torch.float32, pipeline_layout=layout)
        import_mcore_gpt_from_hf(model, directory)
        mtq.quantize(model, {**mtq.FP8_DEFAULT_CFG, "algorithm": None})
        record = calibrate(model, run_staged)
        table = gather_statistics(model, record)
        assert [row.key for row in table.rows] == [row.key for row in reference.rows], layout
        for row, expected in zip(table.rows, reference.rows, strict=True):
            assert (row.tokens, row.coverage) == (expected.tokens, expected.coverage), (layout, row, expected)
            # None of quantizers that are disabled.
            assert row.amax == (expected.amax and pytest.approx(expected.amax, rel=1e-5)), (layout, row)
        done(f"pipeline {layout}")


def cold(directory: Path) -> None:
    """Every token goes to experts 0 and 1 of rank 0: the error names experts of both ranks, on both ranks."""
    relayout(ep=2)
    model = placed(directory)
    send_everything_to(0, model)
    with pytest.raises(CalibrationError) as caught:
        calibrate(model, run)
    named = [offender.expert for offender in caught.value.offenders if "layers.1" in offender.parameter]
    assert named == [2, 3, 4, 5, 6, 7]
    done("cold error")

    model = placed(directory)
    send_everything_to(0, model)
    record = calibrate(model, run, CalibrationPolicy(cold_experts=ColdExperts.LAYER_MAX))
    table = gather_statistics(model, record)
    for linear in ("linear_fc1", "linear_fc2"):
        rows = [
            row
            for row in table.rows
            if row.key.layer == 0 and row.expert is not None and f"{linear}.input_quantizer" in row.parameter
        ]
        assert [row.source is AmaxSource.FALLBACK for row in rows] == [expert > 1 for expert in range(8)]
        assert len({row.amax for row in rows}) == 1
        assert [row.tokens for row in rows] == [80, 80, 0, 0, 0, 0, 0, 0]
        assert [row.coverage for row in rows] == [4.0, 4.0, 0, 0, 0, 0, 0, 0]
    done("cold layer_max")


def failing_rank(dense: Path) -> None:
    """What goes wrong on one rank ends both with the same error, and no quantizer has changed."""
    relayout()
    model = placed(dense)
    with pytest.raises(CalibrationError, match="saw no data on this rank, but on others") as caught:
        calibrate(model, run if dist.get_rank() == 0 else lambda _: None)
    assert {offender.rank for offender in caught.value.offenders} == {1}
    assert len(caught.value.offenders) == 2 * 4
    assert (model.decoder.layers[0].mlp.linear_fc1.input_quantizer.amax is None) == (dist.get_rank() == 1)
    done("no data on one rank")

    model = placed(dense)
    if dist.get_rank() == 1:
        model.decoder.layers[1].mlp.linear_fc2.weight_quantizer.disable()
    with pytest.raises(CalibrationError, match="hold different quantizers"):
        calibrate(model)
    done("another config on one rank")

    model = placed(dense)
    with torch.no_grad():
        if dist.get_rank() == 1:
            model.decoder.layers[0].mlp.linear_fc1.weight[3, 5] = torch.nan
    with pytest.raises(WeightError) as not_finite:
        calibrate(model)
    fc1 = "decoder.layers.0.mlp.linear_fc1.weight"
    assert not_finite.value.offenders == (Offender(fc1, "1 NaN; first at [3, 5]", rank=1),)
    done("NaN on one rank")


def done(what: str) -> None:
    if dist.get_rank() == 0:
        sys.stdout.write(f"{what} ok\n")


def main(moe: Path, dense: Path) -> None:
    initialize_parallel()
    layouts(moe)
    by_stand_in(moe)
    pipelines(moe)
    cold(moe)
    failing_rank(dense)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
