"""What the forms for graphs share: layers that give way to others while a graph is traced."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import paddle
from paddle import Tensor, nn

from ppvision.quant.layered_layers import LayeredLayer
from ppvision.quant.layered_state import layers_by_path


@contextmanager
def in_form(
    model: nn.Layer,
    input_shape: Sequence[int | None],
    form: Callable[[nn.Layer], nn.Layer | None],
) -> Iterator[None]:
    """The model with some of its layers replaced, and as it was afterwards.

    Args:
        model: in evaluation mode.
        input_shape: of the graph, `[B, C, H, W]`. Nothing changes where H or W is None.
        form: what stands for a layer; None where it stays.
    """
    changed = []
    try:
        if None not in input_shape[2:]:
            for _, parent, name, layer in list(layers_by_path(model)):
                if (other := form(layer)) is not None:
                    parent._sub_layers[name] = other
                    changed.append((parent, name, layer))
        yield
    finally:
        for parent, name, layer in changed:
            parent._sub_layers[name] = layer


def is_plain(layer: nn.Layer) -> bool:
    """A convolution of a float weight, or of packed codes, on its input as it comes."""
    fixed = isinstance(layer, nn.Conv2D) and not isinstance(layer, LayeredLayer)
    return fixed and getattr(layer, "activation", None) is None


@paddle.jit.not_to_static
def has_known_size(x: Tensor) -> bool:
    """Whether height and width of `[B, C, H, W]` are numbers in the graph that is traced."""
    return x.shape[2] > 0 and x.shape[3] > 0
