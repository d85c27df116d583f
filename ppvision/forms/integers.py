"""Layers that hold integers, in the form that runs in integers: graphs of the earlier format.

OpenVINO folds `quantize_linear` and `dequantize_linear` of an input, and codes times scales of a
weight, into the product between them and runs that in 8-bit integers. It takes scales that are
computed from stored tensors, but zero points only as stored tensors: a computed one gives wrong
numbers without a word (Paddle 3.2.2, OpenVINO 2025.0).
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
    """The model with its integer layers in the form for graphs of the earlier format, and as it was
    afterwards. Enter it after the forms of whole blocks, whose layers it changes as well."""
    made: dict[IntegerRounding, GraphRounding] = {}  # layers that share a rounding share its form

    def form(layer: nn.Layer) -> nn.Layer | None:
        if isinstance(layer, PackedLayer) and isinstance(layer.activation, IntegerRounding):
            kind, rounding = type(layer), layer.activation
            if rounding not in made:
                made[rounding] = GraphRounding(rounding)
            return type(f"Graph{kind.__name__}", (_GraphLayer, kind), {})(layer, made[rounding])
        return None

    return use_form(model, form)


class _GraphLayer:
    """The part of a packed layer's form that is the same for all."""

    def __init__(self, layer: PackedLayer, rounding: "GraphRounding") -> None:
        nn.Layer.__init__(self)
        become(self, layer)
        self.activation = rounding

    @property
    def weight(self) -> Tensor:
        # OpenVINO takes int8 codes, made float, times a scale for the weight of an integer product.
        # `dequantize_linear` says the same in four times as many operators.
        codes, scale = self.integer_weight()
        return codes.astype("float32") * scale


class GraphRounding(nn.Layer):
    """`IntegerRounding` in a graph of the earlier format.

    Args:
        rounding: whose stored tensors it reads.
    """

    def __init__(self, rounding: IntegerRounding) -> None:
        super().__init__()
        self.rounding = rounding

    def forward(self, x: Tensor) -> Tensor:
        rounding = self.rounding
        ends = {"Scale": rounding.scale, "ZeroPoint": rounding.zero}
        how = {"dtype": "float32", "out": "Y", "quant_axis": -1, **_ATTRIBUTES}
        if (limits := rounding.limits) is not None:
            # In front: between the two operators OpenVINO 2025.0 takes codes for others.
            x = paddle.clip(x, *limits)
        codes = append_operator("quantize_linear", {"X": x, **ends}, round_type=0, **how)
        return append_operator("dequantize_linear", {"X": codes, **ends}, **how)


def float_form(model: nn.Layer) -> AbstractContextManager[None]:
    """The model with the same weights and no rounding: what its integers are timed against."""
    return use_form(model, _float)


def _float(layer: nn.Layer) -> nn.Layer | None:
    if isinstance(layer, PackedLayer) and isinstance(layer.activation, IntegerRounding):
        return layer.in_float()
    return None
