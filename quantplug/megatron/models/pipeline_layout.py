"""Pipeline layouts in Megatron-Core's words, `E|tt|tttmL`: which layers each stage, or virtual stage, has.

E is the embedding, t a decoder layer, m a layer of multi-token prediction, L the output layer; `|` ends a stage, `t*3`
is ttt and `(t|)*3` is t|t|t| (`pipeline_model_parallel_layout` of Megatron-Core's TransformerConfig).
"""

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig


def layout_problem(layout: str, pp: int, virtual_stages: int | None, layers: int, mtp_layers: int | None) -> str | None:
    """Why a model of so many layers cannot be laid out like this; None if it can.

    Args:
        pp: Number of pipeline ranks.
        virtual_stages: Number of virtual stages of each; None without them.
        layers, mtp_layers: Number of layers of the decoder, and of multi-token prediction (None for none).
    """
    needed = pp * (virtual_stages or 1)
    try:
        stages = PipelineParallelLayerLayout.get_num_stages_from_str(layout)
        if stages != needed:
            each = " without" if virtual_stages is None else f" of {virtual_stages}"
            return f"{layout!r} has {stages} stages, and there are {pp} pipeline ranks{each} virtual stages"
        parsed = PipelineParallelLayerLayout(layout, pp)
        if not parsed.flatten_layout:
            return f"{layout!r} has no layers"
        parsed.validate_layer_layout(layers, mtp_layers)
    except AssertionError as error:  # What Megatron-Core says of every layout that it does not take.
        return f"{layout!r}: {error}"
    # Not asked by Megatron, whose models have them there whatever the layout says.
    if LayerType.embedding not in parsed.layout[0][0] or LayerType.loss not in parsed.layout[-1][-1]:
        return f"{layout!r}: E must be on the first stage, and L on the last"
    return None


def mtp_is_last(layout: str, pp: int) -> bool:
    """Whether the layers of multi-token prediction, if there are any, are on the last stage.

    Args:
        layout: Without a `layout_problem`.
        pp: Number of pipeline ranks.
    """
    stages = _in_order(PipelineParallelLayerLayout(layout, pp))
    return not any(LayerType.mtp in stage for stage in stages[:-1])


def decoder_layers_of_stages(config: TransformerConfig) -> list[int]:
    """How many layers of the decoder each stage of a `GPTModel` has, virtual ones in the order of the model."""
    if config.pipeline_model_parallel_layout is not None:
        return [stage.count(LayerType.decoder) for stage in _in_order(config.pipeline_model_parallel_layout)]
    stages = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
    return [config.num_layers // stages] * stages


def _in_order(layout: PipelineParallelLayerLayout) -> list[list[LayerType]]:
    """What each stage has. Megatron keeps them by pipeline rank; the first virtual stages of all come first."""
    return [stage for virtual in zip(*layout.layout, strict=True) for stage in virtual]
