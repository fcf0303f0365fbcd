"""Values that must not be written are all found before anything is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantplug import export_mcore_gpt_to_hf
from quantplug.errors import WeightError
from quantplug.export.pipeline.prescan import prescan
from quantplug.export.plan.types import WeightRef
from quantplug.export.sources.live_rows import LiveSource
from quantplug.mappings.layouts import ModelDimensions
from tests.export.checkpoints import load, quantize
from tests.export.live_bytes import LiveBytes
from tests.export.pipeline.test_slices import task_for
from tests.export.refusals import FC1, FC2, offenders, refused

pytestmark = pytest.mark.usefixtures("single_rank")

Sources = Callable[[str], Path]


@pytest.mark.parametrize("scheme", [None, "w4a16_nvfp4", "fp8"])
def test_nan_and_inf_are_all_named(scheme: str | None, sources: Sources, tmp_path: Path) -> None:
    model = load(sources("moe"))
    if scheme is not None:
        quantize(model, scheme)
    with torch.no_grad():
        model.get_submodule(FC1).weight2[5, 7] = torch.nan
        model.get_submodule(FC2).weight0[0, 0] = -torch.inf
        model.decoder.final_layernorm.weight[3] = torch.inf
    with refused(WeightError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    assert {expert for _, expert in offenders(caught)} == {None, 0, 2}
    text = str(caught.value)
    for words in ("decoder.layers.0.mlp.experts.linear_fc1.weight2 (expert 2)", "(expert 0)", "final_layernorm"):
        assert words in text


def test_values_that_overflow_the_dtype_on_disk(sources: Sources, tmp_path: Path) -> None:
    model = load(sources("dense"))
    with torch.no_grad():
        model.decoder.final_layernorm.weight[3] = 1e6
    with refused(WeightError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("dense"), export_dir=tmp_path / "out", dtype=torch.float16)
    assert offenders(caught) == {("decoder.final_layernorm.weight", None)}


@pytest.mark.parametrize("layout", ["column", "gated", "qkv", "row"])
def test_weights_are_looked_at_where_they_are(layout: str) -> None:
    dims = ModelDimensions(1, 2048, 64, 32, 64, 0)
    weight = torch.ones(128 * 64 if layout == "qkv" else 8192, 2048, dtype=torch.bfloat16)
    task = task_for(layout, "fp8", tuple(weight.shape), dims, 1, 1.0)
    held = {task.source.key: WeightRef(task.source.key, tuple(weight.shape), weight.dtype, None, weight.detach)}
    with LiveBytes([weight]) as live:
        prescan([task], LiveSource(held, dims))
    assert live.peak <= weight.nbytes / 4
