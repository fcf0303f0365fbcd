"""What a caller has chosen to be otherwise than config.json says, which the config that is written will then say."""

from dataclasses import dataclass

from quantplug.checkpoint.config.source import SourceConfig
from quantplug.mappings.families import find_family
from quantplug.mappings.table import Family


@dataclass(frozen=True)
class Choices:
    """What is chosen.

    Attributes:
        vocab_size: Number of tokens; None for the config's.
        drop_mtp: Whether layers of multi-token prediction are left out.
    """

    vocab_size: int | None = None
    drop_mtp: bool = False

    def family(self, source: SourceConfig) -> Family:
        """The table of a source; one that carries no layers of multi-token prediction over if these are dropped."""
        family = find_family(source.architecture)
        return family.without_mtp() if self.drop_mtp else family

    def of(self, source: SourceConfig) -> SourceConfig:
        """The source's config as it is by these choices.

        Raises:
            ArgumentError: A `vocab_size` that is no number of tokens.
        """
        if self.drop_mtp:
            source = source.counting_no_mtp()
        return source if self.vocab_size is None else source.with_tokens(self.vocab_size)
