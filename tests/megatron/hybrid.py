"""Models as Megatron-Core's HybridModel, and where there is one: the one place that tests of it ask."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from quantplug import import_mcore_gpt_from_hf
from quantplug.mappings.families import find_family
from quantplug.mappings.table import MegatronConfig, ModelKind
from quantplug.megatron.models.build import LayerSpec, build_model
from quantplug.megatron.parameters import LanguageModel
from quantplug.megatron.releases.hybrid import HAS_ALL_LAYERS

needs_hybrid_model = pytest.mark.skipif(not HAS_ALL_LAYERS, reason="Megatron-Core is older than 0.19.")


def hybrid_config(source: Path) -> MegatronConfig:
    values = AutoConfig.from_pretrained(source).to_dict()
    return replace(find_family(values["architectures"][0]).megatron_config(values), kind=ModelKind.HYBRID)


def load_hybrid(
    source: Path, layer_spec: LayerSpec = LayerSpec.TRANSFORMER_ENGINE, dtype: torch.dtype = torch.bfloat16
) -> LanguageModel:
    """A HybridModel of a checkpoint, NaN where the import has not written."""
    model = build_model(hybrid_config(source), layer_spec=layer_spec, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    import_mcore_gpt_from_hf(model, source)
    return model
