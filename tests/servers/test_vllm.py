"""docs/readers.md, cell by cell: what vLLM computes of our exports, beside transformers on what others decode of them.

Needs the environment that `make servers` makes (`QUANTPLUG_SERVERS` names another), and is skipped without.
"""

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantplug import QuantplugError, quantize_checkpoint
from tests.servers.cases import make_served
from tests.servers.reference import dequantized, logprobs

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("QUANTPLUG_SERVERS", ROOT / ".venv-servers")) / "bin" / "python"
PAGE = ROOT / "docs" / "readers.md"
PROMPTS = [[0, 7, 511, 31, 31, 400], [5, 4, 3, 2, 1, 0]]
CLOSE = 1e-3
WITH_MTP = " with MTP"
WITH_HEAD = " with lm_head"

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no environment of servers: make servers")


@dataclass(frozen=True)
class Cell:
    """One cell of the page.

    Attributes:
        case: Of tests/families/cases.py.
        column: The head of its column: a format, and a dialect behind it where it is not the format's own; `with MTP`,
            where the layers of multi-token prediction are loaded too, as the drafter of speculative decoding; `with
            lm_head`, where the output layer is quantized too.
        said: What the page says.
    """

    case: str
    column: str
    said: str

    @property
    def arguments(self) -> dict[str, Any]:
        name, _, dialect = self._export.removesuffix(WITH_HEAD).replace("`", "").partition(" as ")
        head = {"quantize_lm_head": True} if self._export.endswith(WITH_HEAD) else {}
        return {"format": name, **({"dialect": dialect} if dialect else {}), **head}

    @property
    def directory(self) -> str:
        return f"{self.case}-{re.sub(r'[^a-z0-9]+', '_', self._export)}"

    @property
    def with_mtp(self) -> bool:
        return self.column.endswith(WITH_MTP)

    @property
    def checkpoint(self) -> str:
        """What the reader is told, below the directory of all."""
        return self.asked(self.directory)

    def asked(self, directory: str) -> str:
        """The same of another directory."""
        return f"mtp={directory}" if self.with_mtp else directory

    @property
    def _export(self) -> str:
        return self.column.removesuffix(WITH_MTP)


def cells() -> Iterator[Cell]:
    for table in re.findall(r"^\| case .*\n(?:\|.*\n)+", PAGE.read_text(), flags=re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        for case, *said in rows:
            for column, word in zip(head[1:], said, strict=True):
                yield Cell(case.strip("`"), column, word)


CELLS = list(cells())
Answers = Mapping[str, dict[str, Any]]


def _scaled(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.experts.3.down_proj.weight_scale_2"] *= 1.5


def _dropped(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.mlp.experts.3.down_proj.weight_scale"]


def _dropped_of_drafter(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.3.mlp.experts.3.down_proj.weight"]


# A scale too large, and tensors that lack: a proof that cannot fail would be none.
SPOILED = {
    _scaled: Cell("qwen3_moe", "`w4a16_nvfp4`", ""),
    _dropped: Cell("qwen3_moe", "`w4a16_nvfp4`", ""),
    _dropped_of_drafter: Cell("glm4_moe", f"`w4a16_nvfp4`{WITH_MTP}", ""),
}


def spoiled(spoil: Callable[[dict[str, torch.Tensor]], None], good: Path) -> None:
    """The same checkpoint beside, with other tensors."""
    directory = good.with_name(spoil.__name__)
    directory.mkdir()
    for name in ("config.json", "hf_quant_config.json"):
        (directory / name).write_bytes((good / name).read_bytes())
    (file,) = good.glob("*.safetensors")
    tensors = load_file(file)
    spoil(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def read_by_vllm(checkpoints: list[str], scratch: Path) -> Answers:
    """What vLLM says of each, below `scratch`; one process for all, as vLLM takes long to import."""
    tokens = scratch / "prompts.json"
    tokens.write_text(json.dumps(PROMPTS))
    reader = Path(__file__).with_name("vllm_reader.py")
    command = [PYTHON, reader, tokens, *checkpoints]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch)
    answers = [json.loads(line[5:]) for line in ran.stdout.splitlines() if line.startswith("READ ")]
    assert len(answers) == len(checkpoints), ran.stderr[-4000:]
    return {answer["checkpoint"]: answer for answer in answers}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources, an export for each cell that is not refused, and what was spoiled."""
    directory = tmp_path_factory.mktemp("served")
    for case in dict.fromkeys(cell.case for cell in CELLS):
        make_served(case, directory / case)
    for cell in CELLS:
        if cell.said != "refused" and not (directory / cell.directory).exists():
            quantize_checkpoint(directory / cell.case, directory / cell.directory, **cell.arguments)
    for spoil, cell in SPOILED.items():
        spoiled(spoil, directory / cell.directory)
    return directory


@pytest.fixture(scope="module")
def answers(made: Path) -> Answers:
    good = [cell.checkpoint for cell in CELLS if cell.said != "refused"]
    return read_by_vllm([*good, *(cell.asked(spoil.__name__) for spoil, cell in SPOILED.items())], made)


def missing(answer: Mapping[str, Any], export: Path) -> list[str]:
    """Parameters that were not loaded, less those that vLLM makes for older files of such formats and does not use."""
    stored = {name for file in export.glob("*.safetensors") for name in load_file(file)}
    inputs = ("input_scale", "input_global_scale")
    unused = ("zero_point", *(() if any(name.endswith(inputs) for name in stored) else inputs))
    return [name for name in answer["unloaded"] if not name.endswith(unused)]


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.said == "equal"], ids=lambda cell: cell.checkpoint)
def test_vllm_computes_what_the_checkpoint_stands_for(cell: Cell, made: Path, answers: Answers, tmp_path: Path) -> None:
    answer = answers[cell.checkpoint]
    assert answer.get("error") is None
    assert missing(answer, made / cell.directory) == []
    oracle = logprobs(dequantized(made / cell.directory, made / cell.case, tmp_path / "plain"), PROMPTS)
    difference = (torch.tensor(answer["logprobs"]) - oracle).abs().max()
    assert difference < CLOSE


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.said == "loaded"], ids=lambda cell: cell.checkpoint)
def test_vllm_loads_every_parameter_of_a_drafter(cell: Cell, made: Path, answers: Answers) -> None:
    answer = answers[cell.checkpoint]
    assert answer.get("error") is None
    assert answer["drafter"].endswith("MTP")
    assert missing(answer, made / cell.directory) == []


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.said == "refused"], ids=lambda cell: cell.directory)
def test_what_no_server_reads_is_refused(cell: Cell, made: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantplugError):
        quantize_checkpoint(made / cell.case, tmp_path / "out", **cell.arguments)


def test_every_cell_says_what_is_tested() -> None:
    assert {(cell.said, cell.with_mtp) for cell in CELLS} == {("equal", False), ("refused", False), ("loaded", True)}


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_scaled, lambda answer, good: (torch.tensor(answer["logprobs"]) - good).abs().max() > CLOSE),
        (
            _dropped,
            lambda answer, good: "model.layers.0.mlp.experts.routed_experts.w2_weight_scale" in answer["unloaded"],
        ),
        (
            _dropped_of_drafter,
            lambda answer, good: any(name.startswith(answer["drafter"]) for name in answer["unloaded"]),
        ),
    ],
)
def test_a_spoiled_checkpoint_is_told(spoil: Callable[..., None], told: Callable[..., bool], answers: Answers) -> None:
    good = torch.tensor(answers[SPOILED[_scaled].checkpoint]["logprobs"])
    assert told(answers[SPOILED[spoil].asked(spoil.__name__)], good)
