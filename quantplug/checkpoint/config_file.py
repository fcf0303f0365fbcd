"""config.json of a Hugging Face checkpoint as it stands in the file."""

import json
from pathlib import Path
from typing import Any

from quantplug.errors import Offender, SourceError

CONFIG_FILE = "config.json"
# Where transformers looks for `auto_map` (its *Auto* classes).
_FILES_THAT_NAME_CODE = (
    CONFIG_FILE,
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


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


def refuse_own_code(directory: Path, *, trusted: bool) -> None:
    """Refuses a checkpoint that names code of its own for readers to run, unless the caller has read and allowed it.

    Raises:
        SourceError: Names every file that does so, and what it names.
    """
    offenders = []
    for name in _FILES_THAT_NAME_CODE:
        named = _auto_map(directory / name)
        if named and not trusted:
            offenders.append(Offender(str(directory / name), f"auto_map names {', '.join(map(str, named))}"))
    if offenders:
        raise SourceError(
            "The source checkpoint brings its own code.",
            offenders,
            "Read that code, then allow it: trust_remote_code=True, or --trust-remote-code.",
        )


def _auto_map(path: Path) -> Any:
    """What a JSON file says of code; nothing where there is no such file, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("auto_map") if isinstance(content, dict) else None


def config_error(directory: Path, reason: str) -> SourceError:
    return SourceError(
        "The config of the source checkpoint cannot be used.",
        [Offender(str(directory / CONFIG_FILE), reason)],
        "Pass a directory that save_pretrained wrote.",
    )
