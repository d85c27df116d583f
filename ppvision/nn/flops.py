"""Counters with which `paddle.flops` counts Pale's attention and SDN; without them it counts 0:

    from ppvision.nn import FLOP_COUNTERS

    paddle.flops(net, [1, 3, 224, 224], custom_ops=FLOP_COUNTERS)

It calls a counter after each run of a layer without sublayers, and sums `total_ops` of these
layers. A multiplication and an addition count as one, as in Paddle for convolutions.
"""

from collections.abc import Callable

from paddle import Tensor, nn

from ppvision.nn.pale_attention import AttentionProducts
from ppvision.nn.semantic_diffusion import SemanticDifferenceConv2D


def count_attention(layer: AttentionProducts, inputs: tuple[Tensor, ...], _: Tensor) -> None:
    """Count query times key, and weights times value: each is T x T x C in a group of T tokens."""
    groups, channels, tokens = inputs[0].shape
    layer.total_ops += 2 * groups * channels * tokens**2


def count_semantic_difference(
    layer: SemanticDifferenceConv2D, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    """Count a 3x3 convolution and, with a guidance, a product of each difference with its
    similarity."""
    total = int(output.size) * 9 * layer.in_channels // layer.groups
    if layer.similarity != "none":
        total += 9 * int(inputs[0].size)
    layer.total_ops += total


FLOP_COUNTERS: dict[type[nn.Layer], Callable[..., None]] = {
    AttentionProducts: count_attention,
    SemanticDifferenceConv2D: count_semantic_difference,
}
