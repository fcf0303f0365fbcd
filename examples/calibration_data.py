"""The texts that examples/quantize.py calibrates on, and the loop that runs a model over them."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from console import say
from evaluate import tokenized
from megatron.core import parallel_state
from modelopt.torch.utils.plugins.megatron_calibration import (
    get_megatron_calibration_dataloader,
    get_megatron_calibration_forward_loop,
)
from transformers import AutoTokenizer

from quantplug.errors import ArgumentError, Offender
from quantplug.megatron import cpu
from quantplug.progress import Progress

ForwardLoop = Callable[[torch.nn.Module], None]


@dataclass(frozen=True)
class CalibrationData:
    """What activations are calibrated on.

    Attributes:
        dataset: Name of a data set that ModelOpt knows, or the path of a .jsonl file, or of a text.
        samples: Number of samples.
        length: Tokens of each.
    """

    dataset: str
    samples: int
    length: int


def forward_loop(source: str, data: CalibrationData, trust_remote_code: bool, progress: Progress) -> ForwardLoop:
    """The loop for `quantplug.calibrate`: ModelOpt's on a GPU, and our own without, for Megatron's local layers.

    Raises:
        ArgumentError: A text has no whole sequence of that length.
    """
    path = Path(data.dataset)
    if path.is_file() and path.suffix != ".jsonl":
        return _loop_over(_sequences(Path(source), path, data), progress)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    settings = {"dataset_name": data.dataset, "num_samples": data.samples, "seq_length": data.length, "pack": True}
    if torch.cuda.is_available():
        return get_megatron_calibration_forward_loop(tokenizer, **settings)
    rows = get_megatron_calibration_dataloader(tokenizer, device="cpu", **settings)
    return _loop_over([row["input_ids"] for row in rows], progress)


def _sequences(source: Path, text: Path, data: CalibrationData) -> list[torch.Tensor]:
    """This rank's share of a text's first sequences, each [1, length]."""
    tokens = tokenized(source, text)
    whole = tokens[: len(tokens) // data.length * data.length].view(-1, 1, data.length)[: data.samples]
    if not len(whole):
        reason = f"has {len(tokens)} tokens, not the {data.length} of a sequence"
        raise ArgumentError(
            "The text is too short to calibrate on.", [Offender(data.dataset, reason)], "Lower --calib-seq-length."
        )
    # Ranks that have no sequence of their own left run one that another has: all must have seen data.
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    return list(whole[rank::ranks]) or [whole[0]]


def _loop_over(sequences: Iterable[torch.Tensor], progress: Progress) -> ForwardLoop:
    rows = list(sequences)

    def loop(model: torch.nn.Module) -> None:
        began = time.monotonic()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model.eval()
        for done, row in enumerate(rows, 1):
            ids = row.to(device)
            length = ids.shape[1]
            hidden_from_later = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu(1)
            with torch.no_grad(), cpu.local_forward():
                model(ids, torch.arange(length, device=device).expand_as(ids), hidden_from_later)
            progress("Running data", done, len(rows))
            if done == 1 and len(rows) > 1:
                minutes = (time.monotonic() - began) * len(rows) / 60
                say(f"{len(rows)} sequences of {length} tokens take about {minutes:.1f} minutes")

    return loop
