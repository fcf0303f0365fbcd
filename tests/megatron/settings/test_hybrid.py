"""Settings of a HybridModel, whose lists say something of both halves of a layer, held against a config."""

from collections.abc import Callable
from pathlib import Path

import pytest

from quantplug.checkpoint.config.source import read_source_config
from quantplug.errors import MappingError
from quantplug.export.sources.live_settings import check_settings
from quantplug.megatron.models.build import build_model
from quantplug.megatron.parameters import LanguageModel
from quantplug.megatron.settings.trained import settings_of
from tests.megatron.hybrid import hybrid_config, needs_hybrid_model

pytestmark = [needs_hybrid_model, pytest.mark.usefixtures("single_rank")]


def other_window(model: LanguageModel) -> None:
    model.config.window_attn_skip_freq[2] ^= 1  # Attention of the second layer.


def other_rotation(model: LanguageModel) -> None:
    model.config.no_rope_freq[2] ^= 1


def as_megatron_makes_it(model: LanguageModel) -> None:
    """A HybridModel of 0.19 leaves its embedding at the default, whatever its config says."""
    model.rotary_pos_emb.rotary_interleaved = False


@pytest.mark.parametrize(
    ("fixture", "change", "setting", "reason"),
    [
        ("tiny_gpt_oss_dir", other_window, "window_size", "in layer 1"),
        ("tiny_llama4_dir", other_rotation, "no_rope_freq", "in layer 1"),
        ("tiny_llama4_dir", as_megatron_makes_it, "rotary_interleaved", "is False in the model, True by the config"),
    ],
)
def test_what_differs_is_named_by_the_layer_of_the_table(
    fixture: str,
    change: Callable[[LanguageModel], None],
    setting: str,
    reason: str,
    request: pytest.FixtureRequest,
) -> None:
    directory: Path = request.getfixturevalue(fixture)
    model, source = build_model(hybrid_config(directory)), read_source_config(directory)
    check_settings(model, source, ())
    change(model)

    with pytest.raises(MappingError) as caught:
        check_settings(model, source, ())

    (offender,) = caught.value.offenders
    assert offender.parameter == setting
    assert offender.reason.endswith(reason)


def test_its_rotary_embedding_says_what_it_was_made_with(tiny_qwen3_dir: Path) -> None:
    settings = settings_of(build_model(hybrid_config(tiny_qwen3_dir)))

    assert settings["position_embedding_type"] == "rope"
    assert settings["rotary_base"] == pytest.approx(10_000.0)
    assert settings["rotary_percent"] == 1.0
