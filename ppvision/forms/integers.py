"""Layers with integers in the form that runs in integers: graphs of the earlier format.

OpenVINO folds `quantize_linear` and `dequantize_linear` of an input, and codes times scales of a
weight, into the product between them and runs that in 8-bit integers. It accepts scales that are
computed from stored tensors, but zero points only as stored tensors: a computed zero point silently
gives wrong numbers (Paddle 3.2.2, OpenVINO 2025.0).
"""

from contextlib import AbstractContextManager

import paddle
from paddle import Tensor, nn

from ppvision.forms.earlier_format import append_operator
from ppvision.forms.exchange import use_form
from ppvision.quant.packed import IntegerRounding, PackedLayer
from ppvision.quant.train.layers import become

_ATTRIBUTES = {"bit_length": 8, "is_test": True, "only_observer": False}


def integer_form(model: nn.Layer) -> AbstractContextManager[None]:
    """Put the integer layers of a model into the form for graphs of the earlier format during the
    block, and restore them. Enter it after the forms of whole blocks, because it also changes their
    layers."""
    made: dict[IntegerRounding, GraphRounding] = {}  # forms by rounding: layers may share one

    def form(layer: nn.Layer) -> nn.Layer | None:
        if isinstance(layer, PackedLayer) and isinstance(layer.activation, IntegerRounding):
            kind, rounding = type(layer), layer.activation
            if rounding not in made:
                made[rounding] = GraphRounding(rounding)
            return type(f"Graph{kind.__name__}", (_GraphLayer, kind), {})(layer, made[rounding])
        return None

    return use_form(model, form)


class _GraphLayer:
    """The common part of the forms of packed layers."""

    def __init__(self, layer: PackedLayer, rounding: "GraphRounding") -> None:
        nn.Layer.__init__(self)
        become(self, layer)
        self.activation = rounding

    @property
    def weight(self) -> Tensor:
        # OpenVINO recognises int8 codes, converted to float, times a scale as the weight of an
        # integer product. `dequantize_linear` needs four times as many operators for the same.
        codes, scale = self.integer_weight()
        return codes.astype("float32") * scale


class GraphRounding(nn.Layer):
    """`IntegerRounding` in a graph of the earlier format.

    Args:
        rounding: the rounding with the stored tensors.
    """

    def __init__(self, rounding: IntegerRounding) -> None:
        super().__init__()
        self.rounding = rounding

    def forward(self, x: Tensor) -> Tensor:
        rounding = self.rounding
        ends = {"Scale": rounding.scale, "ZeroPoint": rounding.zero}
        how = {"dtype": "float32", "out": "Y", "quant_axis": -1, **_ATTRIBUTES}
        if (limits := rounding.limits) is not None:
            # Before both operators: between them, OpenVINO 2025.0 gives wrong codes.
            x = paddle.clip(x, *limits)
        codes = append_operator("quantize_linear", {"X": x, **ends}, round_type=0, **how)
        return append_operator("dequantize_linear", {"X": codes, **ends}, **how)


def float_form(model: nn.Layer) -> AbstractContextManager[None]:
    """Remove the rounding and keep the weights: the time of the integers is compared with this
    model."""
    return use_form(model, _float)


def _float(layer: nn.Layer) -> nn.Layer | None:
    if isinstance(layer, PackedLayer) and isinstance(layer.activation, IntegerRounding):
        return layer.in_float()
    return None
