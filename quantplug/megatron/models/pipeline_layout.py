"""Pipeline layouts in Megatron-Core's words, `E|tt|tttmL`: which layers each stage, or virtual stage, has.

E is the embedding, t a decoder layer, m a layer of multi-token prediction, L the output layer; `|` ends a stage, `t*3`
is ttt and `(t|)*3` is t|t|t| (`pipeline_model_parallel_layout` of Megatron-Core's TransformerConfig).
"""

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout


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
