"""What it brings to write while the next weights are packed: packing alone, writing alone, and both.

    OMP_NUM_THREADS=2 python benchmarks/overlap.py [--layers 4] [--format w4a16_nvfp4] [--repeats 7]

A checkpoint of layers of Qwen3-30B-A3B's shapes (`model_free.py`), 1.25 GB each, is quantized without a model. In every
round all of these take a turn, in one process:

    pack      every piece is read and packed, and dropped
    write     what was packed before and lies in memory is written, fsync included
    in turn   every piece is read, packed and written before the next one; the disk begins with the fsync at the end
    export    what the package does: a thread writes pieces while the next are packed; the disk begins at once
    call      all of `quantize_checkpoint`: the look at all weights, the export, index and configs

Wall time, and CPU time of all threads: where cores are taken, by these or by other processes, doing things at the same
time saves nothing but waiting. The ratio is to the slower of packing and writing in the same round. A round in which
other processes used more than `--others` cores in any turn (/proc/stat) is left out and another one tried, so often.
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self
from unittest import mock

import torch
import typer
from model_free import GB, random_checkpoint
from results import machine, write_section

from quantplug.checkpoint.reader import HFCheckpoint
from quantplug.export import quantize_checkpoint as model_free
from quantplug.export.files import write_rounds
from quantplug.export.files.sink import FileSink
from quantplug.export.files.staging import Staging
from quantplug.export.pipeline.assemble import assemble_piece
from quantplug.export.pipeline.gather import pack_pieces
from quantplug.export.plan.ownership import in_order
from quantplug.export.plan.pieces import PIECES_IN_A_BUCKET, Piece, cut
from quantplug.export.plan.types import ExportPlan
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.export.sources.checkpoint_rows import CheckpointSource
from quantplug.formats.names import QuantFormat
from quantplug.progress import silent

ALONE = ("pack", "write")


@dataclass(frozen=True)
class Times:
    """Seconds of one turn, and how many cores other processes used meanwhile."""

    wall: float
    cpu: float
    others: float


Round = dict[str, Times]
"""By the name of the turn."""


class InTurn:
    """Stands for `WriterThread`: does a step before the caller goes on."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def do(self, step: Callable[[], None]) -> None:
        step()

    def wait(self, undone: int = 0) -> None:
        pass


@dataclass(frozen=True)
class Work:
    """What an export is about to write, as `write_tensors` is called with it."""

    plan: ExportPlan
    source: HFCheckpoint
    directory: Path

    def packed(self) -> Iterator[tuple[Piece, Sequence[torch.Tensor]]]:
        rows = CheckpointSource(self.source, self.plan.dims)
        pieces = (piece for task in in_order(self.plan.tasks) for piece in cut(task, self.plan.dims, rows.bucket_bytes))
        return pack_pieces(pieces, rows.read, rows.bucket_bytes // PIECES_IN_A_BUCKET)

    def pack(self) -> None:
        for _ in self.packed():
            pass

    def write(self, packed: Sequence[tuple[Piece, Sequence[torch.Tensor]]]) -> None:
        self.directory.mkdir()
        sink = FileSink(self.directory, self.plan.files, self.plan, rank=0)
        for piece, tensors in packed:
            for rows in assemble_piece(piece, [tensors], self.plan.dims):
                sink.write(rows)
        sink.close()
        sink.check_complete()

    def export(self) -> None:
        staging = Staging(self.directory, self.plan.digest, "", rank=0, world_size=1)
        rows = CheckpointSource(self.source, self.plan.dims)
        reading = write_rounds.Reading(rows.read, rows.bucket_bytes)
        write_rounds.write_tensors(self.plan, reading, staging, 0, {}, silent, sizes={})
        staging.close()

    def in_turn(self) -> None:
        with mock.patch.object(write_rounds, "WriterThread", InTurn), mock.patch.object(os, "posix_fadvise"):
            self.export()


def main(
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 4,
    format: Annotated[QuantFormat, typer.Option(help="Format.")] = QuantFormat.W4A16_NVFP4,  # noqa: A002
    repeats: Annotated[int, typer.Option(help="Rounds; medians are shown.", min=1)] = 7,
    others: Annotated[float, typer.Option(help="Most cores that other processes may use in a turn.")] = 0.25,
    tries: Annotated[int, typer.Option(help="Rounds that are tried at most.", min=1)] = 40,
    record: Annotated[bool, typer.Option(help="Write the section of RESULTS.md.")] = False,
    scratch: Annotated[Path | None, typer.Option(help="Where the checkpoints are made.")] = None,
) -> None:
    """Measures packing and writing alone and together."""
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        source = random_checkpoint(Path(directory) / "source", layers)
        plan = plan_of(source, Path(directory) / "out", format)
        tried = measured(plan, source, Path(directory) / "out", format)
        rounds, left_out = quiet_ones(islice(tried, tries), others, repeats)
    read = sum(task.source.nbytes for task in plan.tasks)
    written = sum(spec.nbytes for spec in plan.expected().values())
    which = f"{len(rounds)} rounds; {left_out} in which other processes used more than {others:g} cores are left out"
    text = f"{heading(layers, format, read, written, which)}\n\n{table(rounds)}"
    typer.echo(text)
    if record:
        write_section("overlap", text)


def plan_of(source: Path, out: Path, name: str) -> ExportPlan:
    """The plan of an export that is stopped before it writes."""
    stopped = mock.patch.object(model_free, "write_tensors", side_effect=InterruptedError)
    with stopped as write_tensors, suppress(InterruptedError):
        quantize_checkpoint(source, out, name)
    plan = write_tensors.call_args.args[0]
    assert isinstance(plan, ExportPlan)
    return plan


def quiet_ones(tried: Iterable[Round], others: float, repeats: int) -> tuple[list[Round], int]:
    """Rounds that other processes left alone, and how many they did not."""
    rounds: list[Round] = []
    left_out = 0
    for each in tried:
        if max(times.others for times in each.values()) > others:
            left_out += 1
        else:
            rounds.append(each)
        if len(rounds) == repeats:
            break
    if not rounds:
        raise RuntimeError(f"Other processes used more than {others} cores in every round; try again, or allow more.")
    return rounds, left_out


def measured(plan: ExportPlan, source: Path, out: Path, name: str) -> Iterator[Round]:
    with HFCheckpoint(source) as checkpoint:
        work = Work(plan, checkpoint, out)
        packed = list(work.packed())  # Compiles the loops too.
        turns: dict[str, Callable[[], object]] = {
            "pack": work.pack,
            "write": partial(work.write, packed),
            "in turn": work.in_turn,
            "export": work.export,
            "call": partial(quantize_checkpoint, source, out, name),
        }
        while True:
            yield {turn: timed(run, out) for turn, run in turns.items()}


def timed(run: Callable[[], object], out: Path) -> Times:
    wall, cpu, busy = time.perf_counter(), time.process_time(), busy_seconds()
    run()
    wall, cpu, busy = time.perf_counter() - wall, time.process_time() - cpu, busy_seconds() - busy
    times = Times(wall, cpu, max(busy - cpu, 0) / wall)
    for left in (out, out.with_name(f".{out.name}.partial")):
        shutil.rmtree(left, ignore_errors=True)
    return times


def busy_seconds() -> float:
    """Seconds that the machine's cores have worked, all together, since it was started (proc(5), /proc/stat)."""
    user, nice, system, _, _, *interrupts_and_stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")


def table(rounds: list[Round]) -> str:
    rows = ["| turn | wall s | min to max | CPU s | others' cores | of the slower of pack and write |"]
    rows.append("|---|---:|---:|---:|---:|---:|")
    for name in rounds[0]:
        wall = [each[name].wall for each in rounds]
        cells = [name, f"{statistics.median(wall):.2f}", f"{min(wall):.2f} to {max(wall):.2f}"]
        cells.append(f"{statistics.median(each[name].cpu for each in rounds):.2f}")
        cells.append(f"{max(each[name].others for each in rounds):.2f}")
        ratios = [each[name].wall / max(each[alone].wall for alone in ALONE) for each in rounds]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def heading(layers: int, name: str, read: int, written: int, which: str) -> str:
    return (
        "## Packing and writing at the same time (`overlap.py`)\n\n"
        f"`python benchmarks/overlap.py --layers {layers} --format {name}`: {read / GB:.2f} GB of BF16 in the page "
        f"cache become\n{written / GB:.2f} GB on disk. All take a turn in each round; what each is, the script says. "
        f"Medians of {which}.\nCPU is of all threads; others' cores is the most.\n"
        f"{machine()}"
    )


if __name__ == "__main__":
    typer.run(main)
