"""Pipeline stages on which a config finds nothing to quantize, such as those of embeddings or of the loss alone.

ModelOpt 0.47 raises in `mtq.quantize` where a config asks for quantized weights and no weight quantizer is enabled in
the model that it was given. Of a pipeline stage that says nothing: other stages have the layers, and would wait for
this rank until they are killed. ModelOpt's one way to leave the question out is an environment variable. What the check
is for is asked of all stages together by the plan of an export (`rules`: a rule that matches nothing on any rank).
"""

import os

from torch import nn

from quantplug.megatron.parameters import LanguageModel

_SKIP_CHECK = "MODELOPT_SKIP_WEIGHT_QUANT_CHECK"  # Of modelopt.torch.quantization.model_quant.


def let_stages_be_empty(model: nn.Module) -> None:
    """Turns ModelOpt's check off before it converts a stage of a pipeline; any other model is checked as ever.

    ModelOpt calls it with every model that it converts. A user's own value of the variable stays.
    """
    for module in model.modules():
        if isinstance(module, LanguageModel) and module.config.pipeline_model_parallel_size > 1:
            # For the rest of the process: ModelOpt looks when the conversion is over, and tells nobody when it has.
            os.environ.setdefault(_SKIP_CHECK, "1")
            return
