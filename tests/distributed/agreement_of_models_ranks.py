"""Run as two ranks: models that are not their config's, of which not every rank can tell. Writes what each rank raises.

Usage: agreement_of_models_ranks.py SOURCE_DIR OUTPUT_DIR
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core import parallel_state

from quantplug import build_model
from quantplug.checkpoint.config.source import megatron_config, read_source_config
from quantplug.errors import QuantplugError
from quantplug.export.live_plan import plan_export
from quantplug.megatron.models import build
from quantplug.megatron.parallel import destroy_parallel, initialize_parallel
from quantplug.megatron.parameters import LanguageModel

source_dir, output_dir = Path(sys.argv[1]), Path(sys.argv[2])


def with_unit_norm_in_the_last_layer() -> LanguageModel:
    said = megatron_config(read_source_config(source_dir))
    return build.build_model(replace(said, unit_norm_layers=(1,)))


def with_a_grown_vocabulary() -> LanguageModel:
    """2000 tokens, whose last rows the second rank has alone."""
    model = build_model(source_dir, vocab_size=2000)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    return model


def refusal(make: Callable[[], LanguageModel]) -> list[object]:
    try:
        plan_export(make(), source_dir)
    except QuantplugError as error:
        return [type(error).__name__, str(error), [(it.parameter, it.rank) for it in error.offenders]]
    return []


found = {}
rank = initialize_parallel(pp=2).rank
found["unit_norm"] = refusal(with_unit_norm_in_the_last_layer)
parallel_state.destroy_model_parallel()
initialize_parallel(tp=2)
found["vocabulary"] = refusal(with_a_grown_vocabulary)
(output_dir / f"{rank}.json").write_text(json.dumps(found))
destroy_parallel()
