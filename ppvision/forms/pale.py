"""PS-Attention with the same arithmetic in another order: the form in exported graphs.

The trained layer (`ppvision.nn.pale_attention`) is channel-first, pads maps to multiples of the
pale size and masks the padding. In a graph this form is faster on a CPU (`docs/performance.md` has
the measurement of each step). It is for known sizes:

- nothing is padded: with masked padded keys and cut padded queries, only the pixels of the image
  count. So the first groups of rows have one row more than the others;
- query, key and value are one depthwise convolution, with BatchNorm folded into it, and two grouped
  pointwise convolutions, one for the channels of the rows and one for those of the columns;
- 1 / sqrt(d) is in the query's weights;
- groups are token-last, `[G, T, 3, heads, d]`, in a form for which Paddle Inference uses one
  operator for the whole attention (`self_dp_attention`, for processors with AVX-512), which does
  not store T x T scores.

For other sizes see `ppvision.forms.any_size`. Weights keep their values and names. Operations of
the graph rearrange them, and Paddle Inference folds these operations once, when it loads the graph.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ppvision.forms.any_size import make_masks, masked_attention
from ppvision.forms.exchange import (
    KEPT,
    attend_within_groups,
    fold_norms,
    has_known_size,
    is_plain_conv,
    is_plain_linear,
    is_untouched,
    use_form,
)
from ppvision.nn import PaleAttention
from ppvision.nn.layers import is_depthwise
from ppvision.nn.pale_attention import SeparableConv, crop_to, pad_bottom_right, padding_to


def pale_form(model: nn.Layer) -> AbstractContextManager[None]:
    """Put `PaleAttention` of a model into the form for graphs during the block, and restore it.

    Args:
        model: in evaluation mode.

    A layer with other arithmetic keeps its form: if its padding takes part in the attention, if it
    is quantised and rounds activations, if it is a subclass, or if it has hooks or other parts.
    """
    return use_form(model, _form)


def _form(layer: nn.Layer) -> "GraphPaleAttention | None":
    replaced = isinstance(layer, PaleAttention) and fits(layer)
    return GraphPaleAttention(layer) if replaced else None


def fits(attention: PaleAttention, *, rounding: bool = False) -> bool:
    """Whether a layer is unchanged since `PaleAttention` made it, except for its weights, and with
    `rounding` except for the rounded inputs of its convolutions."""
    projections = (attention.query, attention.key, attention.value)
    return (
        is_untouched(attention, PaleAttention)
        and attention.mask_padding
        and all(_is_separable(projection, rounding) for projection in projections)
        and len({projection[1]._epsilon for projection in projections}) == 1
    )


def _is_separable(projection: nn.Layer, rounding: bool) -> bool:
    if not is_untouched(projection, SeparableConv) or len(projection) != 3:
        return False
    depthwise, norm, pointwise = projection
    folds = is_untouched(norm, nn.BatchNorm2D) and norm._use_global_stats is not False
    return (
        is_plain_conv(depthwise, rounding=rounding)
        and is_depthwise(depthwise)
        and depthwise.bias is None
        and folds
        and norm.weight is not None
        and norm.bias is not None
        and is_plain_linear(pointwise, rounding=rounding)
    )


class GraphPaleAttention(nn.Layer):
    """`PaleAttention` in evaluation mode, for a graph.

    Args:
        attention: the layer with the weights.

    Shapes: `[B, C, H, W]` -> the same.
    """

    def __init__(self, attention: PaleAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        if has_known_size(x):
            return self._attend(x)
        return self._attend_at_any_size(x)

    @paddle.jit.not_to_static  # sizes are numbers here, and the loops unroll
    def _attend(self, x: Tensor) -> Tensor:
        heads = self.attention.num_heads // 2
        branches = []
        for rows, qkv in zip((True, False), self._projected(x), strict=True):
            size = self.attention.pale_size[0 if rows else 1]
            sets = [grouped_attention(group, heads) for group in to_groups(qkv, size, rows)]
            branches.append(from_groups(sets, x.shape[2], x.shape[3], rows))  # [B, C/2, H, W]
        return self.attention.project(paddle.concat(branches, axis=1))  # [B, C, H, W]

    @paddle.jit.not_to_static
    def _attend_at_any_size(self, x: Tensor) -> Tensor:
        """Compute with sizes that are read from the map; then the map is padded and masked."""
        height, width = (n if n > 0 else paddle.shape(x)[2 + i] for i, n in enumerate(x.shape[2:]))
        rows, columns = self.attention.pale_size
        pads = padding_to(height, rows), padding_to(width, columns)
        padded_height, padded_width = height + pads[0], width + pads[1]
        real = pad_bottom_right(paddle.ones_like(x[:, :1]), *pads)
        heads = self.attention.num_heads // 2
        mask = make_masks(real, heads)
        of_rows, of_columns = self._projected(pad_bottom_right(x, *pads))
        padded = padded_height, padded_width
        branches = [
            masked_attention(of_rows, mask, heads, rows, True, *padded),
            masked_attention(of_columns, mask, heads, columns, False, *padded),
        ]
        out = crop_to(paddle.concat(branches, axis=1), *padded, height, width)
        return self.attention.project(out)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return q, k and v, `[B, 3C/2, H, W]`: for the half that attends in rows, and for the
        other half."""
        channels = x.shape[1]
        parts = [getattr(self.attention, name) for name in ("query", "key", "value")]
        convolutions, norms, pointwise = zip(*parts, strict=True)
        gain, shift = fold_norms(norms)  # [3C] each
        tripled = F.conv2d(
            paddle.concat([x] * 3, axis=1),  # [B, 3C, H, W]
            paddle.concat([layer.weight for layer in convolutions]) * gain.reshape([-1, 1, 1, 1]),
            shift,
            padding=1,
            groups=3 * channels,
        )
        scale = (channels // self.attention.num_heads) ** -0.5
        weights = _halves([layer.weight for layer in pointwise], scale)  # [3C/2, C, 1, 1] each
        biases = _halves([layer.bias for layer in pointwise], scale)  # [3C/2] each
        return tuple(
            F.conv2d(tripled, weight, bias, groups=3)
            for weight, bias in zip(weights, biases, strict=True)
        )


def _halves(qkv: Sequence[Tensor], scale: float) -> list[Tensor]:
    """Split `[C, ...]` of q (times the scale), k and v: return the halves for rows together, and
    those for columns, `[3C/2, ...]` each."""
    query, key, value = qkv
    channels, *rest = query.shape
    split = paddle.stack([query * scale, key, value]).reshape([3, 2, channels // 2, *rest])
    return [split[:, place].reshape([3 * channels // 2, *rest]) for place in (0, 1)]


def to_groups(qkv: Tensor, pale_size: int, rows: bool) -> list[Tensor]:
    """Return the tokens of each group of interlaced rows or columns.

    Args:
        qkv: `[B, 3D, H, W]`.
        pale_size: largest number of rows (columns) per group.
        rows: whether rows are grouped.

    Returns:
        `[B, G, s, O, 3D]`, where O is the number of pixels of a line: G groups of s lines each.
        This is one tensor. If the number of lines is not a multiple of the number of groups, there
        are two: the groups with one more line, then the others.
    """
    _, channels, height, width = qkv.shape
    length, other = (height, width) if rows else (width, height)
    count = -(-length // pale_size)
    size, more = divmod(length, count)
    if not more:
        if rows:
            split = qkv.reshape([-1, channels, size, count, other])  # [B, 3D, s, G, O]
            return [split.transpose([0, 3, 2, 4, 1])]
        split = qkv.reshape([-1, channels, other, size, count])  # [B, 3D, O, s, G]
        return [split.transpose([0, 4, 3, 2, 1])]
    lines = qkv.transpose([0, 2, 3, 1] if rows else [0, 3, 2, 1])  # [B, L, O, 3D]
    shared = lines[:, : size * count].reshape([-1, size, count, other, channels])
    last = lines[:, size * count :].unsqueeze(1)  # [B, 1, more, O, 3D]
    longer = paddle.concat([shared[:, :, :more], last], axis=1)  # [B, s + 1, more, O, 3D]
    return [part.transpose([0, 2, 1, 3, 4]) for part in (longer, shared[:, :, more:])]


def grouped_attention(groups: Tensor, num_heads: int) -> Tensor:
    """Compute attention among the tokens of each group; the scale is in the query.

    Shapes: `[B, G, s, O, 3D]`, channels of q, k and v one after another -> `[B, G, s, O, D]`.
    """
    _, count, size, other, channels = groups.shape
    depth = channels // 3 // num_heads
    tokens = groups.reshape([-1, size * other, 3, num_heads, depth])  # [B*G, T, 3, heads, d]
    return attend_within_groups(tokens, [-1, count, size, other, channels // 3])


def from_groups(sets: Sequence[Tensor], height: int, width: int, rows: bool) -> Tensor:
    """Put lines back in their places: the inverse of `to_groups`, for any number of channels.

    Returns:
        `[B, D, H, W]`.
    """
    shared = sets[0]
    if len(sets) == 2:
        longer, shorter = sets
        shared = paddle.concat([longer[:, :, :-1], shorter], axis=1)  # [B, G, s, O, D]
    count, size, other, channels = shared.shape[1:]
    order = [0, 4, 2, 1, 3] if rows else [0, 4, 3, 2, 1]
    x = shared.transpose(order)  # [B, D, s, G, O] or [B, D, O, s, G]
    if len(sets) == 1:
        return x.reshape([KEPT, channels, height, width])
    last = longer[:, :, -1].transpose([0, 3, 1, 2] if rows else [0, 3, 2, 1])
    if rows:
        return paddle.concat([x.reshape([KEPT, channels, size * count, other]), last], axis=2)
    return paddle.concat([x.reshape([KEPT, channels, other, size * count]), last], axis=3)
