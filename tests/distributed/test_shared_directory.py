"""Ranks that would export into different directories are found before any work, and all of them are named."""

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks

SCRIPT = Path(__file__).with_name("shared_directory_ranks.py")

pytestmark = pytest.mark.distributed

# Paths of three ranks below a directory in which `disk0` and `disk1` stand for disks of nodes, `link` for disk0.
SHARED = {
    "absent": ["disk0/out"] * 3,
    "empty": ["disk0/empty"] * 3,
    "below new ones": ["disk0/a/b/out"] * 3,
    "by a link": ["disk0/a/out", "link/a/out", "disk0/../link/a/out"],
}
APART = {
    "another disk": (["disk0/out", "disk1/out", "disk1/out"], {1, 2}),
    "below new ones of another disk": (["disk0/a/out", "disk0/a/out", "disk1/a/out"], {2}),
    "another name": (["disk0/out", "disk0/out", "disk0/other"], {2}),
    "other new ones": (["disk0/a/out", "disk0/b/out", "disk0/a/out"], {1}),
    "above": (["disk0/a/out", "disk0/a", "disk0"], {1, 2}),
    "a file in the way": (["disk0/out", "disk0/file/out", "disk0/out"], {1}),
    "a new one that others have": (["disk0/empty/out", "disk1/empty/out", "disk0/empty/out"], {1}),
}


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    disks = tmp_path_factory.mktemp("disks")
    for name in ("disk0/empty", "disk1"):
        (disks / name).mkdir(parents=True)
    (disks / "disk0" / "file").write_text("")
    (disks / "link").symlink_to(disks / "disk0")
    return disks


@pytest.fixture(scope="module")
def told(disks: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each rank was told of each case."""
    output = tmp_path_factory.mktemp("told")
    before = sorted(disks.rglob("*"))
    cases = SHARED | {name: paths for name, (paths, _) in APART.items()}
    absolute = {name: [str(disks / path) for path in paths] for name, paths in cases.items()}
    (output / "cases.json").write_text(json.dumps(absolute))
    ended = run_ranks(3, SCRIPT, output / "cases.json", output)
    assert ended.ok, ended.output[-9000:]
    assert sorted(disks.rglob("*")) == before
    return [json.loads((output / f"{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.parametrize("case", SHARED)
def test_one_directory_by_whatever_path(case: str, told: list[dict[str, str]]) -> None:
    assert [messages[case] for messages in told] == ["shared"] * 3


@pytest.mark.parametrize("case", APART)
def test_all_ranks_name_every_rank_with_another_directory(case: str, disks: Path, told: list[dict[str, str]]) -> None:
    paths, apart = APART[case]
    (message,) = {messages[case] for messages in told}
    assert message.startswith("DestinationError: The ranks would export into different directories.")
    for rank, path in enumerate(paths):
        assert (f"{disks / path} on rank {rank}: " in message) == (rank in apart)
