"""docs/readers.md, cell by cell: what SGLang loads of our exports, into parameters that it does not find empty.

Needs the environment that `make servers` makes (`QUANTPLUG_SERVERS` names another), and is skipped without.
"""

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from quantplug import quantize_checkpoint
from quantplug.verify import Severity, verify_checkpoint
from quantplug.verify.checks import Check
from tests.servers.cases import make_published, make_served
from tests.servers.test_vllm import PAGE, PYTHON

HEAD = "SGLang 0.5.23"
# What SGLang makes itself of what it has loaded, or leaves at 1 where a checkpoint has none.
MADE = (".k_scale", ".v_scale", "_blockscale_swizzled", "_g_idx", "_g_idx_sort_indices")
# Parts of a vision model that a config of transformers has and the published ones have not.
BESIDE = ("visual.deepstack_merger_list.",)
INPUT_SCALES = ("input_scale", "input_global_scale")

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no environment of servers: make servers")


def cells() -> Iterator[tuple[str, str, str]]:
    """(case, format, what the page says)."""
    for table in re.findall(rf"^\| {re.escape(HEAD)} .*\n(?:\|.*\n)+", PAGE.read_text(), flags=re.MULTILINE):
        head, _, *rows = (
            [cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table.splitlines()
        )
        for case, *said in rows:
            yield from ((case, column, word) for column, word in zip(head[1:], said, strict=True))


CELLS = list(cells())
# What the page says in words: a directory, the case that it is of, and how that is quantized.
BESIDE_CELLS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "other-spelling": ("llama3", {"format": "fp8_blockwise", "dialect": "compressed-tensors"}),
    "head-nvfp4": ("llama3", {"format": "w4a16_nvfp4", "quantize_lm_head": True}),
    "head-int4": ("qwen3_moe", {"format": "int4", "quantize_lm_head": True}),
}
# Configs as transformers 5 writes them, and what SGLang says of them.
REWRITTEN = {
    "qwen3_next": "has no attribute 'full_attention_interval'",
    "deepseek_v2": "has no attribute 'moe_layer_freq'",
    "nemotron_h": "layers_block_type contains invalid types",
}
Answers = Mapping[str, dict[str, Any]]


def dropped(good: Path) -> Path:
    """The same checkpoint without one scale: a proof that cannot fail would be none."""
    directory = good.with_name(f"{good.name}-dropped")
    directory.mkdir()
    for file in good.glob("*.json"):
        (directory / file.name).write_bytes(file.read_bytes())
    (file,) = good.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.experts.3.down_proj.weight_scale"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sglang")
    for case in dict.fromkeys(case for case, _, _ in CELLS):
        make_published(case, directory / case)
    for case, name, _ in CELLS:
        quantize_checkpoint(directory / case, directory / f"{case}-{name}", name)
    for name, (case, arguments) in BESIDE_CELLS.items():
        quantize_checkpoint(directory / case, directory / name, **arguments)
    for case in REWRITTEN:
        make_served(case, directory / f"rewritten-{case}")
        quantize_checkpoint(directory / f"rewritten-{case}", directory / f"{case}-rewritten", "w4a16_nvfp4")
    # SGLang compares the last part of such a name alone, so that every layer becomes plain.
    exclude = ["model.layers.0.*"]
    quantize_checkpoint(directory / "deepseek_v3", directory / "excluded", "w4a16_nvfp4", exclude=exclude)
    dropped(directory / "qwen3_moe-w4a16_nvfp4")
    return directory


@pytest.fixture(scope="module")
def answers(made: Path) -> Answers:
    """What SGLang says of each, by name; one process for all, as SGLang takes long to import."""
    names = [*(f"{case}-{name}" for case, name, _ in CELLS), *BESIDE_CELLS]
    names += ["excluded", "qwen3_moe-w4a16_nvfp4-dropped", *(f"{case}-rewritten" for case in REWRITTEN)]
    reader = Path(__file__).with_name("sglang_reader.py")
    ran = subprocess.run([PYTHON, reader, "qwen3", *names], capture_output=True, text=True, check=False, cwd=made)
    found = [json.loads(line[5:]) for line in ran.stdout.splitlines() if line.startswith("READ ")]
    assert len(found) == len(names), ran.stderr[-4000:]
    return {answer["checkpoint"]: answer for answer in found}


def problems(answer: Mapping[str, Any], export: Path) -> list[str]:
    """Why a checkpoint is not loaded: the error, or the parameters that nothing has filled."""
    if "error" in answer:
        return [answer["error"]]
    stored = {name for file in export.glob("*.safetensors") for name in load_file(file)}
    made = (*MADE, *(() if any(name.endswith(INPUT_SCALES) for name in stored) else INPUT_SCALES))
    return [name for name in answer["unloaded"] if not name.endswith(made) and not name.startswith(BESIDE)]


@pytest.mark.parametrize(("case", "name", "said"), CELLS)
def test_sglang_loads_what_the_page_says(case: str, name: str, said: str, made: Path, answers: Answers) -> None:
    export = made / f"{case}-{name}"
    found = problems(answers[export.name], export)
    assert said in ("loaded", "not loaded")
    assert (found == []) is (said == "loaded"), found
    # Which is said of the files alone, too.
    assert (Check.SGLANG in verify_checkpoint(export).checks(Severity.WARNING)) is (said == "not loaded")


@pytest.mark.parametrize("name", BESIDE_CELLS)
def test_what_the_page_says_beside_its_table_is_loaded(name: str, made: Path, answers: Answers) -> None:
    assert problems(answers[name], made / name) == []
    is_plain = answers[name]["methods"]["lm_head"].startswith("Unquantized")
    assert is_plain is not name.startswith("head")


@pytest.mark.parametrize("case", REWRITTEN)
def test_a_config_that_transformers_has_written_anew_stops_it(case: str, made: Path, answers: Answers) -> None:
    assert REWRITTEN[case] in answers[f"{case}-rewritten"]["error"]
    assert Check.SGLANG in verify_checkpoint(made / f"{case}-rewritten").checks(Severity.WARNING)


def test_quantized_is_what_the_checkpoint_has_scales_for(made: Path, answers: Answers) -> None:
    """By module: of a dense model each linear of SGLang's is one of the files, or q, k and v, or gate and up."""
    methods = answers["qwen3-w4a16_nvfp4"]["methods"]
    quantized = {
        name for name, method in methods.items() if not method.startswith("Unquantized") and ".attn" not in name
    }
    stored = {name for file in (made / "qwen3-w4a16_nvfp4").glob("*.safetensors") for name in load_file(file)}
    merged = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    merged |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    linears = (name.removesuffix(".weight_scale").rpartition(".") for name in stored if name.endswith(".weight_scale"))
    assert {f"{parent}.{merged.get(last, last)}" for parent, _, last in linears} == {
        name for name in quantized if name.endswith("_proj")
    }


def test_a_scale_that_lacks_is_told(made: Path, answers: Answers) -> None:
    name = "qwen3_moe-w4a16_nvfp4-dropped"
    assert problems(answers[name], made / name) == ["model.layers.0.mlp.experts.w2_weight_scale"]


def test_latent_attention_that_is_excluded_in_one_layer_is_told(made: Path, answers: Answers) -> None:
    assert problems(answers["excluded"], made / "excluded")
