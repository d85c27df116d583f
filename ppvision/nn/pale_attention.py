"""PS-Attention: self-attention inside pale-shaped regions, in its parallel form.

Source: Wu, Wu, Tan, Guo, "Pale Transformer: A General Vision Transformer Backbone with Pale-Shaped
Attention", AAAI 2022, arXiv 2112.14000. The paper states the definition of a pale, the parallel
form and the separable convolutions for query, key and value. Its published sizes and costs imply
equally spaced rows, reading all channels before the halves are split, and padding on both axes. We
chose to mask the padded keys.

Everything is channel-first. Grouping rows then moves whole rows in memory, heads are a reshape of
the channels without cost, and each product transposes an operand inside its matrix multiplication.
So a block needs no six-dimensional transposition.
"""

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ppvision.arguments import check_flag
from ppvision.errors import InputError, shorten

# Added to the score of a padded key. exp(-1e4) is zero in float32, and float16 can represent the
# number, so the same constant works with AMP.
MASKED_SCORE = -1e4

_HEIGHT, _WIDTH = 2, 3


def _grouped_axis(axis: int) -> int:
    """Normalise `axis` of a `[B, C, H, W]` tensor to 2 (height) or 3 (width)."""
    if axis in (_HEIGHT, _HEIGHT - 4):
        return _HEIGHT
    if axis in (_WIDTH, _WIDTH - 4):
        return _WIDTH
    raise InputError(
        f"axis: expected 2 or -2 (height: groups of rows) or 3 or -1 (width: groups of columns) of "
        f"a [B, C, H, W] tensor, got {shorten(axis)}."
    )


def _checked_pale_size(pale_size: int) -> int:
    if isinstance(pale_size, bool) or not isinstance(pale_size, int) or pale_size < 1:
        raise InputError(
            f"pale_size: expected a whole number of at least 1, got {shorten(pale_size)}. "
            "The paper uses 7 rows and 7 columns."
        )
    return pale_size


def padding_to(length: int | Tensor, multiple: int) -> int | Tensor:
    """Return the difference of `length` to the next multiple; the arithmetic also works for traced
    tensors."""
    # Only whole-number division, which OpenVINO folds correctly.
    return (length + multiple - 1) // multiple * multiple - length


# Helpers that test whether a size is a number or a tensor (an input size of an exported graph) stay
# plain Python: to_static would make both cases branches of the graph, which differ in type.
@paddle.jit.not_to_static
def pad_bottom_right(x: Tensor, pad_height: int | Tensor, pad_width: int | Tensor) -> Tensor:
    """Zero-pad `[B, C, H, W]` at the bottom and on the right."""
    if isinstance(pad_height, int) and isinstance(pad_width, int):
        if pad_height == 0 and pad_width == 0:
            return x
        return F.pad(x, [0, pad_width, 0, pad_height])
    return F.pad(x, _int_vector([0, pad_width, 0, pad_height]))


@paddle.jit.not_to_static
def _int_vector(items: list[int | Tensor]) -> Tensor:
    parts = [
        paddle.full([1], i, "int32") if isinstance(i, int) else i.astype("int32") for i in items
    ]
    return paddle.concat([part.reshape([1]) for part in parts])


def pale_partition(x: Tensor, pale_size: int, axis: int) -> Tensor:
    """Gather the rows (or columns) of each pale: every `N`-th row, `N = ceil(length / pale_size)`.

    Row group `g` holds rows `g, g + N, g + 2N, ...`: interlaced rows, equally spaced (a group of
    contiguous rows would be a stripe of CSWin). A length that `pale_size` does not divide is padded
    with zeros at its end.

    Args:
        x: features `[B, C, H, W]`.
        pale_size: rows (or columns) per group, at least 1.
        axis: 2 or -2 groups rows, 3 or -1 groups columns.

    Returns:
        Groups `[B * N, C, tokens]`. For rows, `tokens` is `pale_size * W`, row by row. For
        columns, it is `H * pale_size`, line by line of the height.

    Raises:
        ValueError: `pale_size` below 1, another axis, or `x` without four axes.
    """
    axis = _grouped_axis(axis)
    pale_size = _checked_pale_size(pale_size)
    if x.ndim != 4:
        raise InputError(f"x: expected a [B, C, H, W] tensor, got {x.ndim} axes: {list(x.shape)}.")
    pad = padding_to(x.shape[axis], pale_size)
    x = pad_bottom_right(x, pad, 0) if axis == _HEIGHT else pad_bottom_right(x, 0, pad)
    return _to_groups(x, pale_size, axis)


def _to_groups(x: Tensor, pale_size: int, axis: int) -> Tensor:
    """`pale_partition` of a length that `pale_size` divides."""
    channels, height, width = x.shape[1], x.shape[2], x.shape[3]
    if axis == _HEIGHT:
        groups = height // pale_size
        x = x.reshape([-1, channels, pale_size, groups, width])  # [B, C, s, N, W]
        x = x.transpose([0, 3, 1, 2, 4])  # [B, N, C, s, W]
        return x.reshape([-1, channels, pale_size * width])  # [B*N, C, s*W]
    groups = width // pale_size
    x = x.reshape([-1, channels, height * pale_size, groups])  # [B, C, H*s, N]
    x = x.transpose([0, 3, 1, 2])  # [B, N, C, H*s]
    return x.reshape([-1, channels, height * pale_size])  # [B*N, C, H*s]


def pale_merge(groups: Tensor, pale_size: int, axis: int, height: int, width: int) -> Tensor:
    """Put groups back in their places: the exact inverse of `pale_partition`.

    Args:
        groups: `[B * N, C, tokens]` as `pale_partition` returns them.
        pale_size: as given to `pale_partition`.
        axis: as given to `pale_partition`.
        height: H of the features that were partitioned (before any padding).
        width: W of these features.

    Returns:
        Features `[B, C, H, W]`, without the padding of `pale_partition`.

    Raises:
        ValueError: `pale_size` below 1, another axis, or groups that cannot come from an H x W map.
    """
    axis = _grouped_axis(axis)
    pale_size = _checked_pale_size(pale_size)
    _check_groups(groups, pale_size, axis, height, width)
    padded_height, padded_width = height, width
    if axis == _HEIGHT:
        padded_height = height + padding_to(height, pale_size)
    else:
        padded_width = width + padding_to(width, pale_size)
    x = _from_groups(groups, pale_size, axis, padded_height, padded_width)
    return crop_to(x, padded_height, padded_width, height, width)


def _from_groups(groups: Tensor, pale_size: int, axis: int, height: int, width: int) -> Tensor:
    """`pale_merge` of a length that `pale_size` divides."""
    channels = groups.shape[1]
    if axis == _HEIGHT:
        x = groups.reshape([-1, height // pale_size, channels, pale_size, width])  # [B, N, C, s, W]
        x = x.transpose([0, 2, 3, 1, 4])  # [B, C, s, N, W]
    else:
        x = groups.reshape([-1, width // pale_size, channels, height * pale_size])  # [B, N, C, H*s]
        x = x.transpose([0, 2, 3, 1])  # [B, C, H*s, N]
    return x.reshape([-1, channels, height, width])  # [B, C, H, W]


@paddle.jit.not_to_static
def _check_groups(groups: Tensor, pale_size: int, axis: int, height: int, width: int) -> None:
    if not (isinstance(height, int) and isinstance(width, int)):
        return  # sizes are known only when the exported graph runs
    length, other = (height, width) if axis == _HEIGHT else (width, height)
    count = -(-length // pale_size)
    rows, _, tokens = groups.shape
    if tokens != pale_size * other or (rows >= 0 and rows % count):
        raise InputError(
            f"groups: expected [B * {count}, C, {pale_size * other}] for height={height}, "
            f"width={width}, pale_size={pale_size}, axis={axis}, got {list(groups.shape)}. "
            "Pass the size, pale_size and axis that pale_partition was given."
        )


@paddle.jit.not_to_static
def crop_to(
    x: Tensor,
    padded_height: int | Tensor,
    padded_width: int | Tensor,
    height: int | Tensor,
    width: int | Tensor,
) -> Tensor:
    """Cut `[B, C, padded_height, padded_width]` to `[B, C, height, width]`."""
    # One axis at a time: Paddle 3.2 infers a wrong size for a slice that ends at a number on one
    # axis and at a tensor on another.
    if not (isinstance(height, int) and height == padded_height):
        x = x[:, :, :height]
    if not (isinstance(width, int) and width == padded_width):
        x = x[:, :, :, :width]
    return x


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    bias: Tensor | None = None,
    fused: bool = False,
) -> Tensor:
    """Multi-head attention among the tokens of each group.

    Args:
        query, key, value: `[G, C, T]`, channel-first; C is split into `num_heads` heads.
        num_heads: heads that share the channels.
        bias: `[G, 1, 1, T]` added to the scores of each key, or None.
        fused: use Paddle's fused `scaled_dot_product_attention` instead of two matrix products.

    Returns:
        `[G, C, T]`. The scale is 1 / sqrt(C / num_heads), as in the paper.
    """
    channels = query.shape[1]
    head_dim = channels // num_heads
    tokens = query.shape[2]
    split = [-1, num_heads, head_dim, tokens]
    query, key, value = query.reshape(split), key.reshape(split), value.reshape(split)
    if fused:
        last = [0, 3, 1, 2]  # [G, heads, d, T] -> [G, T, heads, d]
        query, key, value = query.transpose(last), key.transpose(last), value.transpose(last)
        mask = (
            None if bias is None else bias.expand([-1, num_heads, tokens, -1]).astype(query.dtype)
        )
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out = out.transpose([0, 2, 3, 1])  # [G, heads, d, T]
    else:
        # Scale the query: d * T numbers instead of the T * T scores.
        scores = paddle.matmul(query * head_dim**-0.5, key, transpose_x=True)  # [G, heads, T, T]
        if bias is not None:
            scores = scores + bias
        weights = F.softmax(scores, axis=-1)
        out = paddle.matmul(value, weights, transpose_y=True)  # [G, heads, d, T]
    return out.reshape([-1, channels, tokens])  # [G, C, T]


def device_has_fused_attention() -> bool:
    """Whether Paddle's fused attention is faster here: on CUDA devices (flash attention)."""
    return paddle.is_compiled_with_cuda() and paddle.get_device().startswith("gpu")


class SeparableConv(nn.Sequential):
    """Depthwise 3x3 (no bias), BatchNorm, pointwise: the projection of q, k and v.

    Shapes: `[B, C, H, W]` -> the same. Source: the paper, which follows CvT here.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2D(channels, channels, 3, padding=1, groups=channels, bias_attr=False),
            nn.BatchNorm2D(channels),
            nn.Conv2D(channels, channels, 1),
        )


class AttentionProducts(nn.Layer):
    """`grouped_attention` as a layer without parameters.

    Tools that count or profile the layers of a network can then see it.

    Args:
        num_heads: see `grouped_attention`.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None = None,
        fused: bool = False,
    ) -> Tensor:
        return grouped_attention(query, key, value, self.num_heads, bias, fused)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


class PaleAttention(nn.Layer):
    """PS-Attention in its parallel form.

    Half of the channels attend inside groups of interlaced rows, the other half inside groups of
    interlaced columns; the two results are concatenated and projected.

    Args:
        channels: C; each half is split among `num_heads // 2` heads.
        num_heads: heads of both branches together, an even number.
        pale_size: rows and columns of a pale, one number or `(rows, columns)`. Default 7 (derived
            from the paper's costs).
        mask_padding: give padded positions no attention. Default True (we chose this). It has no
            effect if H and W are multiples of the pale size.
        fused: True, False, or None (default: fused attention on CUDA devices, plain matrix products
            elsewhere). Both give the same numbers.

    Shapes: `[B, C, H, W]` -> the same, for any H and W; features are zero-padded to multiples of
    the pale size before q, k and v, and cut before the output projection.

    Raises:
        ValueError: channels that the heads do not divide, an odd number of heads, a pale size
            below 1.
        TypeError: `fused` is another value.

    Every pointwise layer is a 1x1 convolution, for oneDNN. pale_tiny at 224, batch 1, 2 threads of
    an AMD EPYC with 2 cores, in Paddle Inference: 73 ms, against 99 with Linear, 85 with Linear and
    `matmul_add_act_fuse_pass` (which `Predictor` deletes), 101 and 121 without oneDNN
    (`python benchmark/pointwise_layers.py`, `benchmark/results/pointwise_layers.csv`).
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        pale_size: int | tuple[int, int] = 7,
        *,
        mask_padding: bool = True,
        fused: bool | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 2 or num_heads % 2:
            raise InputError(
                "num_heads: expected an even number (half for rows, half for columns), "
                f"got {num_heads}."
            )
        if channels % num_heads:
            raise InputError(
                f"channels: expected a multiple of num_heads={num_heads}, got {channels}."
            )
        sizes = pale_size if isinstance(pale_size, (tuple, list)) else (pale_size, pale_size)
        if len(sizes) != 2:
            raise InputError(f"pale_size: expected one number or two, got {shorten(pale_size)}.")
        rows, columns = sizes
        self.pale_size = (_checked_pale_size(rows), _checked_pale_size(columns))
        self.num_heads = num_heads
        self.mask_padding = mask_padding
        self.fused = check_flag(fused, "fused", optional=True)
        self.query = SeparableConv(channels)
        self.key = SeparableConv(channels)
        self.value = SeparableConv(channels)
        self.products = AttentionProducts(num_heads // 2)  # the heads of one branch
        self.project = nn.Conv2D(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2], x.shape[3]
        rows, columns = self.pale_size
        pad_height, pad_width = padding_to(height, rows), padding_to(width, columns)
        padded_height, padded_width = height + pad_height, width + pad_width

        real = None
        padded = not (isinstance(pad_height, int) and pad_height == 0) or not (
            isinstance(pad_width, int) and pad_width == 0
        )
        if padded:
            if self.mask_padding:
                real = pad_bottom_right(paddle.ones_like(x[:, :1]), pad_height, pad_width)
            x = pad_bottom_right(x, pad_height, pad_width)

        projected = self._projections(x)  # [B, C, H', W'] each
        half = projected[0].shape[1] // 2
        # Not sliced twice: the gradient would then be the sum of two maps padded with zeros.
        halves = zip(  # noqa: B905
            *(t.reshape([-1, 2, half, padded_height, padded_width]).unbind(1) for t in projected)
        )  # [B, C/2, H', W'] of q, k and v: first the rows', then the columns'
        fused = device_has_fused_attention() if self.fused is None else self.fused

        branches = []
        for axis, size, parts in zip((_HEIGHT, _WIDTH), (rows, columns), halves):  # noqa: B905
            query, key, value = [_to_groups(t, size, axis) for t in parts]  # [B*N, C/2, T] each
            bias = None
            if real is not None:
                bias = (1.0 - _to_groups(real, size, axis)) * MASKED_SCORE  # [B*N, 1, T]
                bias = bias.unsqueeze(1)  # [B*N, 1, 1, T]
            out = self.products(query, key, value, bias, fused)  # [B*N, C/2, T]
            branches.append(_from_groups(out, size, axis, padded_height, padded_width))
        out = paddle.concat(branches, axis=1)  # [B, C, H', W']
        return self.project(crop_to(out, padded_height, padded_width, height, width))

    def _projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.query(x), self.key(x), self.value(x)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, pale_size={self.pale_size}"
