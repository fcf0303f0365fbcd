"""One rank that runs the two example scripts for several families in turn.

Arguments: `WORK TP EP FAMILY ...`; reads WORK/FAMILY/hf, writes WORK/FAMILY/TP-EP. Of decoders with Mamba
mixers also WORK/FAMILY/1-1-at-TP-EP: the checkpoint that one rank has saved, as these ranks load and export it.
"""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import export  # noqa: E402
import quantize  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

import quantplug  # noqa: E402
from quantplug.checkpoint.config.source import read_source_config  # noqa: E402
from quantplug.mappings.families import find_family  # noqa: E402
from tests.families.served import has_experts  # noqa: E402

# The ranks go on with the next family: only the model parallel groups end with an example.
quantplug.destroy_parallel = parallel_state.destroy_model_parallel


def main(work: Path, tp: int, ep: int, families: list[str]) -> None:
    for family in families:
        source, out = work / family / "hf", work / family / f"{tp}-{ep}"
        checkpoint = out.with_name(f"{out.name}-megatron")
        quantize.main(
            str(source),
            checkpoint,
            # Of the formats those in which servers load the experts.
            export_quant_cfg=quantize.QuantFormat.MXFP4 if family == "gpt_oss" else quantize.QuantFormat.NVFP4,
            weight_only=True,
            tp=tp,
            ep=size_of_ep(source, ep),
            mtp=quantize.Treatment.QUANTIZED,
        )
        export.main(str(source), checkpoint, out, tp=tp, ep=size_of_ep(source, ep))
        saved_by_one = out.with_name("1-1-megatron")
        if tp > 1 and saved_by_one.exists() and has_mamba(source):
            loaded = out.with_name(f"1-1-at-{out.name}")
            export.main(str(source), saved_by_one, loaded, tp=tp, ep=size_of_ep(source, ep))


def has_mamba(source: Path) -> bool:
    """Whether it has mixers; tests/distributed and test_delta.py load checkpoints of other decoders at other sizes."""
    config = read_source_config(source)
    return find_family(config.architecture).dimensions(config.values).mamba is not None


def size_of_ep(source: Path, ep: int) -> int:
    """The EP size; 1 for a dense model."""
    return ep if has_experts(source) else 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
