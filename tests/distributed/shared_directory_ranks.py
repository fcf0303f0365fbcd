"""Run by torchrun on three ranks: each case gives every rank its path to an export directory.

Usage: shared_directory_ranks.py CASES.json OUTPUT_DIR, the cases being names to three paths; each rank notes what it is
told of each.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from quantplug.errors import QuantplugError
from quantplug.export.files.shared_directory import require_shared


def message_of(path: Path, rank: int) -> str:
    try:
        require_shared(path, rank)
    except QuantplugError as error:
        return f"{type(error).__name__}: {error}"
    return "shared"


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    cases = json.loads(Path(sys.argv[1]).read_text())
    messages = {name: message_of(Path(paths[rank]), rank) for name, paths in cases.items()}
    Path(sys.argv[2], f"{rank}.json").write_text(json.dumps(messages))
    dist.destroy_process_group()
