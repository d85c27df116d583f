"""Quicker training on a CPU: other kernels for the layers of a model while it trains.

The numbers stay the same but for rounding; `docs/performance.md` has what each brings. All are our
choice. On other devices nothing changes.
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

from ppvision.nn import ChannelLayerNorm, PaleAttention
from ppvision.nn.layers import is_depthwise, is_pointwise
from ppvision.nn.pale_attention import SeparableConv

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 2**30  # the most that either takes

SMALL_MAP = 64  # pixels up to which a depthwise convolution is a product of matrices


@contextmanager
def cpu_training(model: nn.Layer, *others: nn.Layer) -> Iterator[None]:
    """Models train faster inside, where the current device is the CPU; afterwards their layers are
    as they were, whatever was raised.

    Args:
        model: the one that trains.
        *others: models that run meanwhile, such as its running average.

    Layers of other models stay as they are. Two changes are the whole process's, and change no
    number: transpositions (`contiguous_transpositions`) as long as any training is inside, and the
    allocator (`keep_freed_memory`) from then on.
    """
    with ExitStack() as stack:
        if paddle.get_device() == "cpu":
            keep_freed_memory()
            stack.enter_context(contiguous_transpositions())
            for each in (model, *others):
                stack.enter_context(quick_convolutions(each))
                stack.enter_context(quick_norms(each))
                stack.enter_context(shared_projections(each))
        yield


_STRIDES = "FLAGS_use_stride_kernel"
_counting = threading.Lock()
_inside = 0  # how many times `contiguous_transpositions` is entered; the last one sets back
_set_by_user: dict[str, bool] = {}


@contextmanager
def contiguous_transpositions() -> Iterator[None]:
    """Transpositions write their result at once, in the whole process.

    By default they are views, and whichever kernel reads one first copies it, element by element
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
    """A model's `nn.Conv2D` layers in eager mode with faster biases, pointwise kernels, and
    depthwise 3x3 ones on small maps."""
    return _as_quicker(model, nn.Conv2D, _QuickConv2D)


def quick_norms(model: nn.Layer) -> AbstractContextManager[None]:
    """A model's `ChannelLayerNorm` layers in eager mode by the kernels of BatchNorm, whose gradient
    takes a tenth of the time of LayerNorm's."""
    return _as_quicker(model, ChannelLayerNorm, _QuickChannelNorm)


def shared_projections(model: nn.Layer) -> AbstractContextManager[None]:
    """A model's `PaleAttention` layers in eager mode with the three depthwise convolutions of q, k
    and v as one.

    Paddle copies the map into columns for each convolution, and adds the gradient up from columns.
    """
    return _as_quicker(model, PaleAttention, _QuickPaleAttention)


@contextmanager
def _as_quicker(model: nn.Layer, kind: type[nn.Layer], quicker: type[nn.Layer]) -> Iterator[None]:
    """Every layer of `kind` in a model, itself included, becomes one of `quicker`, a subclass.

    The object stays, with its weights, hooks and whoever refers to it.
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
    """A class of our own or of others, such as a quantised convolution, whose `super()` leads to
    `quicker` instead of Paddle's."""
    # Paddle's tracing takes `super()` for `super(self.__class__, self)`: that of the class made
    # here would be `own` again, and so without end.
    members = {"__module__": own.__module__, "__class__": property(lambda layer: own)}
    return type(own.__name__, (own, quicker), members)


def _become(layer: nn.Layer, kind: type[nn.Layer]) -> None:
    vars(object)["__class__"].__set__(layer, kind)  # not Paddle's `__setattr__`, nor that property


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
    """What `layer` gives for `x`, by its own `forward` wherever that is as fast."""
    plain = layer._data_format == "NCHW" and layer._padding_mode == "zeros"
    if not plain or x.ndim != 4 or x.shape[1] != layer._in_channels or 0 in x.shape:
        return paddles(layer, x)
    small = x.dtype == paddle.float32 and x.shape[2] * x.shape[3] <= SMALL_MAP
    # `layer.weight` is asked for once: a quantised layer computes it then.
    if is_pointwise(layer):
        out = _pointwise(x, layer.weight)
    elif small and is_depthwise(layer):
        out = _depthwise(x, layer.weight)
    elif layer.bias is None:
        return paddles(layer, x)
    else:
        options = (layer._stride, layer._padding, layer._dilation, layer._groups)
        out = F.conv2d(x, layer.weight, None, *options)
    return out if layer.bias is None else _add_bias(out, layer.bias)


def _add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """`[B, C, H, W]`; over its four axes the sum and its gradient take several times as long."""
    batch, channels = x.shape[:2]
    return (x.reshape([batch, channels, -1]) + bias.reshape([-1, 1])).reshape(x.shape)


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """`[B, C, H, W]` -> `[B, out, H, W]`. Paddle copies the map, and its gradient, into columns."""
    batch, channels, height, width = x.shape
    out = paddle.matmul(weight.reshape([-1, channels]), x.reshape([batch, channels, -1]))
    return out.reshape([batch, -1, height, width])


def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """`[B, C, H, W]` -> the same: a product of matrices for each channel."""
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
    """`[9, HW*HW]`: entry (t, p*HW + q) is 1 where pixel p is tap t of a 3x3 kernel around q."""
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
    """`[B, C, H, W]` -> the same: BatchNorm with each pixel as a channel, then one that norms
    nothing, for weight and bias."""
    plain = x.ndim == 4 and x.shape[1:2] == layer._normalized_shape and 0 not in x.shape
    plain = plain and x.shape[1] > 1  # BatchNorm lets a single element through as it is
    known = x.dtype in (paddle.float32, paddle.float64)  # to BatchNorm on a CPU
    # BatchNorm has no gradient for its bias, nor an error, where its weight needs none.
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
    """Mean 0 and variance 1 for BatchNorm, `[channels]` each."""
    return paddle.zeros([channels], dtype), paddle.ones([channels], dtype)


@paddle.jit.not_to_static
def _project(
    layer: PaleAttention, x: Tensor, own: Callable[[PaleAttention, Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """`[B, C, H, W]` -> query, key and value, each the same."""
    parts = (layer.query, layer.key, layer.value)
    if not all(_is_separable(part) for part in parts):
        return own(layer, x)
    batch, channels, height, width = x.shape
    weight = paddle.stack([part[0].weight for part in parts], axis=1)  # [C, 3, 1, 3, 3]
    maps = F.conv2d(x, weight.reshape([-1, 1, 3, 3]), padding=1, groups=channels)  # [B, 3C, H, W]
    maps = maps.reshape([batch, channels, 3, height, width]).unbind(2)
    return tuple(part[2](part[1](m)) for part, m in zip(parts, maps, strict=True))


def _is_separable(part: nn.Layer) -> bool:
    """Whether `part` begins with a depthwise convolution that nobody replaced, as quantisation
    does, or hooked."""
    if type(part) is not SeparableConv or type(part[0]) not in (nn.Conv2D, _QuickConv2D):
        return False
    layers = (part, part[0])
    hooked = any(each._forward_pre_hooks or each._forward_post_hooks for each in layers)
    return not hooked and is_depthwise(part[0]) and part[0].bias is None


def keep_freed_memory() -> None:
    """Let the allocator keep what is freed: the next tensor then needs no new pages.

    Holds for the rest of the process. Does nothing where the user has set one of glibc's `MALLOC_`
    variables, or where there is no glibc.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
