"""The checkpoints of all families and what was exported from them, each made once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from quantplug import export_mcore_gpt_to_hf
from tests.export.checkpoints import load, one_rank, quantize
from tests.families.cases import CASES, make
from tests.families.served import serves_experts
from tests.made_once import MadeOnce


@pytest.fixture(params=CASES)
def family(request: pytest.FixtureRequest) -> str:
    """Every family in turn."""
    return request.param


@pytest.fixture(scope="session")
def checkpoint(made_once: MadeOnce) -> Callable[[str], Path]:
    """The tiny checkpoint of a family. Nobody may change it."""
    return lambda name: made_once(f"family_{name}", lambda directory: make(name, directory))


@pytest.fixture(scope="session")
def export(made_once: MadeOnce, checkpoint: Callable[[str], Path]) -> Callable[..., Path]:
    """HF to Megatron's TE modules to HF, quantized by a scheme or not at all. Nobody may change it."""

    def export_of(name: str, scheme: str | None = None) -> Path:
        def make_export(directory: Path) -> None:
            with one_rank():
                model = load(checkpoint(name))
                if scheme:
                    quantize(model, scheme, checkpoint(name), keep_experts=not serves_experts(name, scheme))
                export_mcore_gpt_to_hf(model, checkpoint(name), directory)

        return made_once(f"family_{name}_{scheme}", make_export)

    return export_of
