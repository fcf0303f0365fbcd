"""Checkpoints of the Hugging Face hub, fetched into its cache."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from quantplug.errors import Offender, SourceError

# What is fetched of a hub model: configuration, tokenizer, modelling code for trust_remote_code, and the weights.
_SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")
_WEIGHT_FILES = ("*.safetensors",)


def fetch(name: str, cache_dir: str | Path | None, weights: bool) -> Path:
    """The local snapshot of a hub model.

    Args:
        name: Its id (`owner/name`).
        cache_dir: Where hub models are kept; None for Hugging Face's own cache.
        weights: Whether the weights are fetched, or only configuration and tokenizer.

    Raises:
        SourceError: The hub gives no such model.
    """
    files = [*_SIDE_FILES, *(_WEIGHT_FILES if weights else ())]
    try:
        return Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise SourceError(
            "The source checkpoint is neither a local directory nor a hub model that can be fetched.",
            [Offender(name, str(error).strip().splitlines()[0])],
            "Check the name, the network and your access, or download it and pass the directory.",
        ) from error
