"""Convolutions with padding="same" and a dilation, as graphs in ONNX need them.

Paddle ignores the dilation of such a convolution, and says so nowhere. ONNX does not ignore it, and
paddle2onnx refuses the two together. So the graph gets the dilation that Paddle uses: 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from paddle import nn


@contextmanager
def same_padding_form(model: nn.Layer) -> Iterator[None]:
    """Set the dilation of these layers to 1 during the block, and restore it afterwards."""
    changed = []
    try:
        for layer in model.sublayers(include_self=True):
            dilation = getattr(layer, "_dilation", None)
            if getattr(layer, "_padding_algorithm", None) == "SAME" and dilation is not None:
                changed.append((layer, dilation))
                layer._dilation = [1, 1]
        yield
    finally:
        for layer, dilation in changed:
            layer._dilation = dilation
