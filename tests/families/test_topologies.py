"""Every decoder through the two example scripts, on ranks: the same bytes as without, and verify finds no fault."""

from collections.abc import Callable
from pathlib import Path

import pytest

from quantplug import quantize_checkpoint
from tests.export.checkpoints import read, same_bytes
from tests.families.cases import DECODERS
from tests.families.served import errors_of
from tests.ranks import run_ranks

OF_ONE_RANK = [name for name in DECODERS if name.startswith("nemotron_h")]
WORKER = Path(__file__).with_name("examples_worker.py")

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Path:
    """FAMILY/2-2 for each of them: HF to Megatron, NVFP4 weight-only, a Megatron checkpoint, HF.

    FAMILY/1-1 without ranks, but for decoders with Mamba mixers: of these, several ranks load the checkpoint of one.
    """
    work = tmp_path_factory.mktemp("examples")
    for name in DECODERS:
        (work / name).mkdir()
        (work / name / "hf").symlink_to(checkpoint(name))
        if name not in OF_ONE_RANK:
            quant_format = "mxfp4" if name == "gpt_oss" else "w4a16_nvfp4"
            quantize_checkpoint(work / name / "hf", work / name / "1-1", quant_format, quantize_mtp=True)
    for size, names in ((1, OF_ONE_RANK), (2, DECODERS)):
        # Models keep their groups, and each group has threads: few models for each set of ranks.
        for few in (names[first : first + 5] for first in range(0, len(names), 5)):
            run = run_ranks(size, WORKER, work, size, size, *few, timeout=300)
            assert run.ok, run.output[-9000:]
    return work


@pytest.mark.parametrize("family", DECODERS)
def test_the_same_bytes_at_tp2_ep2_as_at_one_rank(family: str, exports: Path) -> None:
    one, two = read(exports / family / "1-1"), read(exports / family / "2-2")
    assert one.keys() == two.keys()
    assert [name for name in one if not same_bytes(one[name], two[name])] == []


@pytest.mark.parametrize("hybrid", OF_ONE_RANK)
def test_a_checkpoint_of_one_rank_is_the_same_at_tp2_ep2(hybrid: str, exports: Path) -> None:
    """Segments of mixers, and what is cut beside linears, are loaded as another number of ranks cuts them."""
    one, two = read(exports / hybrid / "1-1"), read(exports / hybrid / "1-1-at-2-2")
    assert one.keys() == two.keys()
    assert [name for name in one if not same_bytes(one[name], two[name])] == []


@pytest.mark.parametrize("family", DECODERS)
def test_verify_with_the_source_finds_no_fault(family: str, exports: Path, checkpoint: Callable[[str], Path]) -> None:
    assert errors_of(exports / family / "2-2", checkpoint(family)) == set()
