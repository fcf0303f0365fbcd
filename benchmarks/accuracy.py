"""What each format, and each search for scales, loses on the trained model of tests/data: docs/accuracy.md.

    PYTHONPATH=. python benchmarks/accuracy.py [--sequences 256]

Exports are decoded by `examples/evaluate.py`, by none of the package's code, and run by transformers in FP32. Inputs of
linears stay in 16 bits, whatever a format says of them.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from results import write_section

from examples.evaluate import Measured, Predictions, measured, tensors_of, tokenized
from quantplug import quantize_checkpoint

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests" / "data" / "kjv_moe"
PAGE = ROOT / "docs" / "accuracy.md"
LENGTH = 128

# What `quantize_checkpoint` is asked for, by what the table calls it. Static scales of inputs make no difference here.
EXPORTS: Mapping[str, Mapping[str, Any]] = {
    "NVFP4, `max`": {"format": "w4a16_nvfp4"},
    "NVFP4, `four_over_six`": {"format": "w4a16_nvfp4", "scales": "four_over_six"},
    "NVFP4, `mse`": {"format": "w4a16_nvfp4", "scales": "mse"},
    "INT4 in groups of 128": {"format": "int4"},
    "INT4 in groups of 32": {"format": "int4", "group_size": 32},
    "MXFP8": {"format": "mxfp8"},
    "FP8 by tensor": {"format": "fp8", "input_scale": 1.0},
    "FP8 by row": {"format": "fp8_dynamic"},
    "FP8 in 128x128 blocks": {"format": "fp8_blockwise"},
}


def main(sequences: Annotated[int, typer.Option(help="Of 128 tokens, at most.")] = 256) -> None:
    """Quantizes, measures and writes the table."""
    tokens = tokenized(MODEL, MODEL / "heldout.txt")
    ids = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)[:sequences]
    plain = tensors_of(MODEL)
    reference = Predictions.of(MODEL, plain, ids)
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for number, (name, asked) in enumerate(EXPORTS.items()):
            out = Path(directory) / str(number)
            quantize_checkpoint(MODEL, out, **asked)
            found[name] = measured(out, plain, reference, MODEL, ids)
    write_section("formats", "\n".join(table(found, reference.bits(), len(ids))), PAGE)


def table(found: Mapping[str, Measured], bits: float, sequences: int) -> Iterator[str]:
    """Lines of markdown; the first row is what others are compared with."""
    yield f"{sequences} sequences of {LENGTH} bytes; the source has {bits:.4f} bits a byte.\n"
    said = (
        "weights",
        "relative error",
        "squared, to `max`",
        "bits over the source's",
        "KL",
        "to `max`",
        "error of layers",
    )
    yield f"| {' | '.join(said)} |"
    yield f"|{'---|' * len(said)}"
    first = next(iter(found.values()))
    for name, it in found.items():
        squared, divergence = (it.weights / first.weights) ** 2, it.divergence / first.divergence
        layers = " ".join(f"{error:.3f}" for error in it.layers)
        yield (
            f"| {name} | {it.weights:.4f} | {squared:.2f} | {it.bits - bits:+.4f} | {it.divergence:.5f} | "
            f"{divergence:.2f} | {layers} |"
        )


if __name__ == "__main__":
    typer.run(main)
