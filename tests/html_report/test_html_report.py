"""The page of a verdict: its numbers against the source and the bytes, and that hostile text stays text."""

import base64
import hashlib
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantplug import quantize_checkpoint
from quantplug.html_report import write_html
from quantplug.verify import judge, verify_checkpoint
from quantplug.verify.checks import Check
from quantplug.verify.report import error
from tests.cli.shell import run
from tests.families.cases import make
from tests.made_once import MadeOnce

HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>&amp;"
MODULE, KIND, LAYER, EXPERT, FORMAT, ROWS, COLUMNS, BYTES, AMAX, ERROR, BOUND, LARGEST, BY_INPUTS = range(13)


class Page(HTMLParser):
    """What a browser's parser makes of a page: the contents of its scripts by type, and its policy."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[str | None, str]] = []
        self.elements: Counter[str] = Counter()
        self.policy = ""
        self._open: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        named = dict(attrs)
        if tag == "script":
            assert "src" not in named
            self.scripts.append((named.get("type"), ""))
        if named.get("http-equiv") == "Content-Security-Policy":
            self.policy = named["content"] or ""
        self._open = tag

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            kind, so_far = self.scripts[-1]
            self.scripts[-1] = (kind, so_far + data)

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    @property
    def data(self) -> dict[str, Any]:
        (data,) = (json.loads(text) for kind, text in self.scripts if kind == "application/json")
        return data


@pytest.fixture(scope="module")
def nvfp4(made_once: MadeOnce, tiny_qwen3_moe_dir: Path) -> Path:
    make = partial(quantize_checkpoint, tiny_qwen3_moe_dir, format="w4a16_nvfp4")
    return made_once("html_report_nvfp4", make)


def stored(export: Path) -> dict[str, torch.Tensor]:
    (file,) = export.glob("*.safetensors")
    return load_file(file)


def page_of(export: Path, source: Path | None, directory: Path) -> Page:
    write_html(judge(export, source), directory / "page.html")
    return Page((directory / "page.html").read_text())


def test_rows_say_what_the_judge_measured_and_what_the_source_holds(
    nvfp4: Path, tiny_qwen3_moe_dir: Path, tmp_path: Path
) -> None:
    report = verify_checkpoint(nvfp4, tiny_qwen3_moe_dir)
    rows = {row[MODULE]: row for row in page_of(nvfp4, tiny_qwen3_moe_dir, tmp_path).data["weights"]}
    source = load_file(tiny_qwen3_moe_dir / "model.safetensors")

    assert len(rows) == len(report.errors_by_tensor) == sum("proj" in name for name in source)
    for measured in report.errors_by_tensor:
        row = rows[measured.name.removesuffix(".weight")]
        assert row[ERROR:] == [measured.relative_error, measured.bound, measured.max_error, None]
        # The largest block's scale is rounded to E4M3: by a sixteenth at the most. A scale is shared by gate and up.
        weight = source[f"{row[MODULE]}.weight"]
        assert row[AMAX] == pytest.approx(weight.abs().max().item(), rel=1 / 16)
        assert [row[ROWS], row[COLUMNS]] == list(weight.shape)
    expert = rows["model.layers.1.mlp.experts.5.down_proj"]
    assert [expert[KIND], expert[LAYER], expert[EXPERT]] == ["mlp.experts.down_proj", 1, 5]
    assert rows["model.layers.1.self_attn.q_proj"][EXPERT] is None


def test_histograms_count_codes_and_scales(nvfp4: Path, tmp_path: Path) -> None:
    data = page_of(nvfp4, None, tmp_path).data
    export = stored(nvfp4)

    (codes,) = (found for found in data["codes"] if found["kind"] == "mlp.experts.up_proj")
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # OCP Microscaling Formats v1.0, table 5.
    wanted: Counter[float] = Counter()
    for name, packed in export.items():
        if re.search(r"experts\.\d+\.up_proj\.weight$", name):
            nibbles = np.stack([packed.numpy() & 15, packed.numpy() >> 4])
            wanted.update((np.where(nibbles & 8, -1, 1) * magnitudes[nibbles & 7] + 0.0).flatten().tolist())
    assert {value: count for value, count in codes["bars"] if count} == wanted
    assert codes["counted"] == codes["of"] == sum(wanted.values())

    (scales,) = (found for found in data["scales"] if found["kind"] == "mlp.experts.up_proj")
    held = [scale for name, scale in export.items() if re.search(r"experts\.\d+\.up_proj\.weight_scale$", name)]
    assert dict(map(tuple, scales["bars"])) == Counter(torch.cat(held).float().flatten().tolist())


def test_scales_are_those_that_the_judge_has_read(nvfp4: Path, tmp_path: Path) -> None:
    """Not read again: the page and the verdict are of the same bytes, whatever becomes of the files meanwhile."""
    shutil.copytree(nvfp4, tmp_path / "export")
    judgement = judge(tmp_path / "export")
    (file,) = (tmp_path / "export").glob("*.safetensors")
    others = {
        name: tensor * 2 if name.endswith("weight_scale_2") else tensor for name, tensor in load_file(file).items()
    }
    for name, tensor in others.items():
        if name.endswith("weight_scale"):
            others[name] = torch.ones_like(tensor)
    save_file(others, file)

    write_html(judgement, tmp_path / "page.html")

    page, wanted = Page((tmp_path / "page.html").read_text()).data, page_of(nvfp4, None, tmp_path).data
    assert page["scales"] == wanted["scales"]
    assert [row[AMAX] for row in page["weights"]] == [row[AMAX] for row in wanted["weights"]]


def test_what_an_interrupted_judge_has_read_is_read_again(nvfp4: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(nvfp4, None, interrupt, resume=tmp_path / "journal")
    write_html(judge(nvfp4, None, resume=tmp_path / "journal"), tmp_path / "page.html")

    assert Page((tmp_path / "page.html").read_text()).data == page_of(nvfp4, None, tmp_path).data


@pytest.mark.parametrize("form", ["fp8_blockwise", "fp8_dynamic", "int4", "mxfp8", "w4a16_nvfp4"])
def test_the_range_is_that_of_the_source_in_every_format(form: str, divisible_dir: Path, tmp_path: Path) -> None:
    dialects = (None, "compressed-tensors") if form == "w4a16_nvfp4" else (None,)
    source = load_file(divisible_dir / "model.safetensors")
    for dialect in dialects:
        export = tmp_path / f"{form}-{dialect}"
        quantize_checkpoint(divisible_dir, export, form, dialect=dialect)

        data = page_of(export, divisible_dir, tmp_path).data

        assert data["ok"]
        assert {found["kind"] for found in data["codes"]} == {row[KIND] for row in data["weights"]}
        # A power of two may be twice what is needed; INT4 has a code more below zero than above.
        most = {"mxfp8": 2.0, "int4": 8 / 7}.get(form, 1) * (1 + 1 / 16)
        for row in data["weights"]:
            amax = source[f"{row[MODULE]}.weight"].abs().max().item()
            assert 15 / 16 * amax <= row[AMAX] <= most * amax, row


def test_experts_in_one_tensor_have_a_row_each(tiny_gpt_oss_dir: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny_gpt_oss_dir, tmp_path / "export", "mxfp4")

    data = page_of(tmp_path / "export", tiny_gpt_oss_dir, tmp_path).data

    experts = [row for row in data["weights"] if row[EXPERT] is not None]
    assert {(row[LAYER], row[EXPERT]) for row in experts} == {
        (layer, expert) for layer in range(3) for expert in range(8)
    }
    assert all(row[ERROR] for row in experts)
    assert len({row[MODULE] for row in data["weights"]}) == len(data["weights"])


def test_what_is_kept_has_a_reason(nvfp4: Path, tmp_path: Path) -> None:
    data = page_of(nvfp4, None, tmp_path).data
    why = {kind: reason for kind, reason, _, _ in data["kept"]}

    assert "router" in why["mlp.gate.weight"]
    assert "output layer" in why["lm_head.weight"]
    assert why["input_layernorm.weight"] == "no matrix product"
    assert {row[KIND] for row in data["weights"]}.isdisjoint(kind.removesuffix(".weight") for kind in why)


@pytest.mark.parametrize(
    ("case", "kind", "reason", "excluded"),
    [
        ("deepseek_v3", "self_attn.kv_b_proj.weight", "not every server reads in 4 bits", "mlp.down_proj.weight"),
        ("qwen3_next", "linear_attn.in_proj_qkvz.weight", "loses much in 4 bits", "mlp.experts.down_proj.weight"),
    ],
)
def test_what_the_policy_keeps_is_not_laid_to_the_config(
    case: str, kind: str, reason: str, excluded: str, made_once: MadeOnce, tmp_path: Path
) -> None:
    source = made_once(f"family_{case}", partial(make, case))
    quantize_checkpoint(source, tmp_path / "export", "w4a16_nvfp4", exclude=["model.layers.0.mlp.*"])

    why = [row[:2] for row in page_of(tmp_path / "export", None, tmp_path).data["kept"]]

    (words,) = (words for name, words in why if name == kind)
    assert reason in words
    assert [excluded, "excluded by the config"] in why


def test_readers_are_those_that_are_known_to_load_it(nvfp4: Path, tmp_path: Path) -> None:
    data = page_of(nvfp4, None, tmp_path).data
    answers = {reader: [answer, how, sizes] for reader, answer, how, sizes, _ in data["readers"]}
    sizes = ", ".join(map(str, verify_checkpoint(nvfp4).serving_tp.sizes))

    assert answers["vLLM 0.32"] == ["yes", "run with this architecture, in a tiny model", sizes]
    assert answers["SGLang 0.5.23"] == ["yes", "loaded with this architecture, in a tiny model", sizes]
    assert answers["transformers"][0] == "not known"


def test_statistics_become_pictures_of_experts(nvfp4: Path, tmp_path: Path) -> None:
    row = {
        "module": "decoder.layers.*.mlp.experts.linear_fc1.weight*", "layer": 0, "shape": [8, 8], "amax": 0.5,
        "source": "calibrated", "tokens": 7, "coverage": 0.5,
    }  # fmt: skip
    rows = [
        row | {"expert": expert, "parameter": f"decoder.layers.0.mlp.experts.linear_fc1.weight{expert}"}
        for expert in range(3)
    ]
    (tmp_path / "stats.json").write_text(json.dumps({"schema_version": 2, "rows": rows}))

    code, output = run("verify", nvfp4, "--html", tmp_path / "page.html", "--stats", tmp_path / "stats.json")

    assert code == 0, output
    (experts,) = Page((tmp_path / "page.html").read_text()).data["experts"]
    assert experts == {"module": "mlp.experts.linear_fc1", "cells": [[0, expert, 0.5, 7] for expert in range(3)]}


def test_hostile_text_stays_text(nvfp4: Path, tmp_path: Path) -> None:
    """Names and paths come from strangers: they end no script and begin none."""
    judgement = judge(nvfp4)
    finding = error(Check.NAMES, HOSTILE, HOSTILE)
    clean, hostile = tmp_path / "clean.html", tmp_path / "hostile.html"
    write_html(judgement, clean)
    report = replace(judgement.report, findings=(finding,), quantization=HOSTILE)
    write_html(replace(judgement, report=report), hostile)

    assert Page(hostile.read_text()).elements == Page(clean.read_text()).elements
    assert Page(hostile.read_text()).data["findings"][0][2:] == [HOSTILE, HOSTILE]


def test_the_policy_names_each_script_by_its_digest_and_lets_nothing_load(nvfp4: Path, tmp_path: Path) -> None:
    page = page_of(nvfp4, None, tmp_path)
    wanted = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for kind, text in page.scripts
        if kind != "application/json"
    ]

    assert len(wanted) == 3
    assert page.policy.startswith("default-src 'none'; ")
    assert re.findall(r"'sha256-([^']+)'", page.policy) == wanted
    assert page.elements.keys().isdisjoint({"link", "img", "iframe", "object", "form"})


def test_a_tensor_cut_off_is_a_finding_and_the_page_is_written(nvfp4: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in nvfp4.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = stored(broken)
    name = "model.layers.0.mlp.experts.0.down_proj.weight_scale"
    tensors[name] = tensors[name][:-1].clone()
    (file,) = broken.glob("*.safetensors")
    save_file(tensors, file, metadata={"format": "pt"})

    code, output = run("verify", broken, "--html", tmp_path / "page.html")

    assert code == 1, output
    data = Page((tmp_path / "page.html").read_text()).data
    assert not data["ok"]
    assert any(name.removesuffix(".weight_scale") in finding[2] for finding in data["findings"])


def test_a_page_that_cannot_be_written_stops_before_the_work(nvfp4: Path, tmp_path: Path) -> None:
    code, output = run("verify", nvfp4, "--html", tmp_path / "absent" / "page.html")

    assert code == 2
    assert "is not a directory" in output
    assert "OK:" not in output


def test_quantize_proves_and_shows_what_it_wrote(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    arguments = (tiny_qwen3_dir, tmp_path / "export", "--format", "fp8_dynamic", "--html", tmp_path / "page.html")
    code, output = run("quantize", *arguments)

    assert code == 0, output
    assert "OK: 0 errors" in output
    assert Page((tmp_path / "page.html").read_text()).data["source"] == str(tiny_qwen3_dir)
