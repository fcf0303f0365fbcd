"""Hurt checkpoints of Megatron-Core: `quantplug export` and `load_checkpoint` as of Hugging Face directories.

Each input is loaded and exported. `QUANTPLUG_FAULTS=1000` runs a thousand of them.
"""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch

from quantplug import load_checkpoint, save_checkpoint
from quantplug.errors import QuantplugError
from quantplug.megatron.parameters import LanguageModel
from tests.export.checkpoints import build, load, one_rank
from tests.faults.harness import assert_printable, assert_written_alone, listing, run, sandbox, stumbles, watchdog
from tests.faults.mutations import CONFIG, MUTATIONS, good_checkpoint
from tests.faults.trained import RAN, TRAINED
from tests.megatron.checkpoint.trained import save_trained

INPUTS = int(os.environ.get("QUANTPLUG_FAULTS", "110"))
KINDS = ("trained", "saved")
CASES = [(kind, range(start, INPUTS, len(TRAINED))) for start, kind in enumerate(TRAINED)]


@pytest.fixture(scope="module", autouse=True)
def one_for_all() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_checkpoint(tmp_path_factory.mktemp("good") / "hf")


@pytest.fixture(scope="module")
def good(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a trainer left, and what we saved of a quantized model, with digests of its files."""
    directory, model = tmp_path_factory.mktemp("checkpoints"), load(hf)
    said = {"num_attention_heads": CONFIG["num_attention_heads"], "num_query_groups": CONFIG["num_key_value_heads"]}
    save_trained([model], directory / "trained", alike=False, group_query_attention=True, **said)
    save_checkpoint(mtq.quantize(model, mtq.W4A16_NVFP4_CFG), directory / "saved", extra={})
    return {kind: directory / kind for kind in KINDS}


@pytest.fixture(scope="module")
def plain_model(hf: Path) -> LanguageModel:
    """One for all loads of what a trainer left: a load that is refused changes no weight of it."""
    return empty_model(hf)


def empty_model(hf: Path) -> LanguageModel:
    """Of finite weights, which ModelOpt looks at as quantizers are inserted."""
    model = build(hf)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model


def check_load(checkpoint: Path, model: LanguageModel) -> None:
    before = [parameter.clone() for parameter in model.parameters()]
    with watchdog():
        try:
            load_checkpoint(model, checkpoint)
        except QuantplugError as error:
            assert_printable(str(error))
            # Damage of data that nobody took a digest of shows when weights have been read, and the error says so.
            if "built anew" in str(error) and not any(checkpoint.rglob("quantplug.json")):
                return
            pairs = zip(before, model.parameters(), strict=True)
            assert all(torch.equal(one.view(torch.int16), other.view(torch.int16)) for one, other in pairs), "changed"
        # Whatever else it raises is what this test is for.
        except Exception as error:
            raise AssertionError(repr(error)) from error


def check(good: Path, hf: Path, model: LanguageModel, directory: Path, kind: str, seed: int) -> None:
    sandbox(directory, checkpoint=good, hf=hf)
    checkpoint, out = directory / "checkpoint", directory / "out"
    TRAINED[kind](checkpoint, random.Random(f"{kind} {seed}"))
    before = listing(directory)
    if run({0, 2}, "export", checkpoint, out, "--hf", directory / "hf"):
        assert listing(directory) == before
    else:
        assert_written_alone(directory, "out", before)
        shutil.rmtree(out)
    check_load(checkpoint, model)
    assert listing(directory) == before
    assert not (directory / RAN).exists()


@pytest.mark.parametrize("base", KINDS)
def test_the_good_one_is_good(base: str, good: dict[str, Path], hf: Path, tmp_path: Path) -> None:
    assert run({0}, "export", good[base], tmp_path / "out", "--hf", hf) == 0
    load_checkpoint(empty_model(hf), good[base])


@pytest.mark.parametrize(("kind", "seeds"), CASES, ids=[kind for kind, _ in CASES])
def test_no_checkpoint_is_stumbled_over(
    kind: str, seeds: range, good: dict[str, Path], hf: Path, plain_model: LanguageModel, tmp_path: Path
) -> None:
    def checked(directory: Path, seed: int) -> None:
        base = KINDS[seed // len(TRAINED) % 2]
        # A load inserts quantizers into a model before it may find damage.
        model = plain_model if base == "trained" else empty_model(hf)
        check(good[base], hf, model, directory, kind, seed)

    stumbled = stumbles(kind, seeds, tmp_path, checked)
    assert not stumbled, "\n".join(stumbled)


@pytest.mark.parametrize("kind", MUTATIONS)
def test_no_config_beside_it_is_stumbled_over(kind: str, good: dict[str, Path], hf: Path, tmp_path: Path) -> None:
    """The Hugging Face directory of an export is anybody's too: it says names, sizes and settings."""

    def checked(directory: Path, seed: int) -> None:
        sandbox(directory, hf=hf)
        MUTATIONS[kind](directory / "hf", random.Random(f"{kind} {seed}"))
        before = listing(directory)
        if run({0, 2}, "export", good["trained"], directory / "out", "--hf", directory / "hf"):
            assert listing(directory) == before
        else:
            assert_written_alone(directory, "out", before)

    stumbled = stumbles(kind, range(INPUTS // len(MUTATIONS)), tmp_path, checked)
    assert not stumbled, "\n".join(stumbled)
