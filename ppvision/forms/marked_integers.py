"""Layers with integers in the form for a converter that does not know integers: with marks.

paddle2onnx changes quantised graphs by its own rules (it removes the quantisation, and adds it
again in other places). So it gets a graph in float: a weight is its float tensor, and an input is
multiplied by a tensor at the place of its rounding. The converter keeps the names of tensors. By
these names, the integers are added afterwards (`ppvision.deploy.write.onnx_integers`).
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
    """The rounding of an input: `step (clip(round(x / step) + zero, -128, 127) - zero)`.

    Attributes:
        step: float32 above 0.
        zero: int8, the zero point.
        clip: lowest and highest value of the input before rounding; None: no limits.
    """

    step: np.float32
    zero: int
    clip: tuple[np.float32, np.float32] | None


@dataclass
class Marks:
    """The meaning of the tensors of a graph, by name.

    Attributes:
        weights: the marks of float weights.
        roundings: the marks of tensors `[1]` by which an input is multiplied.
    """

    weights: dict[str, IntegerWeight] = field(default_factory=dict)
    roundings: dict[str, MarkedRounding] = field(default_factory=dict)


@contextmanager
def marked_form(model: nn.Layer) -> Iterator[Marks]:
    """Put the integer layers of a model into the form for the converter during the block, and
    restore them. Enter it after the forms of whole blocks, because it also changes their layers.

    Yields:
        The marks; they are complete from the beginning.
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
    """The common part of the forms of packed layers."""

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
    """Multiplies by a tensor whose name is the mark."""

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
        zero = 0  # TensorRT accepts no other; the codes fit, because other codes are clipped
    return MarkedRounding(step, zero, clip)
