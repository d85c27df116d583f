"""One branch of PS-Attention, for graphs that read height or width from their input.

In such graphs the map is padded to multiples of the pale size, and padded keys are masked, as in
the trained layer (`ppvision.nn.pale_attention`). The trained layer adds the mask to the scores,
between the two products. Paddle Inference would then not use one operator for the attention
(`self_dp_attention`, for processors with AVX-512). It would store the T x T scores, which take most
of the time and memory for a large image.

So the mask is part of the product: each head has one more channel, in which a query is 1, a key is
0, or `MASKED_SCORE` in the padding, and a value is 0. This adds the mask to each score.
"""

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ppvision.forms.exchange import attend_within_groups
from ppvision.nn.pale_attention import MASKED_SCORE


def make_masks(real: Tensor, heads: int) -> Tensor:
    """Make the additional channel of each head.

    Args:
        real: `[B, 1, H, W]`, 1 inside the image and 0 in its padding.
        heads: heads of a branch.

    Returns:
        `[B, 3 heads, H, W]`: for queries, keys and values.
    """
    # A convolution, because oneDNN multiplies and adds a tensor of few channels many times slower.
    weight, bias = np.zeros([3, heads], np.float32), np.zeros([3, heads], np.float32)
    bias[0] = 1.0
    weight[1], bias[1] = -MASKED_SCORE, MASKED_SCORE
    weight, bias = paddle.to_tensor(weight), paddle.to_tensor(bias)
    return F.conv2d(real, weight.reshape([-1, 1, 1, 1]), bias.reshape([-1]))


def masked_attention(
    qkv: Tensor,
    mask: Tensor,
    heads: int,
    size: int,
    rows: bool,
    height: int | Tensor,
    width: int | Tensor,
) -> Tensor:
    """Compute attention in groups of interlaced rows or columns.

    Args:
        qkv: `[B, 3D, H, W]`, query (times the scale), key and value one after another.
        mask: `[B, 3 heads, H, W]`, from `make_masks`.
        heads: heads that share the D channels.
        size: rows (columns) per group.
        rows: whether rows are grouped.
        height, width: H and W; the grouped one is a multiple of `size`.

    Returns:
        `[B, D, H, W]`.
    """
    length, other = (height, width) if rows else (width, height)
    count = length // size
    split = [size, count, other] if rows else [other, size, count]
    order = [0, 3, 2, 4, 1] if rows else [0, 4, 3, 2, 1]  # to [B, G, s, O, .], O a line's pixels
    back = [0, 4, 2, 1, 3] if rows else [0, 4, 3, 2, 1]
    qkv, mask = (x.reshape([-1, x.shape[1], *split]).transpose(order) for x in (qkv, mask))
    out = _attend(qkv, mask, heads, count, size, other)  # [B, G, s, O, D]
    return out.transpose(back).reshape([-1, out.shape[4], height, width])


def _attend(
    qkv: Tensor, mask: Tensor, heads: int, count: int | Tensor, size: int, other: int | Tensor
) -> Tensor:
    """`[B, G, s, O, 3D]` and `[B, G, s, O, 3 heads]` -> `[B, G, s, O, D]`; O: pixels of a line."""
    depth = qkv.shape[4] // 3 // heads
    tokens = qkv.reshape([-1, size * other, 3, heads, depth])
    mask = mask.reshape([-1, size * other, 3, heads, 1])
    tokens = paddle.concat([tokens, mask], axis=4)  # [B*G, T, 3, heads, d+1]
    out = attend_within_groups(tokens, [-1, count, size, other, heads, depth + 1])
    return out[..., :depth].reshape([-1, count, size, other, heads * depth])
