"""Compares two checkpoints tensor by tensor, byte by byte, whatever files the tensors are in.

    python examples/compare_exports.py A B

Exit status 0 if both hold the same tensors, 1 if not.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from safetensors import safe_open

from quantplug.printable import printable


def main(
    first: Annotated[Path, typer.Argument(help="A checkpoint directory.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Compares two checkpoints tensor by tensor."""
    out = Console(soft_wrap=True, highlight=False)
    files = [tensor_files(directory) for directory in (first, second)]
    differences = [
        *(f"{name}: only in {first}" for name in sorted(files[0].keys() - files[1].keys())),
        *(f"{name}: only in {second}" for name in sorted(files[1].keys() - files[0].keys())),
    ]
    for name in sorted(files[0].keys() & files[1].keys()):
        differences += difference(name, *(read(held[name], name) for held in files))
    for line in differences:
        out.print(printable(line), markup=False)
    if differences or not files[0]:
        out.print(f"{len(differences)} differences")
        raise typer.Exit(1)
    out.print(f"The same {len(files[0])} tensors, byte for byte.")


def tensor_files(directory: Path) -> dict[str, Path]:
    """Every tensor of a checkpoint with the file that holds it."""
    found: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def difference(name: str, first: torch.Tensor, second: torch.Tensor) -> list[str]:
    """One line that says how two tensors differ, or none."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        kinds = [f"{tensor.dtype} {list(tensor.shape)}" for tensor in (first, second)]
        return [f"{name}: {kinds[0]} and {kinds[1]}"]
    # As bytes: NaN equals itself, and -0 is not 0.
    unequal = int((first.reshape(-1).view(torch.uint8) != second.reshape(-1).view(torch.uint8)).sum())
    return [f"{name}: {unequal} of {first.nbytes} bytes differ"] if unequal else []


if __name__ == "__main__":
    typer.run(main)
