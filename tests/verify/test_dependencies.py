"""The checker works where nothing but torch, safetensors and the standard library can be imported, numpy included."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
BLOCKED = {"numpy", "transformers", "modelopt", "megatron", "transformer_engine", "torchao", "compressed_tensors",
           "typer", "rich", "click", "pandas", "scipy", "matplotlib", "huggingface_hub"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
from quantplug.verify import verify_checkpoint
sys.stdout.write(verify_checkpoint(sys.argv[1], sys.argv[2]).to_json())
assert not BLOCKED & {name.partition(".")[0] for name in sys.modules}
"""


def test_torch_and_safetensors_suffice(pristine: dict[str, Path]) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(pristine["nvfp4"]), str(pristine["source"])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["ok"] is True
