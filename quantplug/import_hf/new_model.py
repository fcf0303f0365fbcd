"""From a Hugging Face directory to a Megatron-Core model in one call, with or without its weights."""

from dataclasses import replace
from pathlib import Path
from typing import overload

import torch

import quantplug.plugins  # Registers our wrappers with ModelOpt, so that what is built here can be quantized.  # noqa: F401
from quantplug.checkpoint.config.source import SourceConfig, megatron_config, read_source_config
from quantplug.checkpoint.reader import resolve_source
from quantplug.errors import ArgumentError, Offender, TopologyError
from quantplug.import_hf.to_model import import_mcore_gpt_from_hf
from quantplug.mappings.table import MegatronConfig, ModelKind
from quantplug.megatron.agreement import all_or_none
from quantplug.megatron.models import build
from quantplug.megatron.models.build import LayerSpec, check_divisible, require_class
from quantplug.megatron.parallel import current_topology
from quantplug.megatron.parameters import LanguageModel
from quantplug.progress import Progress
from quantplug.topology import ParallelTopology

_ZERO_CENTRED = "layernorm_zero_centered_gamma"


@overload
def build_model(
    pretrained_model_name_or_path: str | Path,
    *,
    import_weights: bool = False,
    dtype: torch.dtype | None = None,
    layer_spec: LayerSpec = LayerSpec.TRANSFORMER_ENGINE,
    virtual_stages: None = None,
    pipeline_layout: str | None = None,
    trust_remote_code: bool = False,
    vocab_size: int | None = None,
    zero_centred_norms: bool | None = None,
    hybrid: bool = False,
    progress: Progress | None = None,
) -> LanguageModel: ...
@overload
def build_model(
    pretrained_model_name_or_path: str | Path,
    *,
    import_weights: bool = False,
    dtype: torch.dtype | None = None,
    layer_spec: LayerSpec = LayerSpec.TRANSFORMER_ENGINE,
    virtual_stages: int,
    pipeline_layout: str | None = None,
    trust_remote_code: bool = False,
    vocab_size: int | None = None,
    zero_centred_norms: bool | None = None,
    hybrid: bool = False,
    progress: Progress | None = None,
) -> list[LanguageModel]: ...
def build_model(
    pretrained_model_name_or_path: str | Path,
    *,
    import_weights: bool = False,
    dtype: torch.dtype | None = None,
    layer_spec: LayerSpec = LayerSpec.TRANSFORMER_ENGINE,
    virtual_stages: int | None = None,
    pipeline_layout: str | None = None,
    trust_remote_code: bool = False,
    vocab_size: int | None = None,
    zero_centred_norms: bool | None = None,
    hybrid: bool = False,
    progress: Progress | None = None,
) -> LanguageModel | list[LanguageModel]:
    """Builds what this rank holds of a model, from its Hugging Face directory. All ranks call it together.

    It lies on the rank's GPU, or in host memory where there is none, and can be quantized by ModelOpt as it is:
    quantplug's wrappers are registered by this call.

    Args:
        pretrained_model_name_or_path: A directory that `save_pretrained` wrote, or the id of a hub model.
        import_weights: Whether its weights are read too. Without, they are zero, and a hub model's are not fetched: for
            a Megatron checkpoint that is loaded next.
        dtype: Type of the parameters; None for the one that the config names.
        layer_spec: Which modules the layers are made of.
        virtual_stages: Number of model chunks of each rank under virtual pipeline parallelism; None without it.
        pipeline_layout: Which layers each stage has, as Megatron-Core's `pipeline_model_parallel_layout` says it:
            `E|ttttL` is the embedding alone, then four layers and the output layer; with `m` for the layers of
            multi-token prediction, and one stage after the other, virtual ones too. None for as many layers on each.
        trust_remote_code: Whether transformers may run the checkpoint's code to read its config.
        vocab_size: Number of tokens that the model has rows for; None for that of the config.
        zero_centred_norms: Whether norms multiply with 1 + weight, as in a checkpoint that Megatron-LM trained with
            `--apply-layernorm-1p`; None for what is usual of the architecture.
        hybrid: Whether to build the `HybridModel` that Megatron-Core recommends from 0.19 on, in place of a `GPTModel`:
            the same model of twice as many layers. Of Nemotron-H the one class that it has is built.
        progress: Called as ("import", parameters done, parameters of this rank).

    Returns:
        A `GPTModel`, `HybridModel` or `MambaModel`; with `virtual_stages` the list of this rank's.

    Raises:
        ArgumentError: A `vocab_size` that is no number of tokens, or norms that the layer spec has not.
        SourceError: There is no such directory or hub model, or it has no usable config; what the import of its
            weights says of it.
        UnsupportedModelError: The architecture, or a setting of it, is not one we convert; or Megatron-Core is too old
            for a `HybridModel`.
        TopologyError: `initialize_parallel` has not been called; or the layout, or a size of the model, does not fit
            the ranks.
        MappingError, ShapeError: The weights are not those of the config.
    """
    # Every rank reads the config itself. One that cannot, as on a node without the directory, ends all of them.
    source = all_or_none(lambda: _read(pretrained_model_name_or_path, import_weights, trust_remote_code))
    topology = current_topology()

    def fitting() -> MegatronConfig:
        if virtual_stages is not None:
            _require_pipeline(topology)
        config = megatron_config(source if vocab_size is None else source.with_tokens(vocab_size))
        if hybrid and config.kind is ModelKind.GPT:
            config = replace(config, kind=ModelKind.HYBRID)
        require_class(config.kind)
        if zero_centred_norms is not None:
            config = _with_norms(config, zero_centred_norms, layer_spec)
        check_divisible(config, topology, virtual_stages, layer_spec, pipeline_layout)
        return config

    # On all ranks together, as the config of one may be another one than those of the others.
    config = all_or_none(fitting)
    chunks = [
        build.build_model(
            config,
            layer_spec=layer_spec,
            # Without a word from the caller parameters have the type that the source has them in.
            dtype=dtype or source.dtype,
            virtual_stages=virtual_stages,
            virtual_stage=stage,
            pipeline_layout=pipeline_layout,
        )
        # Megatron tells no virtual stages from the first of several by None and 0.
        for stage in ((None,) if virtual_stages is None else range(virtual_stages))
    ]
    if import_weights:
        import_mcore_gpt_from_hf(chunks, source.directory, trust_remote_code=trust_remote_code, progress=progress)
    return chunks[0] if virtual_stages is None else chunks


def _read(name_or_path: str | Path, weights: bool, trust_remote_code: bool) -> SourceConfig:
    return read_source_config(resolve_source(name_or_path, weights=weights), trust_remote_code)


def _with_norms(config: MegatronConfig, zero_centred: bool, layer_spec: LayerSpec) -> MegatronConfig:
    usual = bool(config.transformer.get(_ZERO_CENTRED, False))
    if zero_centred is not usual and layer_spec is LayerSpec.LOCAL:
        raise ArgumentError(
            "Megatron-Core's own modules have these norms in one way alone.",
            [Offender("zero_centred_norms", f"is {zero_centred} with LayerSpec.LOCAL")],
            "Build the model of Transformer Engine's modules, LayerSpec.TRANSFORMER_ENGINE.",
        )
    return replace(config, transformer={**config.transformer, _ZERO_CENTRED: zero_centred})


def _require_pipeline(topology: ParallelTopology) -> None:
    """Refuses virtual stages on one pipeline stage.

    There Megatron gives each chunk all layers, so that the model would be there several times.

    Raises:
        TopologyError: The pipeline parallel size is 1.
    """
    if topology.pp == 1:
        raise TopologyError(
            "Virtual pipeline stages need pipeline stages.",
            [Offender("virtual_stages", "is given, and the pipeline parallel size is 1")],
            "Leave it out, or call initialize_parallel with a pp of 2 or more.",
        )
