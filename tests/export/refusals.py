"""Bad input, and how the tests look at its refusal."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer

from quantplug.errors import QuantplugError
from tests.export.checkpoints import SCHEMES

NVFP4_16 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
FC1 = "decoder.layers.0.mlp.experts.linear_fc1"
FC2 = "decoder.layers.1.mlp.experts.linear_fc2"


@contextmanager
def refused(kind: type[QuantplugError], tmp_path: Path) -> Iterator[pytest.ExceptionInfo[QuantplugError]]:
    """The block raises exactly this kind, with offenders and a way out, and `tmp_path` is as it was."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(QuantplugError) as caught:
        yield caught
    assert type(caught.value) is kind, caught.value
    assert caught.value.offenders
    assert caught.value.remedy
    assert sorted(tmp_path.rglob("*")) == before


def offenders(caught: pytest.ExceptionInfo[QuantplugError]) -> set[tuple[str, int | None]]:
    return {(offender.parameter, offender.expert) for offender in caught.value.offenders}


def expert_quantizer(model: torch.nn.Module, linear: str, expert: int) -> TensorQuantizer:
    return model.get_submodule(f"{linear}.weight_quantizer.{expert}")


def rules(*more: dict[str, Any], base: str = "w4a16_nvfp4", algorithm: str | None = "max") -> dict[str, Any]:
    config = copy.deepcopy(SCHEMES[base])
    return {"quant_cfg": [*config["quant_cfg"], *more], "algorithm": algorithm}


def edited_source(source: Path, target: Path, **changes: Any) -> Path:
    target.mkdir()
    config = {**json.loads((source / "config.json").read_text()), **changes}
    (target / "config.json").write_text(json.dumps(config))
    return target
