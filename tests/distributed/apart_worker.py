"""One rank of an example that every rank runs in a directory of its own, `DIRECTORY/<rank>`: relative paths differ.

Arguments: `DIRECTORY EXAMPLE ...`, and the example's own.
"""

import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    directory, example, *arguments = sys.argv[1:]
    os.chdir(Path(directory, os.environ["RANK"]))
    sys.argv = [example, *arguments]
    sys.path.insert(0, str(Path(example).parent))
    runpy.run_path(example, run_name="__main__")
