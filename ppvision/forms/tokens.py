"""Pale blocks with the same arithmetic in another order: the form that OpenVINO runs fastest.

The trained block (`ppvision.models.pale_transformer`) is channel-first. Here everything except the
depthwise convolutions works on tokens `[B, HW, C]`. LayerNorm and the pointwise layers then need no
transposition, and the heads of each group are one batch of matrix products, which OpenVINO
(`ppvision.deploy.write.openvino`) recognises as attention. Nothing is padded: with masked padded
keys and cut padded queries, only the pixels of the image count. So the first groups of rows (or
columns) have one line more than the others.

Layers in integers round their input. Here the rounding is before the input is rearranged, and not
directly before the layer. OpenVINO then rounds at the end of the previous operator, moves bytes
instead of floats, and has a third of the operators to compile (`docs/notes/engines.md`). Rounding
per element gives the same result before and after.

`docs/performance.md` has the gain of this order. If a size is not known, the block keeps its own
form.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ppvision.forms.exchange import (
    has_known_size,
    is_plain_conv,
    is_plain_linear,
    is_untouched,
    use_form,
)
from ppvision.forms.pale import fits
from ppvision.models.pale_transformer import Mlp, PaleBlock
from ppvision.nn import ChannelLayerNorm, DropPath


def token_form(model: nn.Layer) -> AbstractContextManager[None]:
    """Put the Pale blocks of a model into the form for tokens during the block, and restore them.

    Args:
        model: in evaluation mode.

    A block with other arithmetic keeps its form: if its padding takes part in the attention, if its
    layers have quanters, if it is a subclass, or if it has hooks or other parts.
    """
    return use_form(model, _form)


def count_changed_blocks(model: nn.Layer) -> int:
    """Count the Pale blocks of a model that keep their form."""
    blocks = [layer for layer in model.sublayers() if isinstance(layer, PaleBlock)]
    return sum(not _fits(block) for block in blocks)


def _form(layer: nn.Layer) -> "TokenPaleBlock | None":
    return TokenPaleBlock(layer) if isinstance(layer, PaleBlock) and _fits(layer) else None


def _fits(block: PaleBlock) -> bool:
    """Whether a block is unchanged since `PaleBlock` made it, except for its weights."""
    return (
        is_untouched(block, PaleBlock)
        and is_plain_conv(block.position, rounding=True)
        and fits(block.attention, rounding=True)
        and is_plain_linear(block.attention.project, rounding=True)
        and all(is_untouched(norm, ChannelLayerNorm) for norm in (block.norm1, block.norm2))
        and is_untouched(block.drop_path, DropPath)
        and _is_mlp(block.mlp)
    )


def _is_mlp(mlp: nn.Layer) -> bool:
    if not is_untouched(mlp, Mlp) or len(mlp) != 3:
        return False
    first, activation, last = mlp
    gelu = is_untouched(activation, nn.GELU) and not activation._approximate
    linear = [is_plain_linear(layer, rounding=True) for layer in (first, last)]
    return gelu and all(linear)


class TokenPaleBlock(nn.Layer):
    """`PaleBlock` in evaluation mode, for a graph.

    Args:
        block: the block with the weights; it is used if a size of the input is not known.

    Shapes: `[B, C, H, W]` -> the same; any B, known H and W.
    """

    def __init__(self, block: PaleBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        if has_known_size(x):
            return self._forward(x)
        return self.block(x)

    @paddle.jit.not_to_static  # sizes are numbers here, and the loops unroll
    def _forward(self, x: Tensor) -> Tensor:
        block = self.block
        height, width = x.shape[2:]
        if _rounding(block.position) is None:
            tokens = to_tokens(x + block.position(x))
        else:
            tokens = to_tokens(x)
            rounded = to_map(_round(tokens, block.position), height, width)
            tokens = tokens + to_tokens(_convolve(rounded, block.position))
        tokens = tokens + self._attend(_layer_norm(tokens, block.norm1), height, width)
        normed = _round(_layer_norm(tokens, block.norm2), block.mlp[0])
        hidden = _round(F.gelu(_pointwise(normed, block.mlp[0])), block.mlp[2])
        return to_map(tokens + _pointwise(hidden, block.mlp[2]), height, width)

    def _attend(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Compute PS-Attention of tokens `[B, HW, C]` -> the same."""
        attention = self.block.attention
        channels = tokens.shape[2]
        heads, half = attention.num_heads // 2, channels // 2
        scale = (channels // attention.num_heads) ** -0.5
        projected, maps = [], {}  # maps by rounding: layers that share one use the same map
        for name in ("query", "key", "value"):
            depthwise, norm, pointwise = getattr(attention, name)
            if (rounding := _rounding(depthwise)) not in maps:
                maps[rounding] = to_map(_round(tokens, depthwise), height, width)
            x = _round(norm(_convolve(maps[rounding], depthwise)), pointwise)
            factor = scale if name == "query" else 1.0
            z = _pointwise(to_tokens(x), pointwise, factor)
            # Heads first, then their two halves: with halves of the channels, OpenVINO would not
            # scale the sums of integers and add the bias inside the product.
            z = z.reshape([-1, height, width, 2 * heads, half // heads])
            projected.append([_part(z, 3, 0, heads), _part(z, 3, heads, 2 * heads)])
        branches = []
        for rows, size, *parts in zip(
            (True, False), attention.pale_size, *projected, strict=True
        ):  # parts: [B, H, W, heads, d] each
            groups = zip(*(to_token_groups(z, size, rows) for z in parts), strict=True)
            # [B, s, G, W, heads, d] each
            found = [_attention(*group, rows, attention.project) for group in groups]
            branches.append(from_token_groups(found, rows).reshape([-1, height * width, half]))
        return _pointwise(paddle.concat(branches, axis=2), attention.project)


def to_tokens(x: Tensor) -> Tensor:
    """`[B, C, H, W]` -> `[B, HW, C]`."""
    _, channels, height, width = x.shape
    return x.transpose([0, 2, 3, 1]).reshape([-1, height * width, channels])


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """`[B, HW, C]` -> `[B, C, H, W]`."""
    return tokens.reshape([-1, height, width, tokens.shape[2]]).transpose([0, 3, 1, 2])


def to_token_groups(x: Tensor, pale_size: int, rows: bool) -> list[Tensor]:
    """Group lines that attend to each other.

    Args:
        x: `[B, H, W, heads, d]`.
        pale_size: largest number of lines per group.
        rows: whether lines are rows.

    Returns:
        `[B, s, G, W, heads, d]` for rows, `[B, H, s, G, heads, d]` for columns: G groups of s lines
        each. This is one tensor. If the number of lines is not a multiple of the number of groups,
        there are two: the groups with one more line, then the others.
    """
    axis = 1 if rows else 2
    length = x.shape[axis]
    count = -(-length // pale_size)
    size, more = divmod(length, count)
    shape = [-1, *x.shape[1:]]
    shape[axis : axis + 1] = [size, count]
    if not more:
        return [x.reshape(shape)]
    shared = _part(x, axis, 0, size * count).reshape(shape)
    last = _part(x, axis, size * count, length).unsqueeze(axis)
    longer = paddle.concat([_part(shared, axis + 1, 0, more), last], axis=axis)
    return [longer, _part(shared, axis + 1, more, count)]


def from_token_groups(sets: Sequence[Tensor], rows: bool) -> Tensor:
    """Put lines back in their places, `[B, H, W, heads, d]`: the inverse of `to_token_groups`."""
    axis = 1 if rows else 2
    shared = sets[0]
    if len(sets) == 2:
        longer, shorter = sets
        size = shorter.shape[axis]
        shared = paddle.concat([_part(longer, axis, 0, size), shorter], axis=axis + 1)
    shape = [-1, *shared.shape[1:]]
    shape[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
    x = shared.reshape(shape)
    if len(sets) == 1:
        return x
    return paddle.concat([x, _part(longer, axis, size, size + 1).squeeze(axis)], axis=axis)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, rows: bool, following: nn.Layer
) -> Tensor:
    """Compute attention among the tokens of each group, in the layout of `to_token_groups`, rounded
    as input of the layer `following`; the scale is in the query."""
    # Groups and heads to the front, then the two axes of a group's tokens, then d.
    order = [0, 2, 4, 1, 3, 5] if rows else [0, 3, 4, 1, 2, 5]
    back = [0, 3, 1, 4, 2, 5] if rows else [0, 3, 4, 1, 2, 5]
    parts = [z.transpose(order) for z in (query, key, value)]  # [B, G, heads, ., ., d]
    _, count, heads, *tokens, depth = parts[0].shape
    flat = [-1, heads, tokens[0] * tokens[1], depth]
    query, key, value = (z.reshape(flat) for z in parts)  # [B*G, heads, T, d]
    scores = paddle.matmul(query, key, transpose_y=True)  # [B*G, heads, T, T]
    out = _round(paddle.matmul(F.softmax(scores, axis=-1), value), following)
    return out.reshape([-1, count, heads, *tokens, depth]).transpose(back)


def _part(x: Tensor, axis: int, start: int, end: int) -> Tensor:
    return x.slice([axis], [start], [end])


def _layer_norm(tokens: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:], norm.weight, norm.bias, norm._epsilon)


def _rounding(layer: nn.Layer) -> nn.Layer | None:
    """Return the rounding of a layer's input; None for a layer in float."""
    return getattr(layer, "activation", None)


def _round(x: Tensor, layer: nn.Layer) -> Tensor:
    """Round the input of a layer like the layer; for a layer in float, return it unchanged."""
    rounding = _rounding(layer)
    return x if rounding is None else rounding(x)


def _convolve(x: Tensor, layer: nn.Conv2D) -> Tensor:
    """Apply a convolution to a map `[B, C, H, W]` that is rounded already."""
    how = layer._stride, layer._updated_padding, layer._dilation, layer._groups
    return F.conv2d(x, layer.weight, layer.bias, *how)


def _pointwise(tokens: Tensor, layer: nn.Conv2D, factor: float = 1.0) -> Tensor:
    """Apply a 1x1 convolution to tokens `[B, N, C]` that are rounded already; multiply the result
    by `factor`."""
    weight, bias = layer.weight.reshape(layer.weight.shape[:2]), layer.bias  # [C', C], [C']
    if factor != 1.0:
        weight, bias = weight * factor, bias * factor
    return paddle.matmul(tokens, weight, transpose_y=True) + bias
