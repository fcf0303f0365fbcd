"""Which pieces are packed at once: those that are alike and small, in their order, to the bytes of each by itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantplug import export_mcore_gpt_to_hf
from quantplug.export.pipeline import gather
from quantplug.export.pipeline import pack as pack_module
from tests.export.checkpoints import files_of, load, quantize

pytestmark = pytest.mark.usefixtures("single_rank")

Sources = Callable[[str], Path]


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    """What is packed at once, noted."""
    noted: list[list[torch.Tensor]] = []
    pack_alike = pack_module.pack_alike

    def note(parts):
        noted.append([part.values for part in parts])
        return pack_alike(parts)

    monkeypatch.setattr(pack_module, "pack_alike", note)
    return noted


@pytest.mark.parametrize("scheme", ["w4a16_nvfp4", "fp8", "fp8_blockwise"])
def test_experts_are_packed_at_once_to_the_same_bytes(
    scheme: str, groups: list[list[torch.Tensor]], sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources("moe_blocks" if scheme == "fp8_blockwise" else "moe")
    model = quantize(load(source), scheme)
    export_mcore_gpt_to_hf(model, source, tmp_path / "at once")
    assert max(map(len, groups)) >= 8
    for group in groups:
        assert len({(rows.shape, rows.dtype, rows.stride()) for rows in group}) == 1

    groups.clear()
    monkeypatch.setattr(pack_module, "_are_alike", lambda one, other: False)
    export_mcore_gpt_to_hf(model, source, tmp_path / "one by one")
    assert not groups
    assert files_of(tmp_path / "at once") == files_of(tmp_path / "one by one")


def test_a_group_has_no_more_bytes_than_it_may(
    groups: list[list[torch.Tensor]], sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources("moe")
    model = quantize(load(source), "w4a16_nvfp4")
    export_mcore_gpt_to_hf(model, source, tmp_path / "large")
    most = max(sum(rows.nbytes for rows in group) for group in groups)
    groups.clear()
    monkeypatch.setattr(gather, "pack_in_groups", lambda read, _: pack_module.pack_in_groups(read, most // 2))
    export_mcore_gpt_to_hf(model, source, tmp_path / "small")
    assert groups
    assert all(sum(rows.nbytes for rows in group) <= most // 2 for group in groups)
    assert files_of(tmp_path / "large") == files_of(tmp_path / "small")
