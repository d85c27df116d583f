"""SegFormer's head with the same arithmetic in another order: the form in exported graphs, and in
training on a CPU.

PaddleSeg's SegFormer projects each of four maps to E channels (a Linear), resizes the three coarser
ones to the size of the finest, joins them to 4E channels, and computes a 1x1 convolution and a
BatchNorm. Two steps make the same result cheaper, because nothing between the Linear and the ReLU
bends a value:

- A 1x1 convolution of resized maps is the resized 1x1 convolution: the one mixes channels, the
  other pixels. So the convolution of joined maps is a sum of four convolutions, and the coarser
  three run on fewer pixels. (Bilinear weights of a pixel sum to 1, so that a bias commutes too.)
- Two linear layers in a row are one. Its weight `[E, C]` is their product, with the gain of the
  BatchNorm in it.

The head then needs C * E multiplications per pixel of each map. The 4E * E multiplications per
pixel of the finest map, and its tensor of 4E channels, are gone (`docs/performance.md` has the
gain).

In a graph in float, operations compute the weights from the trained ones, and the engines fold
these operations once, when they load the graph. For integers from a float model, `fold_head` folds
before the weights are rounded. A layered model in integers keeps its head: its codes belong to the
two layers, and rounding stands between them (docs/notes/engines.md). While a model trains,
operations compute the weights too, and gradients reach the trained ones
(`ppvision.forms.cpu_training`).
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ppvision.forms.exchange import fold_norms, has_known_size, is_plain_conv, is_untouched

# Names of the Linear layers, in the order in which the head joins their maps: the coarsest first.
LEVELS = ("linear_c4", "linear_c3", "linear_c2", "linear_c1")

Convolve = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # map, 1x1 kernel, bias


@contextmanager
def head_form(model: nn.Layer, convolve: Convolve = F.conv2d) -> Iterator[None]:
    """Put the heads of PaddleSeg's SegFormer in a model into this form during the block, and
    restore them.

    Args:
        model: a SegFormer, or a model that contains one. While it trains, the BatchNorm stays a
            layer of its own, because its statistics are those of the batch.
        convolve: computes a 1x1 convolution in eager mode. Default: Paddle's.

    A head keeps its form if it rounds activations, or if it was changed.
    """

    def forward(layer: nn.Layer, x: Tensor) -> list[Tensor]:
        """`SegFormer.forward` with a folded head."""
        features = layer.backbone(x)
        return [_compute(layer, x, features, convolve)]

    found = [layer for layer in model.sublayers(include_self=True) if _fits(layer)]
    for layer in found:
        layer.forward = MethodType(forward, layer)
    try:
        yield
    finally:
        for layer in found:
            del layer.forward


def fold_head(model: nn.Layer, named: Sequence[str] = ()) -> nn.Layer:
    """Return a SegFormer with a folded head, which shares the other layers with the model; any
    other model as it is.

    Args:
        model: in evaluation mode.
        named: paths of layers that must remain.
    """
    joined = {f"{name}.proj" for name in LEVELS} | {"linear_fuse._conv"}
    return model if joined & {*named} or not _fits(model) else FoldedSegFormer(model)


class FoldedSegFormer(nn.Layer):
    """PaddleSeg's SegFormer in evaluation mode, with a folded head.

    Args:
        model: the SegFormer with the weights. The backbone, the last layer and hooks are shared.

    Shapes: images `[B, 3, H, W]` -> a list of one tensor of scores, `[B, K, H, W]`.
    """

    def __init__(self, model: nn.Layer) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.linear_pred = model.linear_pred
        self.align_corners = model.align_corners
        weights, bias = head_weights(model)
        for name, weight in zip(LEVELS, weights, strict=True):
            outputs, inputs, _, _ = weight.shape
            finest = name == LEVELS[-1]
            layer = nn.Conv2D(inputs, outputs, 1, bias_attr=None if finest else False)
            layer.weight.set_value(weight)
            if finest:
                layer.bias.set_value(bias)
            setattr(self, name, layer)
        self._forward_pre_hooks = model._forward_pre_hooks
        self._forward_post_hooks = model._forward_post_hooks
        self.eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.backbone(x)
        return [self._scores(x, features)]

    @paddle.jit.not_to_static  # the loop unrolls
    def _scores(self, x: Tensor, features: Sequence[Tensor]) -> Tensor:
        projections = [getattr(self, name) for name in LEVELS]
        total = _sum_of_levels(features, projections, self.align_corners)
        return _resized(self.linear_pred(F.relu(total)), x, self.align_corners)


def head_weights(model: nn.Layer) -> tuple[list[Tensor], Tensor]:
    """Return the weights of a SegFormer's head as four 1x1 convolutions.

    Args:
        model: the SegFormer; its maps have C4, C3, C2 and C1 channels, the head E.

    Returns:
        The weights, `[E, C, 1, 1]` each, in the order of `LEVELS`; and the sum of all biases,
        `[E]`. The BatchNorm is in both if it folds.
    """
    fuse = model.linear_fuse
    mixing = fuse._conv.weight.flatten(1)  # [E, 4E]
    linear = [getattr(model, name).proj for name in LEVELS]
    width = linear[0].bias.shape[0]
    shift = None
    if _norm_folds(fuse._batch_norm):
        gain, shift = fold_norms([fuse._batch_norm])  # [E] each
        mixing = mixing * gain.reshape([-1, 1])
    parts = [mixing.slice([1], [k * width], [(k + 1) * width]) for k in range(len(LEVELS))]
    weights = [
        paddle.matmul(part, layer.weight, transpose_y=True).unsqueeze([2, 3])
        for part, layer in zip(parts, linear, strict=True)
    ]
    biases = paddle.concat([layer.bias for layer in linear])  # [4E]
    # oneDNN's product of a matrix and a vector is wrong (Paddle 3.2.2).
    bias = (mixing * biases).sum(axis=1)
    return weights, bias if shift is None else bias + shift


def _norm_folds(norm: nn.BatchNorm2D) -> bool:
    return not norm.training or norm._use_global_stats is True


@paddle.jit.not_to_static  # the loops unroll
def _compute(model: nn.Layer, x: Tensor, features: Sequence[Tensor], convolve: Convolve) -> Tensor:
    """Compute the scores `[B, K, H, W]` of images `[B, 3, H, W]` from the maps of the backbone."""
    weights, bias = head_weights(model)
    biases = [None] * (len(LEVELS) - 1) + [bias]
    if not paddle.in_dynamic_mode():
        convolve = F.conv2d
    projections = [
        lambda z, weight=weight, bias=bias: convolve(z, weight, bias)
        for weight, bias in zip(weights, biases, strict=True)
    ]
    total = _sum_of_levels(features, projections, model.align_corners)
    if not _norm_folds(model.linear_fuse._batch_norm):
        total = model.linear_fuse._batch_norm(total)
    scores = model.linear_pred(model.dropout(F.relu(total)))
    return _resized(scores, x, model.align_corners)


def _sum_of_levels(
    features: Sequence[Tensor],
    projections: Sequence[Callable[[Tensor], Tensor]],
    align_corners: bool,
) -> Tensor:
    """Project four maps and add them at the size of the finest.

    Args:
        features: maps `[B, C, h, w]`, the finest first.
        projections: functions of the maps, in the order of `LEVELS`, -> `[B, E, h, w]`.
        align_corners: of the resizing.

    Returns:
        `[B, E, h1, w1]`.
    """
    finest, *coarser = features
    total = projections[-1](finest)
    for z, project in zip(coarser[::-1], projections[:-1], strict=True):
        total = total + _resized(project(z), finest, align_corners)
    return total


def _resized(z: Tensor, like: Tensor, align_corners: bool) -> Tensor:
    size = like.shape[2:] if has_known_size(like) else paddle.shape(like)[2:]
    return F.interpolate(z, size=size, mode="bilinear", align_corners=align_corners)


def _fits(model: nn.Layer) -> bool:
    """Whether a layer is a SegFormer that is unchanged since PaddleSeg made it, except for its
    weights."""
    # Without an import: PaddleSeg may be missing, and then no model is one of its classes.
    theirs, layers = (
        sys.modules.get(f"paddleseg.models.{name}") for name in ("segformer", "layers")
    )
    if theirs is None or layers is None:
        return False
    # Hooks may be there, because they run around the other `forward` too.
    if type(model) is not theirs.SegFormer or "forward" in vars(model):
        return False
    fuse = model.linear_fuse
    if not is_untouched(fuse, layers.ConvBNReLU):
        return False
    linear = [getattr(model, name) for name in LEVELS]
    norm, activation = fuse._batch_norm, fuse._relu
    return (
        all(is_untouched(layer, theirs.MLP) for layer in linear)
        and all(is_untouched(layer.proj, nn.Linear) for layer in linear)
        and all(layer.proj.bias is not None for layer in linear)
        and is_plain_conv(fuse._conv)
        and fuse._conv.bias is None
        and is_untouched(norm, nn.BatchNorm2D)
        and norm._use_global_stats is not False
        and norm.weight is not None
        and norm.bias is not None
        and is_untouched(activation, layers.Activation)
        and is_untouched(activation.act_func, nn.ReLU)
        and is_untouched(model.dropout, nn.Dropout2D)
    )
