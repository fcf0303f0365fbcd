"""What ModelOpt notes of a checkpoint, in `modelopt_state` below it: by which modes it changed the model.

Distillation, pruning and the like leave such notes too; a model without quantizers is loaded without them. It is plain
data, in common.pt, or with Megatron-Core 0.19 in an object of its own index. Its settings ModelOpt takes up by itself;
they choose among what is registered with it.
"""

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quantplug.checkpoint.torch_dist.files import damaged, open_regular, read_file
from quantplug.checkpoint.torch_dist.index import read_index
from quantplug.checkpoint.torch_dist.roots import BACKEND_FILE, COMMON_FILE, COMMON_OBJECT, INDEX_FILE
from quantplug.checkpoint.untrusted.pickles import only_one
from quantplug.errors import Offender
from quantplug.megatron.checkpoint.files import damage_named

MODELOPT_STATE = "modelopt_state"
_MODES = "modelopt_state_dict"
# Those that give a model quantizers (modelopt/torch/quantization/mode.py, 0.47); others calibrate what is there, or are
# of pruning, distillation and the like.
_QUANTIZES = frozenset({"quantize", "auto_quantize"})


def read_modelopt_state(checkpoint: Path) -> dict[str, Any] | None:
    """What ModelOpt notes of a checkpoint; None if it is not there. No collective.

    Raises:
        CheckpointError: It is damaged, or holds more than plain data, of which nothing is run.
    """
    part = checkpoint / MODELOPT_STATE
    if not os.path.lexists(part):
        return None
    # By its path below the checkpoint, so that it may not be a link that leads out of it.
    content = read_file(checkpoint, f"{MODELOPT_STATE}/{BACKEND_FILE}")
    with damage_named(part / BACKEND_FILE):
        stated = json.loads(content)
        if stated["sharded_backend"] != "torch_dist":
            raise ValueError(f"names the backend {stated['sharded_backend']!r}, and torch_dist alone is read")
    name, pickled = _pickled(part)
    # Megatron's reader of it, `load_common_state_dict`, would run a pickle where the environment tells torch to.
    with damage_named(part / name):
        state = torch.load(pickled, map_location="cpu", weights_only=True)
        state = only_one(state)
        if not isinstance(state, dict) or not isinstance(state.get(_MODES), list):
            raise ValueError("is no state of a model")
        return {**state, _MODES: [_readable(*mode) for mode in state[_MODES]]}


def _readable(mode: str, state: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A mode without what a later ModelOpt notes of calibration though nobody set it, and an earlier one refuses."""
    # A calibration that is over is not done again: its settings are checked by name, and no value of them is used.
    if mode in _QUANTIZES or not isinstance(state.get("config"), dict):
        return mode, state
    return mode, {**state, "config": _of_what_is_set(state["config"])}


def _of_what_is_set(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _of_what_is_set(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if value is not None
    }


def has_quantizers(state: dict[str, Any] | None) -> bool:
    """Whether a model that ModelOpt has changed so has quantizers."""
    modes = [] if state is None else state[_MODES]
    return any(mode[0] in _QUANTIZES for mode in modes if isinstance(mode, tuple | list) and _is_named(mode))


def _is_named(mode: Sequence[Any]) -> bool:
    """Whether the first word of a mode is its name: a note of ModelOpt's is anybody's, too."""
    return bool(mode) and isinstance(mode[0], str)


def _pickled(part: Path) -> tuple[str, io.BytesIO]:
    """The file that has the notes, and they themselves."""
    if os.path.lexists(part / INDEX_FILE):
        index = read_index(part)
        kept = [extent for key, extent in index.objects.items() if key.startswith(COMMON_OBJECT)]
        if kept and not os.path.lexists(part / COMMON_FILE):
            with open_regular(part, kept[0].file) as file:
                file.seek(kept[0].offset)
                return kept[0].file, io.BytesIO(file.read(kept[0].length))
    elif not os.path.lexists(part / COMMON_FILE):
        # One of the two is there in a checkpoint of any release.
        raise damaged([Offender(str(part / name), "is missing") for name in (INDEX_FILE, COMMON_FILE)])
    return COMMON_FILE, io.BytesIO(read_file(part, COMMON_FILE))
