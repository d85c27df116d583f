"""Functions that the forms for graphs share: they replace layers while a graph is traced."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ppvision.nn.layers import is_pointwise
from ppvision.quant.packed import PackedLayer
from ppvision.quant.store.state import walk_layers

# "This axis keeps its size", of a reshape that follows a transposition. oneDNN's pass
# `operator_reshape_onednn_fuse_pass` (Paddle 3.2) gives the two, as one operator, the wrong type,
# which fails where a concatenation follows. It does not change shapes with a 0. Our `Predictor`
# disables the pass; PaddleX and the clients of PaddleSeg do not.
KEPT = 0


@contextmanager
def use_form(model: nn.Layer, form: Callable[[nn.Layer], nn.Layer | None]) -> Iterator[None]:
    """Replace some layers of a model during the block, and restore them afterwards.

    Args:
        model: in evaluation mode.
        form: returns the replacement of a layer, or None to keep the layer.
    """
    changed = []
    try:
        for _, parent, name, layer in list(walk_layers(model)):
            if (other := form(layer)) is not None:
                parent._sub_layers[name] = other
                changed.append((parent, name, layer))
        yield
    finally:
        for parent, name, layer in changed:
            parent._sub_layers[name] = layer


def is_untouched(layer: nn.Layer, kind: type[nn.Layer], *, rounding: bool = False) -> bool:
    """Whether a layer computes exactly what `kind` does, with a float weight or packed codes, on
    its unchanged input (with `rounding` also on its rounded input): it is no subclass, and has no
    hooks and no own `forward`."""
    found, activation = type(layer), None
    if isinstance(layer, PackedLayer):
        found, activation = layer.kind, layer.activation
    hooked = bool(layer._forward_pre_hooks or layer._forward_post_hooks)
    as_it_comes = rounding or activation is None
    return found is kind and as_it_comes and not hooked and "forward" not in vars(layer)


def is_plain_conv(layer: nn.Layer, *, rounding: bool = False) -> bool:
    """Whether a layer is an unchanged convolution of channels-first maps, padded with zeros."""
    if not is_untouched(layer, nn.Conv2D, rounding=rounding):
        return False
    return layer._data_format == "NCHW" and layer._padding_mode == "zeros"


def is_plain_linear(layer: nn.Layer, *, rounding: bool = False) -> bool:
    """Whether a layer is such a convolution of a 1x1 kernel, with a bias."""
    plain = is_plain_conv(layer, rounding=rounding)
    return plain and is_pointwise(layer) and layer.bias is not None


def fold_norms(norms: Sequence[nn.BatchNorm2D]) -> tuple[Tensor, Tensor]:
    """Return factors and summands of N norms of C channels in evaluation mode: `[N C]` each."""
    # Few operations on weights, because each is folded separately when the graph is loaded.
    names = ("weight", "bias", "_mean", "_variance")
    joined = [paddle.concat([getattr(norm, name) for norm in norms]) for name in names]
    weight, bias, mean, variance = joined
    gain = weight / paddle.sqrt(variance + norms[0]._epsilon)
    return gain, bias - mean * gain


def attend_within_groups(tokens: Tensor, shape: Sequence[int | Tensor]) -> Tensor:
    """Compute attention among the T tokens of each group, in a form for which Paddle Inference uses
    one operator; the scale is in the query.

    Args:
        tokens: `[G, T, 3, heads, d]`, of query, key and value.
        shape: shape of the result, whose memory is `[G, T, heads, d]`.
    """
    tokens = tokens.transpose([2, 0, 3, 1, 4])
    query, key, value = tokens[0], tokens[1], tokens[2]  # [G, heads, T, d] each
    scores = paddle.matmul(query, key.transpose([0, 1, 3, 2]))  # [G, heads, T, T]
    out = paddle.matmul(F.softmax(scores, axis=-1), value)  # [G, heads, T, d]
    merged = out.transpose([0, 2, 1, 3]).reshape([KEPT, KEPT, -1])  # [G, T, heads * d]
    return merged.reshape(shape)


@paddle.jit.not_to_static
def has_known_size(x: Tensor) -> bool:
    """Whether height and width of `[B, C, H, W]` are numbers in the graph that is traced."""
    return x.shape[2] > 0 and x.shape[3] > 0
