"""Checkpoints of the Hugging Face hub, fetched into its cache."""

import glob
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from quantplug.checkpoint.reader import weight_files
from quantplug.errors import Offender, SourceError

# What is fetched beside the weights: configuration, tokenizer, and modelling code for trust_remote_code.
_SIDE_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.py"]
# Folders hold the same model in other forms (`original/`, `onnx/`): what is wanted of them is asked for by name.
_IN_FOLDERS = "*/*"
_TEMPLATES = "additional_chat_templates/*"


def fetch(name: str, cache_dir: str | Path | None, weights: bool, revision: str | None = None) -> Path:
    """The local snapshot of a hub model: of its weights, the files that its index names and no others.

    Many models lie on the hub two or three times over, as `consolidated*.safetensors` and below `original/` too.

    Args:
        name: Its id (`owner/name`).
        cache_dir: Where hub models are kept; None for Hugging Face's own cache.
        weights: Whether the weights are fetched, or only configuration and tokenizer.
        revision: Branch, tag or commit; None for the newest of the main branch.

    Raises:
        SourceError: The hub gives no such model, or its index cannot be read.
    """
    try:
        side = snapshot_download(
            name, cache_dir=cache_dir, revision=revision, allow_patterns=_SIDE_FILES, ignore_patterns=_IN_FOLDERS
        )
        listed = weight_files(Path(side)) if weights else ()
        # Of the same commit, after which a snapshot is called, though the model may have been updated meanwhile.
        more = [_TEMPLATES, *map(glob.escape, listed)]
        return Path(snapshot_download(name, cache_dir=cache_dir, revision=Path(side).name, allow_patterns=more))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise SourceError(
            "The source checkpoint is neither a local directory nor a hub model that can be fetched.",
            [Offender(name, str(error).strip().splitlines()[0])],
            "Check the name, the network and your access, or download it and pass the directory.",
        ) from error
