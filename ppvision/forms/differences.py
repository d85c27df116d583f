"""SDN's semantic difference convolution in fewer operations: the form in exported graphs.

In the trained layer (`ppvision.nn.semantic_diffusion`) every map of edges is made of slices and
enters the sum by two 1x1 convolutions: about a hundred small operations. In Paddle Inference their
number costs time. Here one depthwise convolution with -1 and 1 gives the differences to one
neighbour, for both maps at once, and one convolution uses a map of edges in both of its places
(`docs/performance.md` has the gain). On the diagonals half of its kernel is zeros, which cost less
than operations.

Without a guidance the layer is one convolution. For 8-bit integers `central_form` makes it one
before its weights are rounded. Products of a guided layer are of differences, which are computed
in float, so they stay in float too.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ppvision.forms.exchange import is_untouched, use_form
from ppvision.nn import SemanticDifferenceConv2D
from ppvision.nn.semantic_diffusion import (
    DIRECTIONS,
    OF_DIFFERENCES,
    central_kernel,
    ends_of_edges,
    replicate,
    taps,
)
from ppvision.quant.store.state import walk_layers


def difference_form(model: nn.Layer) -> AbstractContextManager[None]:
    """Put `SemanticDifferenceConv2D` of a model into the form for graphs during the block, and
    restore it.

    Args:
        model: in evaluation mode.

    A layer keeps its form if its similarity is cosine (which needs both pixels in many operations)
    or none (which is one convolution in a graph anyway), if it rounds activations, or if it was
    changed.
    """
    return use_form(model, _form)


def _form(layer: nn.Layer) -> "GraphSemanticDifference | None":
    known = (*OF_DIFFERENCES, "product")
    replaced = is_untouched(layer, SemanticDifferenceConv2D) and layer.similarity in known
    return GraphSemanticDifference(layer) if replaced else None


def central_form(model: nn.Layer, named: Sequence[str] = ()) -> AbstractContextManager[None]:
    """Replace `SemanticDifferenceConv2D` without a guidance by `CentralDifference` during the
    block.

    Args:
        model: in evaluation mode.
        named: paths of layers that must remain.
    """
    kept = {id(layer) for path, _, _, layer in walk_layers(model) if path in named}

    def form(layer: nn.Layer) -> nn.Layer | None:
        central = is_untouched(layer, SemanticDifferenceConv2D) and layer.similarity == "none"
        return CentralDifference(layer) if central and id(layer) not in kept else None

    return use_form(model, form)


class CentralDifference(nn.Layer):
    """`SemanticDifferenceConv2D` without a guidance, as one convolution.

    Args:
        layer: the layer with the weights.

    Shapes: those of the layer.
    """

    def __init__(self, layer: SemanticDifferenceConv2D) -> None:
        super().__init__()
        self.conv = nn.Conv2D(
            layer.in_channels,
            layer.out_channels,
            3,
            padding=1,
            padding_mode="replicate",
            groups=layer.groups,
            bias_attr=False,
        )
        self.conv.weight.set_value(central_kernel(layer.weight))
        self.eval()

    def forward(self, u: Tensor, v: Tensor | None = None) -> Tensor:
        return self.conv(u)


class GraphSemanticDifference(nn.Layer):
    """`SemanticDifferenceConv2D` in evaluation mode, for a graph.

    Args:
        layer: the layer with the weights.

    Shapes: those of the layer.
    """

    def __init__(self, layer: SemanticDifferenceConv2D) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, u: Tensor, v: Tensor | None = None) -> Tensor:
        layer = self.layer
        guidance = layer.guidance(u, v)
        of = OF_DIFFERENCES.get(layer.similarity)
        return sum_of_differences(u, guidance, layer.weight, of, layer.groups)


@paddle.jit.not_to_static  # the loops unroll
def sum_of_differences(
    u: Tensor,
    v: Tensor,
    weight: Tensor,
    similarity: Callable[[Tensor], Tensor] | None,
    groups: int,
) -> Tensor:
    """Compute the sum over neighbours of `ppvision.nn.semantic_diffusion`.

    Args:
        u, v: features `[B, C, H, W]`, and guidance with as many channels (any number for a
            product).
        weight: `[O, C/groups, 3, 3]`.
        similarity: function of a difference of the guidance; None for the product of both pixels.
        groups: groups of the convolution.

    Returns:
        `[B, O, H, W]`.
    """
    channels = u.shape[1]
    if similarity is None:
        maps, v = replicate(u), replicate(v)  # [B, C, H+2, W+2]
    else:
        maps = replicate(paddle.concat([u, v], axis=1))  # [B, 2C, H+2, W+2]
    total = None
    for direction in DIRECTIONS:
        count = maps.shape[1]
        kernel = np.tile(_difference_kernel(direction), (count, 1, 1, 1))
        kernel = paddle.to_tensor(kernel).astype(maps.dtype)
        differences = F.conv2d(maps, kernel, groups=count)  # [B, C or 2C, H+|dy|, W+|dx|]
        if similarity is None:
            near, far = ends_of_edges(v, direction)
            edges = (near * far).sum(axis=1, keepdim=True) * differences
        else:
            edges = similarity(differences[:, channels:]) * differences[:, :channels]
        part = F.conv2d(edges, _both_taps(weight, direction), groups=groups)  # [B, O, H, W]
        total = part if total is None else total + part
    return total


def _difference_kernel(direction: tuple[int, int]) -> np.ndarray:
    """Return `[1, 1, rows, columns]`: -1 at p, 1 at q = p + direction, and enough zeros to cut off
    the border of a map along an axis that both share."""
    kernel = np.zeros([1, 1, *(2 if step else 3 for step in direction)], np.float32)
    for sign, end in zip((-1, 1), _ends(direction), strict=True):
        row, column = (at if step else 1 for at, step in zip(end, direction, strict=True))
        kernel[0, 0, row, column] = sign
    return kernel


def _both_taps(weight: Tensor, direction: tuple[int, int]) -> Tensor:
    """Return the kernel `[O, C/groups, 1 + |dy|, 1 + |dx|]` for a map of edges, with both of its
    `taps`."""
    size = [1 + abs(step) for step in direction]
    places = np.zeros([3, 3, *size], np.float32)
    for (sign, tap, _, _), at in zip(taps(direction), _ends(direction)[::-1], strict=True):
        places[(*tap, *at)] = sign
    places = paddle.to_tensor(places.reshape(9, -1)).astype(weight.dtype)
    outputs, channels = weight.shape[:2]
    kernel = paddle.matmul(weight.reshape([outputs, channels, 9]), places)
    return kernel.reshape([outputs, channels, *size])


def _ends(direction: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return row and column of p and of q in the smallest window that contains both."""
    dy, dx = direction
    return (int(dy < 0), int(dx < 0)), (int(dy > 0), int(dx > 0))
