"""Small real checkpoints, written by transformers and by plain ModelOpt, and Megatron's parallel state of one rank.

What takes seconds to import is imported where it is used: with pytest-xdist the process that shares out the tests reads
this file too, and runs none of them.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings

from tests.made_once import MadeOnce

# A test says whether something is right, not how long it took on a busy machine.
settings.register_profile("quantplug", deadline=None)
settings.load_profile("quantplug")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that the workers, which take file after file, end together with short ones."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """From here on the garbage collector leaves alone what importing the libraries and collecting the tests made."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    return MadeOnce.of_run(tmp_path_factory)


@pytest.fixture(scope="session", autouse=True)
def one_event_loop() -> None:
    from tests.one_event_loop import share_event_loop

    share_event_loop()


@pytest.fixture(scope="session")
def tiny(made_once: MadeOnce) -> Callable[[str], Path]:
    """Checkpoints of tests/tiny_models.py by name, made when first asked for. Nobody may change them."""

    def make(name: str) -> Path:
        from tests.tiny_models import make_tiny

        return made_once(name, partial(make_tiny, name))

    return make


@pytest.fixture(scope="session")
def tiny_qwen3_moe_dir(tiny: Callable[[str], Path]) -> Path:
    return tiny("qwen3_moe")


@pytest.fixture(scope="session")
def one_layer_dir(tiny: Callable[[str], Path]) -> Path:
    return tiny("one_layer")


@pytest.fixture(scope="session")
def tiny_qwen3_mixed_dir(tiny: Callable[[str], Path]) -> Path:
    return tiny("qwen3_mixed")


@pytest.fixture(scope="session")
def divisible_dir(tiny: Callable[[str], Path]) -> Path:
    return tiny("divisible")


@pytest.fixture(scope="session")
def tiny_qwen3_dir(tiny: Callable[[str], Path]) -> Path:
    return tiny("qwen3")


@pytest.fixture(scope="session")
def tiny_qwen3_tied_dir(tiny: Callable[[str], Path]) -> Path:
    return tiny("qwen3_tied")


@pytest.fixture(scope="session")
def tiny_gpt_oss_dir(tiny: Callable[[str], Path]) -> Path:
    """GPT-OSS in bf16: 3 layers, the 8 experts of each in one tensor."""
    return tiny("family_gpt_oss")


@pytest.fixture(scope="session")
def tiny_llama4_dir(tiny: Callable[[str], Path]) -> Path:
    """Llama 4's decoder in bf16: the experts of a layer in one tensor, quantized one by one."""
    return tiny("family_llama4_text")


@pytest.fixture(scope="session")
def tiny_llama4_with_vision_dir(tiny: Callable[[str], Path]) -> Path:
    """Llama 4 with vision in bf16: the experts of a layer in one tensor, which servers load quantized."""
    return tiny("family_llama4")


@pytest.fixture(scope="session")
def plain_checkpoints(made_once: MadeOnce) -> Path:
    """The Megatron checkpoints of plain_modelopt.py, written by a process that knows ModelOpt's own wrappers only."""

    def make_all(directory: Path) -> None:
        script = Path(__file__).with_name("plain_modelopt.py")
        directory.mkdir()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
        command = [sys.executable, str(script), str(directory)]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert run.returncode == 0, run.stderr

    return made_once("plain", make_all)


@pytest.fixture(scope="session")
def sources(made_once: MadeOnce, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Hugging Face checkpoints by name, made when first asked for. Nobody may change them."""
    from tests.export.made import make_source

    def source(name: str) -> Path:
        if name == "mixed":
            return request.getfixturevalue("tiny_qwen3_mixed_dir")
        return made_once(f"source_{name}", lambda directory: make_source(name, directory))

    return source


@pytest.fixture(scope="session")
def exports(made_once: MadeOnce, sources: Callable[[str], Path]) -> Callable[..., Path]:
    """Quantized exports by source and scheme, made when first asked for. Nobody may change them."""
    from quantplug.megatron.models.build import LayerSpec
    from tests.export.made import make_export

    def export(name: str, scheme: str, layer_spec: LayerSpec = LayerSpec.TRANSFORMER_ENGINE) -> Path:
        return made_once(
            f"export_{name}_{scheme}_{layer_spec.name}",
            lambda directory: make_export(sources(name), scheme, layer_spec, directory),
        )

    return export


@pytest.fixture
def single_rank() -> Iterator[None]:
    """Megatron's parallel state of one rank."""
    from tests.export.checkpoints import one_rank

    with one_rank():
        yield


@pytest.fixture
def no_ranks() -> None:
    """No process group, as a process begins: other tests leave theirs behind."""
    from quantplug.megatron.parallel import destroy_parallel

    destroy_parallel()
