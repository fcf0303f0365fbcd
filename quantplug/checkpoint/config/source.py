"""The config.json of a Hugging Face checkpoint: all that an export reads of its source."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig

from quantplug.checkpoint.config.file import (
    UNUSABLE,
    architecture_of,
    config_error,
    counted_mtp,
    in_megatrons_words,
    read_config_file,
    refuse_own_code,
    saved_dtype,
    with_settings,
)
from quantplug.checkpoint.config.lost_mtp import LostMtp, lost_mtp
from quantplug.checkpoint.stored_tensors import stored_names
from quantplug.checkpoint.untrusted.json_reader import as_object
from quantplug.checkpoint.untrusted.model_sizes import read_dimensions
from quantplug.errors import ArgumentError, Offender, UnsupportedModelError
from quantplug.mappings.families import find_family
from quantplug.mappings.table import Family, MegatronConfig

# What transformers' classes raise of settings of a wrong type.
_REFUSALS = (*UNUSABLE, OSError, ImportError, StrictDataclassError)


@dataclass(frozen=True)
class SourceConfig:
    """The config of a checkpoint directory.

    Attributes:
        architecture: `architectures[0]`.
        raw: config.json as it stands in the file.
        values: All settings, with the defaults of the architecture filled in as transformers does.
        lost_mtp: That it counted layers which the checkpoint has not: `raw` and `values` count none any more.
    """

    directory: Path
    architecture: str
    raw: dict[str, Any]
    values: dict[str, Any]
    lost_mtp: LostMtp | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Type that the weights were saved in, by the config; BF16 if it says none that a model can be built in."""
        return saved_dtype(self.values)

    def with_tokens(self, vocab_size: int) -> "SourceConfig":
        """The config with so many tokens.

        Raises:
            ArgumentError: That is no number of tokens.
        """
        if vocab_size < 1:
            raise ArgumentError(
                "A vocabulary has at least a token.",
                [Offender("vocab_size", f"is {vocab_size}")],
                "Pass the number of tokens that the model was trained with; None for that of the config.",
            )
        return self.changed({"vocab_size": vocab_size})

    def counting_no_mtp(self) -> "SourceConfig":
        """The config without layers of multi-token prediction."""
        family = find_family(self.architecture)
        # Also where the file says nothing and the architecture's default counts some: readers fill that in too.
        return self.changed({family.mtp_setting: 0}) if counted_mtp(self.values, family) else self

    def changed(self, settings: Mapping[str, Any]) -> "SourceConfig":
        """The config with other settings of its (language) model, as it stands in the file too."""
        nested = find_family(self.architecture).nested
        raw, values = (with_settings(config, settings, nested) for config in (self.raw, self.values))
        return replace(self, raw=raw, values=values)


def read_source_config(
    directory: Path, trust_remote_code: bool = False, *, model_has_mtp: bool = False
) -> SourceConfig:
    """Reads config.json.

    Args:
        model_has_mtp: Whether layers of multi-token prediction come from elsewhere, so that it is no matter whether the
            checkpoint holds those that its config counts.

    Raises:
        SourceError: There is none, or it is damaged, names no architecture, or transformers cannot read it; or the
            checkpoint brings its own code, and it is not trusted.
        UnsupportedModelError: Its architecture is not one we convert.
    """
    raw = read_config_file(directory)
    architecture = architecture_of(raw, directory)
    # Before its code, since to trust that would not help, and before transformers, whose error would not list ours.
    family = find_family(architecture)
    refuse_own_code(directory, trusted=trust_remote_code)
    try:
        values = _all_settings(directory, raw, family, trust_remote_code)
        # What transformers takes for a config may still say no sizes of a model.
        dims = read_dimensions(values, family)
    except _REFUSALS as error:
        raise config_error(directory, str(error).strip()) from error
    found = SourceConfig(directory, architecture, raw, values)
    lost = None if model_has_mtp else lost_mtp(values, family, dims, stored_names(directory))
    return found if lost is None else replace(found.counting_no_mtp(), lost_mtp=lost)


def _all_settings(directory: Path, raw: Mapping[str, Any], family: Family, trust_remote_code: bool) -> dict[str, Any]:
    """The settings with the defaults that transformers fills in."""
    plain = _with_flags(raw, family)
    # transformers reads files alone, and refuses a number for a flag; what it makes of a file's settings is this.
    if plain != raw and raw.get("model_type") in CONFIG_MAPPING:
        return dict(CONFIG_MAPPING[raw["model_type"]].from_dict(plain).to_dict())
    return dict(AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code).to_dict())


def _with_flags(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The settings with true and false for what the family calls flags, and a publisher wrote as numbers."""
    settings = raw if family.nested is None else as_object(raw.get(family.nested))
    flags = {name: bool(settings[name]) for name in family.flags if type(settings.get(name)) is int}
    if not flags:
        return dict(raw)
    mended = {**settings, **flags}
    return mended if family.nested is None else {**raw, family.nested: mended}


def megatron_config(source: SourceConfig) -> MegatronConfig:
    """The config in Megatron's words.

    Raises:
        UnsupportedModelError: A setting is not one that we convert.
            Or the family's table is of norms of another kind than its config.
        SourceError: A setting is missing, or of a type that it cannot have.
    """
    family = find_family(source.architecture)
    converted = in_megatrons_words(source.values, family, source.directory)
    # Of a table from outside: its norms would come out one too large or too small.
    zero_centred = bool(converted.transformer.get("layernorm_zero_centered_gamma", False))
    if zero_centred is not family.zero_centred:
        raise UnsupportedModelError(
            "The table of an architecture and its config do not agree on whether norms are zero-centred.",
            [Offender(family.name, f"zero_centred is {family.zero_centred}, layernorm_zero_centered_gamma the other")],
            f"Register it with zero_centred={zero_centred}.",
        )
    return converted
