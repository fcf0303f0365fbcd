"""The checkpoints of all families and what was exported from them, each made once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from quantplug import export_mcore_gpt_to_hf
from tests.export.checkpoints import load, one_rank, quantize
from tests.families.cases import CASES, make


@pytest.fixture(params=CASES)
def family(request: pytest.FixtureRequest) -> str:
    """Every family in turn."""
    return request.param


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny checkpoint of a family. Nobody may change it."""
    made: dict[str, Path] = {}

    def checkpoint_of(name: str) -> Path:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return checkpoint_of


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Callable[..., Path]:
    """HF to Megatron's TE modules to HF, quantized by a scheme or not at all. Nobody may change it."""
    made: dict[tuple[str, str | None], Path] = {}

    def export_of(name: str, scheme: str | None = None) -> Path:
        if (name, scheme) not in made:
            directory = tmp_path_factory.mktemp(f"{name}-{scheme}") / "out"
            with one_rank():
                model = load(checkpoint(name))
                export_mcore_gpt_to_hf(quantize(model, scheme) if scheme else model, checkpoint(name), directory)
            made[name, scheme] = directory
        return made[name, scheme]

    return export_of
