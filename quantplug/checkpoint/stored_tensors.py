"""What lies beside a config, by headers alone: an export needs none of it, and holds against it what is there."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from quantplug.checkpoint.reader import TensorHeader, read_headers
from quantplug.errors import Offender, SourceError


def stored_tensors(directory: Path) -> dict[str, TensorHeader]:
    """The tensors of all safetensors files of a directory, by name; empty where there are none.

    Raises:
        SourceError: A file is damaged.
    """
    tensors: dict[str, TensorHeader] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= read_headers(file, path.name)
        except SafetensorError as error:
            raise SourceError(
                "A file of the source checkpoint is damaged.",
                [Offender(str(path), str(error))],
                "Fetch or save it again; an export needs only the config and the tokenizer, so it may also be removed.",
            ) from error
    return tensors
