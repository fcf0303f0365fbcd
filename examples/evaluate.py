"""What quantized checkpoints lose against their source: bits a token, KL divergence, and errors of weights and layers.

    python examples/evaluate.py SRC EXPORT [EXPORT ...] --text heldout.txt

Runs on a CPU in FP32, by transformers; weights are decoded here, by the formulas of docs/formats.md and by none of
quantplug's code. Inputs stay in 16 bits or more, whatever the format says of them: this measures weights. A text is
cut into sequences of equal length, without overlap; a model without a tokenizer takes bytes for tokens.
"""

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quantplug.printable import printable

_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_BATCH = 32
Tensors = dict[str, torch.Tensor]
Around = Callable[[PreTrainedModel], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Measured:
    """Of one checkpoint.

    Attributes:
        weights: Norm of all quantized weights' errors over theirs; means nothing where channels have factors.
        bits: Cross entropy of the text, bits a token.
        divergence: KL of the source's predictions to its own, bits a token.
        layers: Norm of the error of each layer's output over the source's.
    """

    weights: float
    bits: float
    divergence: float
    layers: tuple[float, ...]


def main(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A checkpoint in 16 bits or more.")],
    exports: Annotated[list[Path], typer.Argument(metavar="EXPORT", help="Quantized checkpoints of it.")],
    text: Annotated[Path, typer.Option(help="Text that the model has not seen.")],
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 128,
    sequences: Annotated[int, typer.Option(min=1, help="So many of them at most, from the beginning.")] = 256,
) -> None:
    """Measures what quantized checkpoints lose."""
    tokens = tokenized(source, text)
    ids = tokens[: len(tokens) // length * length].view(-1, length)[:sequences]
    plain = tensors_of(source)
    reference = Predictions.of(source, plain, ids)
    table = Table("checkpoint", "weight error", "bits", "over source", "KL", "error of layers, first to last")
    table.add_row(printable(source.name), "", f"{reference.bits():.4f}", "", "", "")
    for export in exports:
        found = measured(export, plain, reference, source, ids)
        layers = " ".join(f"{error:.3f}" for error in found.layers)
        over = f"{found.bits - reference.bits():+.4f}"
        row = (f"{found.weights:.4f}", f"{found.bits:.4f}", over, f"{found.divergence:.5f}", layers)
        table.add_row(printable(export.name), *row)
    Console(soft_wrap=True).print(table)


def measured(
    export: Path,
    plain: Tensors,
    reference: "Predictions",
    source: Path,
    ids: torch.Tensor,
    around: Around = nullcontext,
) -> Measured:
    """An export, measured against the predictions of its source; its forward runs inside what `around` makes of it."""
    stored = tensors_of(export)
    # Under other names they would be taken for plain, and measured as if they were the source's.
    missing = [name for name in plain if name not in stored and f"{name}_packed" not in stored]
    if missing:
        raise typer.BadParameter(f"{export} has no {missing[0]}, nor that packed: its names are not read here")
    decoded = {name: weight for name in plain if (weight := decode(stored, name)) is not None}
    error = sum((weight - plain[name].float()).square().sum().item() for name, weight in decoded.items())
    norm = sum(plain[name].float().square().sum().item() for name in decoded)
    # Norms and routers are the export's too: what linears are multiplied by may be divided in the norm before them.
    kept = {name: stored[name] for name in plain if name not in decoded}
    found = Predictions.of(source, {**kept, **decoded}, ids, around)
    return Measured(
        math.sqrt(error / norm) if norm else 0.0, found.bits(), reference.divergence(found), reference.errors(found)
    )


@dataclass(frozen=True)
class Predictions:
    """What a model makes of sequences: log probabilities [sequences, length, vocabulary], and every layer's output."""

    ids: torch.Tensor
    log_probabilities: torch.Tensor
    layers: tuple[torch.Tensor, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, source: Path, tensors: Tensors, ids: torch.Tensor, around: Around = nullcontext) -> "Predictions":
        """Of the model of a config with these weights; its forward runs inside what `around` makes of it."""
        with tempfile.TemporaryDirectory() as directory:
            shutil.copy(source / "config.json", directory)
            values = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
            save_file(values, Path(directory) / "model.safetensors", metadata={"format": "pt"})
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        with around(model):
            outputs = [model(batch, output_hidden_states=True) for batch in ids.split(_BATCH)]
        logits = torch.cat([output.logits for output in outputs])
        # The first is the embedding, which is not quantized.
        layers = zip(*(output.hidden_states[1:] for output in outputs), strict=True)
        return cls(ids, logits.log_softmax(-1), tuple(torch.cat(states) for states in layers))

    def bits(self) -> float:
        """Cross entropy of each sequence's next tokens."""
        chosen = self.log_probabilities[:, :-1].gather(-1, self.ids[:, 1:, None])
        return float(-chosen.mean() / math.log(2))

    def divergence(self, other: "Predictions") -> float:
        """KL of these to others."""
        each = self.log_probabilities.exp() * (self.log_probabilities - other.log_probabilities)
        return float(each.sum(-1).mean() / math.log(2))

    def errors(self, other: "Predictions") -> tuple[float, ...]:
        """How far each layer's output is off, over its norm."""
        pairs = zip(self.layers, other.layers, strict=True)
        return tuple(float((theirs - mine).norm() / mine.norm()) for mine, theirs in pairs)


def tokenized(source: Path, text: Path) -> torch.Tensor:
    """The tokens of a text, int64."""
    if any(source.glob("tokenizer*")):
        tokenizer = AutoTokenizer.from_pretrained(source)
        return torch.tensor(tokenizer(text.read_text(), add_special_tokens=False)["input_ids"])
    return torch.tensor(list(text.read_bytes()))


def tensors_of(directory: Path) -> Tensors:
    """All tensors of a checkpoint."""
    files = (load_file(path) for path in sorted(directory.glob("*.safetensors")))
    return {name: tensor for file in files for name, tensor in file.items()}


def decode(stored: Mapping[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """FP32 values of a quantized weight [out, in], by what its scales are called and shaped; None of a plain one."""
    if f"{name}_packed" in stored:
        return _int4(stored, name)
    codes = stored[name]
    scale, scale_2 = stored.get(f"{name}_scale"), stored.get(f"{name}_scale_2")
    scale = stored.get(f"{name}_scale_inv") if scale is None else scale
    if scale is None or codes.dtype not in (torch.uint8, torch.float8_e4m3fn):
        return None
    if scale_2 is None and codes.dtype == torch.uint8:
        raise typer.BadParameter(f"{name} is of a format that is not decoded here: NVFP4, FP8, MXFP8 and INT4 are")
    if scale_2 is not None:
        pairs = torch.stack((codes & 15, codes >> 4), -1).flatten(1).int()
        values = _E2M1[pairs & 7] * torch.where(pairs > 7, -1.0, 1.0)
        return values * (scale.float() * scale_2).repeat_interleave(16, 1)
    values = codes.float()
    if scale.dtype == torch.uint8:  # MXFP8: exponents, of 32 columns each.
        return torch.ldexp(values, scale.int().repeat_interleave(32, 1) - 127)
    if scale.ndim == 2:  # Of blocks, the last of which may be partial, or of rows.
        high, wide = (128, 128) if scale.shape[1] > 1 or scale.shape[0] != codes.shape[0] else (1, codes.shape[1])
        scale = scale.repeat_interleave(high, 0)[: codes.shape[0]].repeat_interleave(wide, 1)[:, : codes.shape[1]]
    return values * scale.float()


def _int4(stored: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Of compressed-tensors' pack-quantized: eight codes an integer, the first in its lowest bits, plus 8."""
    packed, scale = stored[f"{name}_packed"], stored[f"{name}_scale"].float()
    if packed.dtype != torch.int32:
        raise typer.BadParameter(f"{name} is of a format that is not decoded here: INT4 is, in this spelling")
    codes = torch.stack([packed >> shift & 15 for shift in range(0, 32, 4)], -1).flatten(1) - 8
    return codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)


if __name__ == "__main__":
    typer.run(main)
