"""The sink of an export to disk: rows of tensors into safetensors files, each rank its own."""

from collections import defaultdict
from collections.abc import Container, Sequence
from pathlib import Path

from quantplug.checkpoint.safetensors.writer import SafetensorsFile, make_file, name_file
from quantplug.export.files.marks import leave_mark
from quantplug.export.plan.types import ExportPlan, ShardFile, TensorRows
from quantplug.formats import TensorSpec


class FileSink:
    """Writes what one rank writes of an export's files, rows by rows, each in their place.

    Files that it writes alone get their final names when they are full. Those of several ranks are made before any of
    them writes (`make_shared`), and get theirs when all of them have written (`name_shared`); both by their first rank.
    """

    def __init__(self, directory: Path, files: Sequence[ShardFile], plan: ExportPlan, rank: int) -> None:
        self._directory = directory
        self._expected = plan.expected()
        self._rank = rank
        self._files = [file for file in files if rank in file.owners]
        self._home = {name: file for file in self._files for name in file.tensors}
        # By bytes, not by calls: rows come in pieces, and several ranks may fill one tensor.
        self._shares = _bytes_written(plan, self._home, rank)
        self._open: dict[str, SafetensorsFile] = {}
        self._missing = sum(self._shares.values())

    def make_shared(self) -> None:
        """Makes the files of several ranks of which this is the first, at full size; before any rank writes."""
        for file in self._files:
            if len(file.owners) > 1 and file.owners[0] == self._rank:
                make_file(self._directory / file.name, self._specs(file))

    def name_shared(self, names: Container[str]) -> None:
        """Gives those of these files their final names; once every owner has written and synced its share."""
        for file in self._files:
            if file.name in names and file.owners[0] == self._rank:
                name_file(self._directory / file.name, leave_mark)

    def write(self, rows: TensorRows) -> None:
        """Puts rows where they belong in their file, which gets its name if they were its last and it is this rank's.

        Raises:
            OSError: The disk refused them.
        """
        file = self._home[rows.name]
        path = self._directory / file.name
        if file.name not in self._open:
            # Files are opened at their first rows: at any moment few of them are open, however many the checkpoint has.
            shares = {name: self._shares[name] for name in file.tensors} if len(file.owners) > 1 else None
            self._open[file.name] = SafetensorsFile(path, self._specs(file), shares, leave_mark)
        # To the CPU at the last moment: rows that were gathered with NCCL lie on the GPU until they are written.
        self._open[file.name].write(rows.name, rows.data.cpu(), rows.first)
        self._missing -= rows.data.nbytes

    def close(self) -> None:
        """Gives up files that are not full, which keep their temporary names."""
        for file in self._open.values():
            file.close()

    def check_complete(self) -> None:
        """Asserts that every byte that was planned for this rank has come."""
        assert self._missing == 0, f"{self._missing} planned bytes were not written"

    def _specs(self, file: ShardFile) -> list[TensorSpec]:
        return [self._expected[name] for name in file.tensors]


def _bytes_written(plan: ExportPlan, tensors: Container[str], rank: int) -> dict[str, int]:
    """Bytes that a rank writes of each of some tensors, by name."""
    nbytes: defaultdict[str, int] = defaultdict(int)
    # Over tasks: each expert of a tensor of all experts is one, and adds its own share.
    for task in plan.tasks:
        for part in task.all_outputs if task.owner == rank else ():
            for spec in part.tensors:
                if spec.name in tensors:
                    nbytes[spec.name] += part.nbytes(spec)
    return nbytes
