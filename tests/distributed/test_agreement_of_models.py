"""A model that is not its config's is refused on all ranks alike, also where some of them hold nothing that differs."""

import json
from functools import partial
from pathlib import Path

import pytest

from tests.families.cases import make
from tests.made_once import MadeOnce
from tests.ranks import run_ranks

SCRIPT = Path(__file__).with_name("agreement_of_models_ranks.py")

pytestmark = pytest.mark.distributed


def test_all_ranks_raise_the_same(made_once: MadeOnce, tmp_path: Path) -> None:
    ended = run_ranks(2, SCRIPT, made_once("family_llama2", partial(make, "llama2")), tmp_path)
    assert ended.ok, ended.output[-9000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    kind, text, offenders = found[0]["unit_norm"]
    assert kind == "MappingError"
    assert "is True in the model, False by the config in layer 1" in text
    assert offenders == [["qk_l2_norm", 1]]
    kind, text, offenders = found[0]["vocabulary"]
    assert kind == "ShapeError"
    assert "has 2048 rows, 1525 more than the 523 of the config" in text
    assert [name for name, _ in offenders] == ["embedding.word_embeddings.weight", "output_layer.weight"]
