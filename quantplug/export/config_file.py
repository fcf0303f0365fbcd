"""config.json of a Hugging Face checkpoint as it stands in the file."""

import json
from pathlib import Path
from typing import Any

from quantplug.errors import Offender, SourceError

CONFIG_FILE = "config.json"


def read_config_file(directory: Path) -> dict[str, Any]:
    """Its settings, without the defaults that transformers would fill in.

    Raises:
        SourceError: There is none, or it is not a JSON object.
    """
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise config_error(directory, "does not exist") from error
    except ValueError as error:
        raise config_error(directory, f"is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise config_error(directory, "is not a JSON object")
    return config


def architecture_of(config: dict[str, Any], directory: Path) -> str:
    """`architectures[0]`.

    Raises:
        SourceError: It names none.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise config_error(directory, "names no architecture")
    return str(architectures[0])


def config_error(directory: Path, reason: str) -> SourceError:
    return SourceError(
        "The config of the source checkpoint cannot be used.",
        [Offender(str(directory / CONFIG_FILE), reason)],
        "Pass a directory that save_pretrained wrote.",
    )
