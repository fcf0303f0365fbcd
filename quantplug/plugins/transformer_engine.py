"""Quantized Transformer Engine linear layers: which are ours, and which are ModelOpt's knowingly.

| module | wrapper | why |
|---|---|---|
| `te.pytorch.GroupedLinear` | ours, below | ModelOpt 0.47 loses every expert's amax but the first one's in a restore |
| `te.pytorch.Linear`, `te.pytorch.LayerNormLinear` | ModelOpt's | one weight, one quantizer: theirs is right |

A grouped linear holds N weights `weight0 ... weight{N-1}` [out_features, in_features], one an expert, and multiplies
contiguous groups of rows of one input by them. It gets a weight quantizer for every expert, `weight_quantizer.{i}`, and
one input quantizer for all: its input is one tensor.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformer_engine
from modelopt.torch.quantization.nn import GroupedQuantizer, QuantModule, TensorQuantizer
from torch import nn
from transformer_engine.pytorch import GroupedLinear

from quantplug.errors import Offender, UnsupportedModelError
from quantplug.plugins.amax_state import fit_restored_amax
from quantplug.plugins.refusals import refuse_autocast, refuse_unsupported


class QuantGroupedLinear(QuantModule):
    """Quantized `te.pytorch.GroupedLinear` with one weight quantizer an expert.

    Attributes:
        weight_quantizer: N quantizers; number i has the amax of `weight{i}`. ModelOpt's wildcards that end in
            `weight_quantizer` reach every one of them.
        input_quantizer: The one quantizer of the input.
        output_quantizer: Disabled, as in every ModelOpt linear.

    Converting one turns `fuse_wgrad_accumulation` off: TE would add the gradient to the quantized copy of a weight.

    Raises:
        UnsupportedModelError: On conversion: a setting that we refuse (`refusals`), or a TE version whose forward we do
            not know. On forward: TE's autocast is active, or TE's forward did not take its weights from us.
    """

    weight_quantizer: GroupedQuantizer
    input_quantizer: TensorQuantizer
    output_quantizer: TensorQuantizer
    num_gemms: int

    def _setup(self) -> None:
        # Also when a single module is converted, without the model-wide check that runs before: nothing is changed yet.
        refuse_unsupported(self)
        require_known_forward()
        self.fuse_wgrad_accumulation = False
        self.weight_quantizer = GroupedQuantizer(*(TensorQuantizer() for _ in range(self.num_gemms)))
        self.input_quantizer = TensorQuantizer()
        self.output_quantizer = TensorQuantizer()
        self.output_quantizer.disable()
        # None outside our forward, where TE asks for the weights as they are; in it a list, empty until TE has asked.
        self._weights_for_forward: list[torch.Tensor] | None = None

    def iter_weights_for_calibration(self) -> Iterator[tuple[nn.Parameter, TensorQuantizer]]:
        """Yields every expert's live weight [out_features, in_features] and its quantizer."""
        for expert in range(self.num_gemms):
            yield self.get_parameter(f"weight{expert}"), self.weight_quantizer[expert]

    def forward(self, inp: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """TE's own forward of the fake-quantized input [rows, in_features] and weights."""
        refuse_autocast()
        with self._quantized_weights():
            outputs = super().forward(self.input_quantizer(inp), *args, **kwargs)
        # With return_bias TE gives the biases beside the output; they are not quantized.
        if isinstance(outputs, tuple):
            return (self.output_quantizer(outputs[0]), *outputs[1:])
        return self.output_quantizer(outputs)

    def fold_weight(self, keep_attrs: bool = False) -> None:
        """Replaces every weight by its fake-quantized values, and disables its quantizer."""
        for weight, quantizer in self.iter_weights_for_calibration():
            self._fold_weight_quantizer(quantizer, (weight,), keep_attrs)

    def modelopt_post_restore(self, prefix: str = "") -> None:
        """Keeps the restored state of every expert; see `fit_restored_amax`."""
        # ModelOpt's own resets every amax here and calibrates on `weight` alone, which is the first expert's.
        for weight, quantizer in self.iter_weights_for_calibration():
            fit_restored_amax(quantizer, weight)
        device = self.get_parameter("weight0").device
        self.input_quantizer.to(device)
        self.output_quantizer.to(device)

    def _get_weight_tensors(self) -> list[torch.Tensor]:
        """TE's seam: every use of the weights asks here. Inside our forward it gets the fake-quantized ones."""
        if self._weights_for_forward is None:
            return super()._get_weight_tensors()
        self._weights_for_forward = [
            quantizer(weight)
            for weight, quantizer in zip(super()._get_weight_tensors(), self.weight_quantizer, strict=True)
        ]
        return self._weights_for_forward

    @contextmanager
    def _quantized_weights(self) -> Iterator[None]:
        self._weights_for_forward = []
        try:
            yield
            # Loud, because a TE that takes its weights elsewhere would run unquantized and look right.
            if not self._weights_for_forward:
                raise _unknown_version("GroupedLinear.forward ran without asking _get_weight_tensors")
        finally:
            # Lets go of the quantized copies, which are as large as all experts of the layer.
            self._weights_for_forward = None


def require_known_forward(linear: type[GroupedLinear] = GroupedLinear) -> None:
    """Refuses a TE version whose grouped forward does not have the seam that quantizes its weights.

    The seam (TE 2.14 to 2.20): `forward(self, inp, m_splits, ...)` takes its weights from `self._get_weight_tensors()`.

    Raises:
        UnsupportedModelError: Names the version and what it lacks.
    """
    # In the class itself: a base class that has it need not be what this class's forward asks.
    if "_get_weight_tensors" not in vars(linear):
        raise _unknown_version("GroupedLinear has no _get_weight_tensors")
    if list(inspect.signature(linear._get_weight_tensors).parameters) != ["self"]:
        raise _unknown_version("GroupedLinear._get_weight_tensors takes arguments")
    if list(inspect.signature(linear.forward).parameters)[:3] != ["self", "inp", "m_splits"]:
        raise _unknown_version("GroupedLinear.forward does not begin with (inp, m_splits)")


def _unknown_version(reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "This version of Transformer Engine runs its grouped linear in a way we do not know.",
        [Offender(f"transformer-engine {transformer_engine.__version__}", reason)],
        "Install transformer-engine 2.14 to 2.20, or use SequentialMLP (moe_grouped_gemm=False).",
    )
