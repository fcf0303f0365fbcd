"""One rank of four that exports HybridModels at TP 2, EP 2 and PP 2, in NVFP4, of several families in turn.

Arguments: `WORK FAMILY ...`; reads WORK/FAMILY/hf, writes WORK/FAMILY/out and a checkpoint, WORK/FAMILY/megatron.
Of decoders of four layers also WORK/FAMILY/virtual, from two virtual stages a rank; of one family WORK/FAMILY/examples,
by the two example scripts.
"""

import sys
from dataclasses import replace
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import export  # noqa: E402
import quantize as quantize_example  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

import quantplug  # noqa: E402
from quantplug import export_mcore_gpt_to_hf, import_mcore_gpt_from_hf, save_checkpoint  # noqa: E402
from quantplug.checkpoint.config.source import megatron_config, read_source_config  # noqa: E402
from quantplug.mappings.table import MegatronConfig, ModelKind  # noqa: E402
from quantplug.megatron.models.build import build_model  # noqa: E402
from quantplug.megatron.parallel import initialize_parallel  # noqa: E402
from quantplug.megatron.parameters import LanguageModel  # noqa: E402
from tests.export.checkpoints import quantize  # noqa: E402
from tests.families.served import serves_experts  # noqa: E402

SCHEME = "w4a16_nvfp4"
BY_EXAMPLES = "qwen3_moe"
# The ranks go on with the next family: only the model parallel groups end with an example.
quantplug.destroy_parallel = parallel_state.destroy_model_parallel


def main(work: Path, families: list[str]) -> None:
    for family in families:
        source = work / family / "hf"
        settings = replace(megatron_config(read_source_config(source)), kind=ModelKind.HYBRID)
        initialize_parallel(tp=2, ep=2 if settings.transformer.get("num_moe_experts") else 1, etp=1, pp=2)
        layers, mtp = (settings.transformer.get(name) or 0 for name in ("num_layers", "mtp_num_layers"))
        # Three layers do not divide over two stages.
        first = "t" * (layers // 2)
        layout = f"E{first}|{'t' * (layers - len(first))}{'m' * mtp}L"
        (model,) = exported(family, settings, source, work / family / "out", pipeline_layout=layout)
        # Megatron-Core has no checkpoint of a stage with two copies of the embedding.
        if not (mtp and settings.model["share_embeddings_and_output_weights"]):
            save_checkpoint(model, work / family / "megatron", extra={})
        if layers == 4:
            exported(family, settings, source, work / family / "virtual", virtual_stages=2)
        parallel_state.destroy_model_parallel()
        if family == BY_EXAMPLES:
            by_examples(work / family, layout)


def by_examples(work: Path, layout: str) -> None:
    """HF to a HybridModel, its checkpoint, and HF again."""
    sizes = {"tp": 2, "ep": 2, "pp": 2, "pipeline_layout": layout, "hybrid": True}
    saved = work / "examples-megatron"
    quantize_example.main(str(work / "hf"), saved, export_quant_cfg=quantplug.QuantFormat.W4A16_NVFP4, **sizes)
    export.main(str(work / "hf"), saved, work / "examples", **sizes)


def exported(
    family: str,
    settings: MegatronConfig,
    source: Path,
    directory: Path,
    *,
    virtual_stages: int | None = None,
    pipeline_layout: str | None = None,
) -> list[LanguageModel]:
    chunks = [
        build_model(settings, virtual_stages=virtual_stages, virtual_stage=stage, pipeline_layout=pipeline_layout)
        for stage in ((None,) if virtual_stages is None else range(virtual_stages))
    ]
    import_mcore_gpt_from_hf(chunks, source)
    for chunk in chunks:
        quantize(chunk, SCHEME, source, keep_experts=not serves_experts(family, SCHEME))
    export_mcore_gpt_to_hf(chunks, source, directory)
    return chunks


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
