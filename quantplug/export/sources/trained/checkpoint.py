"""A training checkpoint as it is opened for an export: its index, and what its trainer noted of the model."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from quantplug.checkpoint.torch_dist.aside import is_mtp, unwrapped, without_mtp
from quantplug.checkpoint.torch_dist.files import read_own_file, require_as_saved
from quantplug.checkpoint.torch_dist.index import Index, read_index
from quantplug.checkpoint.torch_dist.noted.arguments import (
    Settings,
    is_zero_centred,
    read_arguments,
    require_as_trained,
)
from quantplug.checkpoint.torch_dist.noted.common import Plain
from quantplug.checkpoint.torch_dist.noted.vocabulary import padded_to
from quantplug.checkpoint.torch_dist.roots import find_iteration


@dataclass(frozen=True)
class TrainedCheckpoint:
    """One iteration of what a trainer saved, of which no tensor has been read yet.

    Attributes:
        directory: Of the iteration.
        index: Where its tensors are, by the names that the model itself gives them.
        arguments: What its trainer noted, by the names of Megatron-LM's arguments; empty where it noted nothing.
        has_mtp: Whether it was saved with layers of multi-token prediction, be they left out of `index` or not.
    """

    directory: Path
    index: Index
    arguments: Mapping[str, Plain]
    has_mtp: bool

    @classmethod
    def open(cls, checkpoint: str | Path, iteration: int | None, *, drop_mtp: bool) -> Self:
        """Finds the iteration, and reads what it says of itself.

        Args:
            checkpoint: What a trainer saved to, or one iteration in it.
            iteration: Which of those that were saved; None for the newest.
            drop_mtp: Whether layers of multi-token prediction are left out. Then there may have been some, whatever
                the index says.

        Raises:
            CheckpointError: There is no such checkpoint or iteration; or it is damaged, or of another format.
        """
        directory = find_iteration(checkpoint, iteration)
        require_as_saved(directory, read_own_file(directory).get("files", {}))
        index = unwrapped(read_index(directory))
        arguments = read_arguments(directory, index)
        if drop_mtp:
            return cls(directory, without_mtp(index), arguments, has_mtp=True)
        return cls(directory, index, arguments, any(map(is_mtp, index.tensors)))

    @property
    def padded_to(self) -> int | None:
        """The multiple to which its vocabulary is padded; None where its trainer did not say."""
        return padded_to(self.arguments)

    @property
    def is_zero_centred(self) -> bool | None:
        """Whether its norms multiply with 1 + weight; None where its trainer did not say."""
        return is_zero_centred(self.arguments)

    def require_settings(self, settings: Settings, unchecked: Collection[str]) -> None:
        """Refuses a config that describes another model than the one that was trained.

        Args:
            settings: What the config means, by the names of Megatron-Core.
            unchecked: Settings that may differ, by the names that errors give them.

        Raises:
            CheckpointError: The trainer noted other settings.
        """
        if self.arguments:
            require_as_trained(self.arguments, settings, "in config.json", unchecked)
