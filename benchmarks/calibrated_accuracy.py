"""What algorithms with calibration data lose and cost on the trained model of tests/data, and what quantized inputs do.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/calibrated_accuracy.py [--sequences 128]

Through Megatron's local layers, on a CPU. Exports are decoded by `examples/evaluate.py`, by none of the package's code,
and run by transformers in FP32. It writes its tables of docs/accuracy.md, and its section of RESULTS.md.
"""

import ctypes
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import modelopt.torch.quantization as mtq
import torch
import typer
from accuracy import LENGTH, MODEL, PAGE
from quantized_inputs import InputFormat, LargestInputs, Quantize, QuantizedInputs, linears_of
from results import machine, write_section
from transformers import PreTrainedModel

from examples.evaluate import Measured, Predictions, Tensors, measured, tensors_of, tokenized
from quantplug import LayerSpec, build_model, export_mcore_gpt_to_hf, quant_cfg
from quantplug.calibration.policy import CalibrationPolicy, ColdExperts
from quantplug.calibration.run import calibrate
from quantplug.megatron import cpu
from quantplug.megatron.parallel import destroy_parallel, initialize_parallel
from quantplug.megatron.parameters import LanguageModel
from tests.examples.outliers import with_outliers, with_outliers_in_values

CALIBRATED, BATCH = 128, 16
SWEEP = mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG
STATIC = {**SWEEP, "quant_cfg": [*SWEEP["quant_cfg"], {"quantizer_name": "*input_quantizer", "enable": False}]}
MSE = {"method": "mse", "fp8_scale_sweep": True}
ALGORITHMS: Mapping[str, Mapping[str, Any]] = {
    "`max`": mtq.W4A16_NVFP4_CFG,
    "`mse`": {**STATIC, "algorithm": MSE},
    "`weighted_mse`": {**STATIC, "algorithm": "weighted_mse"},
    "`local_hessian`": {**STATIC, "algorithm": "local_hessian"},
    "`gptq`": {**STATIC, "algorithm": "gptq"},
    "`awq_lite`": {**mtq.W4A16_NVFP4_CFG, "algorithm": "awq_lite"},
    "`awq_lite`, `weighted_mse`": {**STATIC, "algorithm": [{"method": "awq_lite"}, {"method": "weighted_mse"}]},
    "`awq_lite`, `gptq`": {**STATIC, "algorithm": [{"method": "awq_lite"}, {"method": "gptq"}]},
}


@dataclass(frozen=True)
class Cost:
    """Of one call of `mtq.quantize`.

    Attributes:
        seconds: Of CPU.
        mebibytes: Most memory beyond what the process had before.
    """

    seconds: float
    mebibytes: float


def main(sequences: Annotated[int, typer.Option(help="Of 128 bytes each, that are measured on.")] = 128) -> None:
    """Quantizes, measures and writes the tables."""
    torch.set_num_threads(1)
    initialize_parallel()
    tokens = tokenized(MODEL, MODEL / "heldout.txt")
    ids = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)[:sequences]
    with tempfile.TemporaryDirectory() as scratch:
        sources = {
            "as it is": MODEL,
            "outliers in activations": with_outliers(Path(scratch) / "activations", 32.0),
            "outliers in weights": with_outliers(Path(scratch) / "weights", 1 / 32),
            "outliers in values": with_outliers_in_values(Path(scratch) / "values", 32.0),
        }
        for config in ALGORITHMS.values():  # Loops are compiled, and memory that stays is taken.
            quantized(MODEL, config, 1)
        costs: dict[str, Cost] = {}
        found: dict[str, dict[str, Measured]] = {}
        for place, source in sources.items():
            reference = Predictions.of(source, tensors_of(source), ids)
            of_source = found.setdefault(place, {})
            for number, (name, config) in enumerate(ALGORITHMS.items()):
                model, cost = quantized(source, config, CALIBRATED)
                costs.setdefault(name, cost)
                out = Path(scratch) / f"{place} {number}"
                export_mcore_gpt_to_hf(model, source, export_dir=out)
                of_source[name] = measured(out, tensors_of(source), reference, source, ids)
        plain = Predictions.of(MODEL, tensors_of(MODEL), ids)
        inputs = list(quantized_inputs(plain, Path(scratch), ids))
    write_section("algorithms", "\n".join(algorithms(found, plain.bits(), len(ids))), PAGE)
    write_section("inputs", "\n".join(inputs), PAGE)
    write_section("calibration_costs", cost_section(costs))
    destroy_parallel()


def run(count: int, model: LanguageModel) -> None:
    """A forward loop over so many sequences."""
    tokens = tokenized(MODEL, MODEL / "calibration.txt")[: count * LENGTH].view(-1, LENGTH)
    hidden_from_later = torch.triu(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), diagonal=1)
    for batch in tokens.split(BATCH):
        with torch.no_grad(), cpu.local_forward():
            model(batch, torch.arange(LENGTH).expand_as(batch), hidden_from_later)


def quantized(source: Path, config: Mapping[str, Any], count: int) -> tuple[LanguageModel, Cost]:
    """A model that `mtq.quantize` has calibrated, and what that took."""
    model = build_model(source, import_weights=True, layer_spec=LayerSpec.LOCAL, dtype=torch.float32).eval()
    before = _memory_from_here()
    start = time.process_time()
    mtq.quantize(model, dict(config), partial(run, count))
    return model, Cost(time.process_time() - start, _status("VmHWM") - before)


def quantized_inputs(plain: Predictions, scratch: Path, ids: torch.Tensor) -> Iterator[str]:
    """W4A4 and W8A8: by the static scales that calibration finds, and by the text's own."""
    yield "| format | inputs | bits over the source's | KL |"
    yield "|---|---|---|---|"
    for form in InputFormat:
        model = build_model(MODEL, import_weights=True, layer_spec=LayerSpec.LOCAL, dtype=torch.float32).eval()
        mtq.quantize(model, {**quant_cfg(form.value, MODEL), "algorithm": None})
        calibrate(model, partial(run, CALIBRATED), CalibrationPolicy(cold_experts=ColdExperts.LAYER_MAX))
        out = scratch / form
        export_mcore_gpt_to_hf(model, MODEL, export_dir=out)
        stored = tensors_of(out)
        seen = LargestInputs()
        unquantized = measured(out, tensors_of(MODEL), plain, MODEL, ids, seen.watching)
        scales = {name: float(value) for name, value in _input_scales(stored).items()}
        ideal = {name: value / form.largest for name, value in seen.found.items() if name in scales}
        ways: Sequence[tuple[str, Mapping[str, float]]] = (
            ("scales of 128 sequences of other text, as exported", scales),
            ("scales of the measured text itself, for each expert", ideal),
        )
        name = "NVFP4 (W4A4)" if form is InputFormat.NVFP4 else "FP8 by tensor (W8A8)"
        yield _row(name, "in 16 bits or more", unquantized, plain)
        for way, by in ways:
            quantizers = {linear: form.quantizer(scale) for linear, scale in by.items() if scale > 0}
            around = partial(_inside, quantizers)
            yield _row(name, way, measured(out, tensors_of(MODEL), plain, MODEL, ids, around), plain)


def _inside(quantizers: Mapping[str, Quantize], model: PreTrainedModel) -> AbstractContextManager[Any]:
    model.set_experts_implementation("eager")
    missing = (
        quantizers.keys()
        - {name for name, _ in linears_of(model)}
        - {name for name in quantizers if name.endswith("up_proj")}
    )
    assert not missing, missing
    return QuantizedInputs(model, quantizers)


def _input_scales(stored: Tensors) -> Tensors:
    return {name.removesuffix(".input_scale"): value for name, value in stored.items() if name.endswith(".input_scale")}


def _row(name: str, way: str, it: Measured, plain: Predictions) -> str:
    return f"| {name} | {way} | {it.bits - plain.bits():+.4f} | {it.divergence:.5f} |"


def algorithms(found: Mapping[str, Mapping[str, Measured]], bits: float, sequences: int) -> Iterator[str]:
    """Lines of markdown: of the model as it is, and the divergences of those with outliers."""
    yield f"{sequences} sequences of {LENGTH} bytes; calibrated by {CALIBRATED} of other text.\n"
    yield f"| NVFP4, weight-only | bits over the source's {bits:.4f} | KL | to `max` | error of the layers' outputs |"
    yield "|---|---|---|---|---|"
    plain = found["as it is"]
    for name, it in plain.items():
        layers = " ".join(f"{error:.3f}" for error in it.layers)
        ratio = it.divergence / plain["`max`"].divergence
        yield f"| {name} | {it.bits - bits:+.4f} | {it.divergence:.5f} | {ratio:.2f} | {layers} |"
    yield ""
    rest = [place for place in found if place != "as it is"]
    yield f"| KL | {' | to `max` | '.join(rest)} | to `max` |"
    yield f"|{'---|' * (1 + 2 * len(rest))}"
    for name in plain:
        pairs = [(found[place][name].divergence, found[place]["`max`"].divergence) for place in rest]
        cells = [f"{mine:.5f} | {mine / of_max:.2f}" for mine, of_max in pairs]
        yield f"| {name} | {' | '.join(cells)} |"


def cost_section(costs: Mapping[str, Cost]) -> str:
    """A section of RESULTS.md."""
    lines = [
        f"| {name} | {it.seconds:.1f} | {it.seconds / costs['`max`'].seconds:.1f} | {it.mebibytes:.0f} |"
        for name, it in costs.items()
    ]
    table = "\n".join(lines)
    return f"""## Calibration: what algorithms cost

`PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/calibrated_accuracy.py`: `mtq.quantize` of the trained model of
tests/data (3.6 M parameters in FP32, 14 MiB; 4 layers of 16 experts), with {CALIBRATED * LENGTH} tokens through
Megatron's local layers, once also by `max`, whose weights need none. One run, after one with little data. Memory is the
most beyond what the process had before, the forward's own with it.
{machine()}

| algorithm | CPU seconds | to `max` | MiB |
|---|---:|---:|---:|
{table}"""


def _memory_from_here() -> float:
    """MiB that the process has, with its high-water mark brought down to that (proc(5), clear_refs)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> float:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


if __name__ == "__main__":
    typer.run(main)
