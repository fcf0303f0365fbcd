"""An output layer beside embeddings that the config ties: the same, it is left out; another, it is never dropped."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantplug import export_mcore_gpt_to_hf, import_mcore_gpt_from_hf
from quantplug.checkpoint.config.file import ties_embeddings
from quantplug.errors import MappingError, SourceError
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from tests.export.checkpoints import load, one_rank, read
from tests.export.refusals import refused

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Change = Callable[[torch.Tensor], torch.Tensor]


def one_element(weight: torch.Tensor) -> torch.Tensor:
    changed = weight.clone()
    changed[7, 3] += 1
    return changed


OTHER_HEADS: dict[str, tuple[Change, str]] = {
    "one element": (one_element, "row 7 is not that of"),
    "all": (torch.neg, "row 0 is not that of"),
    "dtype": (torch.Tensor.float, "float32"),
    "shape": (lambda weight: torch.cat([weight, weight[:1]]), "is torch.bfloat16 [524, 160]"),
}


def with_head(source: Path, target: Path, head: torch.Tensor | None, **config: Any) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | ({} if head is None else {HEAD: head}), target / "model.safetensors", {"format": "pt"})
    settings = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(settings | config))
    return target


@pytest.fixture(scope="module", autouse=True)
def one_for_all() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture
def tied(sources: Callable[[str], Path]) -> Path:
    return sources("tied")


@pytest.fixture
def embedding(tied: Path) -> torch.Tensor:
    return load_file(tied / "model.safetensors")[EMBEDDING]


@pytest.mark.parametrize(("change", "said"), OTHER_HEADS.values(), ids=OTHER_HEADS.keys())
def test_another_head_is_refused_by_every_way(
    change: Change, said: str, tied: Path, embedding: torch.Tensor, tmp_path: Path
) -> None:
    source = with_head(tied, tmp_path / "in", change(embedding).contiguous())
    model = load(tied)
    for way in (
        lambda: quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4"),
        lambda: import_mcore_gpt_from_hf(model, source),
        lambda: export_mcore_gpt_to_hf(model, source, tmp_path / "out"),
    ):
        with refused(SourceError, tmp_path) as caught:
            way()
        assert any(offender.parameter == HEAD for offender in caught.value.offenders)
        assert said in str(caught.value)


def test_both_remedies_work(tied: Path, embedding: torch.Tensor, tmp_path: Path) -> None:
    untied = with_head(tied, tmp_path / "untied", embedding.neg(), tie_word_embeddings=False)
    quantize_checkpoint(untied, tmp_path / "out", "w4a16_nvfp4")
    assert torch.equal(read(tmp_path / "out")[HEAD], embedding.neg())
    removed = with_head(tied, tmp_path / "removed", None)
    quantize_checkpoint(removed, tmp_path / "other", "w4a16_nvfp4")
    assert HEAD not in read(tmp_path / "other")


@pytest.mark.parametrize("said", [None, False])
def test_a_head_that_is_nowhere_may_be_the_embedding_and_the_remedy_works(
    said: bool | None, tied: Path, tmp_path: Path
) -> None:
    """A config that says nothing leaves it to a default, which differs from one architecture to another."""
    source = with_head(tied, tmp_path / "in", None, tie_word_embeddings=said)
    with refused(MappingError, tmp_path) as caught:
        quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    assert f"where it is {EMBEDDING}, config.json says so by tie_word_embeddings true" in str(caught.value)
    mended = with_head(source, tmp_path / "mended", None, tie_word_embeddings=True)
    quantize_checkpoint(mended, tmp_path / "out", "w4a16_nvfp4")
    assert EMBEDDING in read(tmp_path / "out")


def test_the_same_head_is_left_out(tied: Path, embedding: torch.Tensor, tmp_path: Path) -> None:
    source = with_head(tied, tmp_path / "in", embedding.clone())
    quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    export_mcore_gpt_to_hf(load(source), source, tmp_path / "plain")
    assert HEAD not in read(tmp_path / "out")
    assert read(tmp_path / "plain").keys() == read(tied).keys()


def test_a_head_alone_is_read_as_the_embedding(tied: Path, embedding: torch.Tensor, tmp_path: Path) -> None:
    source = with_head(tied, tmp_path / "in", None)
    tensors = load_file(source / "model.safetensors")
    save_file({HEAD if name == EMBEDDING else name: it for name, it in tensors.items()}, source / "model.safetensors")
    quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    assert torch.equal(read(tmp_path / "out")[EMBEDDING], embedding)
    export_mcore_gpt_to_hf(load(source), source, tmp_path / "plain")
    assert torch.equal(read(tmp_path / "plain")[EMBEDDING], embedding)


@pytest.mark.parametrize("junk", ["yes", 1, 0, [True], {}])
def test_whether_they_are_tied_is_true_or_false(junk: object, tied: Path, tmp_path: Path) -> None:
    source = with_head(tied, tmp_path / "in", None, tie_word_embeddings=junk)
    with refused(SourceError, tmp_path) as caught:
        quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    assert "neither true nor false" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, False),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": None}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, True),
    ],
)
def test_the_top_of_a_config_goes_before(config: dict[str, Any], expected: bool) -> None:
    assert ties_embeddings(config) is expected
