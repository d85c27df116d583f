"""Layers that hold integers, in the form for a converter that does not know them: with marks.

paddle2onnx changes graphs that are quantised by rules of its own (it takes the quantisation out,
and puts it in again elsewhere). So it gets a graph in float: a weight is its float tensor, and an
input is multiplied by a tensor in the place where it is to be rounded. The converter keeps the
names of tensors; by these, what is meant is put in afterwards
(`ppvision.deploy.write.onnx_integers`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import paddle
from paddle import Tensor, nn

from ppvision.forms.exchange import use_form
from ppvision.quant.integers import INT8_LOW, IntegerWeight
from ppvision.quant.packed import IntegerRounding, PackedLayer
from ppvision.quant.train.layers import become

INT8_HIGH = 127


@dataclass(frozen=True)
class MarkedRounding:
    """How an input is rounded: `step (clip(round(x / step) + zero, -128, 127) - zero)`.

    Attributes:
        step: float32 above 0.
        zero: int8, the zero point.
        clip: the lowest and highest value that the input keeps before that; None: all.
    """

    step: np.float32
    zero: int
    clip: tuple[np.float32, np.float32] | None


@dataclass
class Marks:
    """The meaning of the tensors of a graph, by their names in it.

    Attributes:
        weights: of float weights.
        roundings: of tensors `[1]` that an input is multiplied by.
    """

    weights: dict[str, IntegerWeight] = field(default_factory=dict)
    roundings: dict[str, MarkedRounding] = field(default_factory=dict)


@contextmanager
def marked_form(model: nn.Layer) -> Iterator[Marks]:
    """The model with its integer layers in the form for the converter, and as it was afterwards.
    Enter it after the forms of whole blocks, whose layers it changes as well.

    Yields:
        The marks, complete from the beginning.
    """
    marks = Marks()

    def form(layer: nn.Layer) -> nn.Layer | None:
        if isinstance(layer, PackedLayer) and isinstance(layer.activation, IntegerRounding):
            kind = type(layer)
            return type(f"Marked{kind.__name__}", (_MarkedLayer, kind), {})(layer, marks)
        return None

    with use_form(model, form):
        yield marks


class _MarkedLayer:
    """The part of a packed layer's form that is the same for all."""

    def __init__(self, layer: PackedLayer, marks: Marks) -> None:
        nn.Layer.__init__(self)
        become(self, layer)
        marks.weights[self.unpacked.name] = _weight(layer)
        rounding = layer.activation
        marks.roundings[rounding.scale.name] = _rounding(rounding)
        self.activation = _Mark(rounding.scale)

    @property
    def weight(self) -> Tensor:
        return self.unpacked


class _Mark(nn.Layer):
    """Multiplies by a tensor whose name says what is meant."""

    def __init__(self, mark: Tensor) -> None:
        super().__init__()
        self.register_buffer("mark", mark)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mark


@paddle.no_grad()
def _weight(layer: PackedLayer) -> IntegerWeight:
    codes, scale = (tensor.numpy() for tensor in layer.integer_weight())
    return IntegerWeight(codes, scale.reshape(-1), layer.axis)


def _rounding(rounding: IntegerRounding) -> MarkedRounding:
    step = np.float32(rounding.scale.numpy()[0]) / np.float32(INT8_HIGH)
    zero = int(rounding.zero)
    low, high = rounding.low - zero, rounding.high - zero
    clip = None if rounding.limits is None else tuple(map(np.float32, rounding.limits))
    if low >= INT8_LOW and high <= INT8_HIGH:
        zero = 0  # TensorRT takes no other; the codes fit, since the others are clipped off
    return MarkedRounding(step, zero, clip)
