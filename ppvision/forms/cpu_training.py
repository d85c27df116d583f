"""Faster training on a CPU: the layers of a model use other kernels while it trains.

The numbers are the same except for rounding; `docs/performance.md` has the gain of each change. We
chose all of them. On other devices nothing changes.
"""

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ppvision.forms.segformer import head_form
from ppvision.nn import ChannelLayerNorm, PaleAttention
from ppvision.nn.layers import is_depthwise, is_pointwise
from ppvision.nn.pale_attention import SeparableConv

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
_KEPT_BYTES = 2**30  # the largest value of both

SMALL_MAP = 64  # up to this many pixels a depthwise convolution is a matrix product


@contextmanager
def cpu_training(model: nn.Layer, *others: nn.Layer) -> Iterator[None]:
    """Make models train faster in the block if the current device is the CPU. Afterwards their
    layers are restored, also after an error.

    Args:
        model: the model that trains.
        *others: models that run meanwhile, such as its running average.

    Layers of other models do not change. Two changes apply to the whole process and change no
    number: transpositions (`contiguous_transpositions`) while any training is in such a block, and
    the allocator (`keep_freed_memory`) from then on.
    """
    with ExitStack() as stack:
        if paddle.get_device() == "cpu":
            keep_freed_memory()
            stack.enter_context(contiguous_transpositions())
            for each in (model, *others):
                stack.enter_context(quick_heads(each))  # before the classes of their layers change
                stack.enter_context(quick_convolutions(each))
                stack.enter_context(quick_norms(each))
                stack.enter_context(shared_projections(each))
        yield


_STRIDES = "FLAGS_use_stride_kernel"
_counting = threading.Lock()
_inside = 0  # how many blocks of `contiguous_transpositions` are open; the last one restores
_set_by_user: dict[str, bool] = {}


@contextmanager
def contiguous_transpositions() -> Iterator[None]:
    """Make transpositions write their result immediately, in the whole process.

    By default they are views. The next kernel that reads a view copies it first, element by element
    on a single core.
    """
    global _inside, _set_by_user
    with _counting:
        if not _inside:
            _set_by_user = paddle.get_flags(_STRIDES)
            paddle.set_flags({_STRIDES: False})
        _inside += 1
    try:
        yield
    finally:
        with _counting:
            _inside -= 1
            if not _inside:
                paddle.set_flags(_set_by_user)


def quick_convolutions(model: nn.Layer) -> AbstractContextManager[None]:
    """Give a model's `nn.Conv2D` layers faster biases, pointwise kernels, and depthwise 3x3 kernels
    on small maps, in eager mode."""
    return _as_quicker(model, nn.Conv2D, _QuickConv2D)


def quick_heads(model: nn.Layer) -> AbstractContextManager[None]:
    """Compute the heads of PaddleSeg's SegFormer in a model in fewer products."""
    return head_form(model, _pointwise)


def quick_norms(model: nn.Layer) -> AbstractContextManager[None]:
    """Compute a model's `ChannelLayerNorm` layers by the kernels of BatchNorm in eager mode. Their
    gradient takes a tenth of the time of LayerNorm's."""
    return _as_quicker(model, ChannelLayerNorm, _QuickChannelNorm)


def shared_projections(model: nn.Layer) -> AbstractContextManager[None]:
    """Compute the three depthwise convolutions for q, k and v of a model's `PaleAttention` layers
    as one, in eager mode.

    Paddle copies the map into columns for each convolution, and sums the gradient from columns.
    """
    return _as_quicker(model, PaleAttention, _QuickPaleAttention)


@contextmanager
def _as_quicker(model: nn.Layer, kind: type[nn.Layer], quicker: type[nn.Layer]) -> Iterator[None]:
    """Turn every layer of `kind` in a model, including the model itself, into one of `quicker`, a
    subclass.

    The object stays the same, with its weights, hooks and references to it.
    """
    changed = []
    for layer in model.sublayers(include_self=True):
        own = type(layer)
        if isinstance(layer, kind) and not isinstance(layer, quicker):
            changed.append((layer, own))
            _become(layer, quicker if own is kind else _mixed(own, quicker))
    try:
        yield
    finally:
        for layer, own in changed:
            _become(layer, own)


@functools.cache
def _mixed(own: type[nn.Layer], quicker: type[nn.Layer]) -> type[nn.Layer]:
    """Derive a class from another class, such as a quantised convolution, so that its `super()`
    finds `quicker` instead of Paddle's class."""
    # Paddle's tracing replaces `super()` by `super(self.__class__, self)`: in the class made here
    # this would be `own` again, an endless recursion.
    members = {"__module__": own.__module__, "__class__": property(lambda layer: own)}
    return type(own.__name__, (own, quicker), members)


def _become(layer: nn.Layer, kind: type[nn.Layer]) -> None:
    # Neither Paddle's `__setattr__` nor the property of a class from `_mixed`.
    vars(object)["__class__"].__set__(layer, kind)


class _QuickConv2D(nn.Conv2D):
    def forward(self, x: Tensor) -> Tensor:
        if paddle.in_dynamic_mode():
            return _convolve(self, x, nn.Conv2D.forward)
        return nn.Conv2D.forward(self, x)


class _QuickChannelNorm(ChannelLayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        if paddle.in_dynamic_mode():
            return _channel_norm(self, x, ChannelLayerNorm.forward)
        return ChannelLayerNorm.forward(self, x)


class _QuickPaleAttention(PaleAttention):
    def _projections(self, x: Tensor) -> tuple[Tensor, ...]:
        if paddle.in_dynamic_mode():
            return _project(self, x, PaleAttention._projections)
        return PaleAttention._projections(self, x)


@paddle.jit.not_to_static
def _convolve(
    layer: nn.Conv2D, x: Tensor, paddles: Callable[[nn.Conv2D, Tensor], Tensor]
) -> Tensor:
    """Compute `layer(x)`, by the layer's own `forward` if that is as fast."""
    plain = layer._data_format == "NCHW" and layer._padding_mode == "zeros"
    if not plain or x.ndim != 4 or x.shape[1] != layer._in_channels or 0 in x.shape:
        return paddles(layer, x)
    small = x.dtype == paddle.float32 and x.shape[2] * x.shape[3] <= SMALL_MAP
    # Read `layer.weight` once, because a quantised layer computes it at each access.
    if is_pointwise(layer):
        return _pointwise(x, layer.weight, layer.bias)
    if small and is_depthwise(layer):
        out = _depthwise(x, layer.weight)
    elif layer.bias is None:
        return paddles(layer, x)
    else:
        options = (layer._stride, layer._padding, layer._dilation, layer._groups)
        out = F.conv2d(x, layer.weight, None, *options)
    return out if layer.bias is None else _add_bias(out, layer.bias)


def _add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """Add a bias to `[B, C, H, W]`; over four axes the sum and its gradient take several times as
    long."""
    batch, channels = x.shape[:2]
    return (x.reshape([batch, channels, -1]) + bias.reshape([-1, 1])).reshape(x.shape)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `[B, C, H, W]` -> `[B, out, H, W]`. Paddle copies the map, and its gradient, into
    columns."""
    batch, channels, height, width = x.shape
    out = paddle.matmul(weight.reshape([-1, channels]), x.reshape([batch, channels, -1]))
    out = out.reshape([batch, -1, height, width])
    return out if bias is None else _add_bias(out, bias)


def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `[B, C, H, W]` -> the same, as a matrix product per channel."""
    batch, channels, height, width = x.shape
    pixels = height * width
    matrices = paddle.matmul(weight.reshape([channels, 9]), _taps(height, width))
    out = paddle.matmul(
        x.reshape([batch, channels, pixels]).transpose([1, 0, 2]),  # [C, B, HW]
        matrices.reshape([channels, pixels, pixels]),
    )
    return out.transpose([1, 0, 2]).reshape(x.shape)


@functools.cache
def _taps(height: int, width: int) -> Tensor:
    """Return `[9, HW*HW]`: entry (t, p*HW + q) is 1 if pixel p is tap t of a 3x3 kernel around
    q."""
    taps = np.zeros((3, 3, height, width, height, width), np.float32)
    for i, j in np.ndindex(3, 3):
        for y, x in np.ndindex(height, width):
            if 0 <= y + i - 1 < height and 0 <= x + j - 1 < width:
                taps[i, j, y + i - 1, x + j - 1, y, x] = 1
    return paddle.to_tensor(taps.reshape(9, -1))


@paddle.jit.not_to_static
def _channel_norm(
    layer: ChannelLayerNorm, x: Tensor, own: Callable[[ChannelLayerNorm, Tensor], Tensor]
) -> Tensor:
    """Compute `[B, C, H, W]` -> the same: BatchNorm with each pixel as a channel, then a BatchNorm
    without normalisation for weight and bias."""
    plain = x.ndim == 4 and x.shape[1:2] == layer._normalized_shape and 0 not in x.shape
    plain = plain and x.shape[1] > 1  # BatchNorm does not normalise a single element
    known = x.dtype in (paddle.float32, paddle.float64)  # types of BatchNorm on a CPU
    # If its weight needs no gradient, BatchNorm gives none for its bias either, without an error.
    trained = all(p is not None and not p.stop_gradient for p in (layer.weight, layer.bias))
    if not (plain and known and trained and paddle.is_grad_enabled()):
        return own(layer, x)
    batch, channels, height, width = x.shape
    pixels = batch * height * width
    tokens = x.transpose([0, 2, 3, 1]).reshape([1, pixels, channels])
    tokens = F.batch_norm(
        tokens, *_standard(pixels, x.dtype), training=True, epsilon=layer._epsilon
    )
    x = tokens.reshape([batch, height, width, channels]).transpose([0, 3, 1, 2])  # [B, C, H, W]
    standard = _standard(channels, x.dtype)
    return F.batch_norm(x, *standard, layer.weight, layer.bias, epsilon=0.0, use_global_stats=True)


def _standard(channels: int, dtype: paddle.dtype) -> tuple[Tensor, Tensor]:
    """Return mean 0 and variance 1 for BatchNorm, `[channels]` each."""
    return paddle.zeros([channels], dtype), paddle.ones([channels], dtype)


@paddle.jit.not_to_static
def _project(
    layer: PaleAttention, x: Tensor, own: Callable[[PaleAttention, Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Compute `[B, C, H, W]` -> query, key and value, each of the same shape."""
    parts = (layer.query, layer.key, layer.value)
    if not all(_is_separable(part) for part in parts):
        return own(layer, x)
    batch, channels, height, width = x.shape
    weight = paddle.stack([part[0].weight for part in parts], axis=1)  # [C, 3, 1, 3, 3]
    maps = F.conv2d(x, weight.reshape([-1, 1, 3, 3]), padding=1, groups=channels)  # [B, 3C, H, W]
    maps = maps.reshape([batch, channels, 3, height, width]).unbind(2)
    return tuple(part[2](part[1](m)) for part, m in zip(parts, maps, strict=True))


def _is_separable(part: nn.Layer) -> bool:
    """Whether `part` begins with a depthwise convolution that was not replaced (as by quantisation)
    and has no hooks."""
    if type(part) is not SeparableConv or type(part[0]) not in (nn.Conv2D, _QuickConv2D):
        return False
    layers = (part, part[0])
    hooked = any(each._forward_pre_hooks or each._forward_post_hooks for each in layers)
    return not hooked and is_depthwise(part[0]) and part[0].bias is None


def keep_freed_memory() -> None:
    """Let the allocator keep freed memory, so that the next tensor needs no new pages.

    This applies to the rest of the process. It has no effect if the user has set one of glibc's
    `MALLOC_` variables, or if there is no glibc.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
