"""Megatron's load of a sharded state alone: what a trainer keeps beside it is no part of a model, and stays unread.

Megatron-Core would unpickle it. Releases differ in who reads it: in 0.16 a strategy that is handed in, in 0.17 and 0.18
a function that reads common.pt, in 0.19 one that reads an object of the index where there is no common.pt.
"""

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, StateDict

from quantplug.megatron.releases.installed import MEGATRON_CORE
from quantplug.megatron.releases.replaced import replaced

if MEGATRON_CORE < (0, 17):
    from megatron.core.dist_checkpointing.strategies.base import LoadCommonStrategy

    class _NoCommonState(LoadCommonStrategy):
        """Stands for the reader of common.pt."""

        def load_common(self, checkpoint_dir: str | Path) -> StateDict:
            return {}

        def load_sharded_objects(self, sharded_objects_state_dict: Any, checkpoint_dir: str | Path) -> StateDict:
            return {}

        def load_sharded_metadata(self, checkpoint_dir: str | Path) -> StateDict:
            return {}

        def check_backend_compatibility(self, loaded_version: int) -> None:
            pass

        def check_version_compatibility(self, loaded_version: int) -> None:
            pass

    def load_sharded(state: ShardedStateDict, directory: Path) -> StateDict:
        """Loads what a sharded state names. A collective."""
        return dist_checkpointing.load(state, str(directory), common_strategy=_NoCommonState())

else:
    _READER = "load_common" if MEGATRON_CORE < (0, 19) else "load_common_state_dict"

    def load_sharded(state: ShardedStateDict, directory: Path) -> StateDict:
        """Loads what a sharded state names. A collective."""
        with replaced(serialization, _READER, _nothing):
            return dist_checkpointing.load(state, str(directory))

    def _nothing(checkpoint_dir: str | Path) -> StateDict:
        """Stands for Megatron's own reader."""
        return {}
