"""EfficientNet-Lite: small convolutional networks with published ImageNet weights; good teachers.

Source: Tan and Le, "EfficientNet", ICML 2019, arXiv 1905.11946; the Lite form (no squeeze and
excitation, ReLU6, stem and head of one size) by its authors' code,
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite.
"""

import math
from dataclasses import dataclass

import paddle.nn.functional as F
from paddle import Tensor, nn

from ppvision.errors import InputError

# Repeats, kernel, stride, expansion, output channels of each stage (table 1 of the paper).
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_CHANNELS, TOP_CHANNELS = 32, 1280
DIVISOR = 8  # channels are rounded to multiples of it


@dataclass(frozen=True)
class Variant:
    """How a network is grown from Lite0: the factors of `efficientnet_lite_builder.py`."""

    width: float  # factor of the channels
    depth: float  # factor of the repeats
    dropout: float  # before the head


VARIANTS = {
    "efficientnet_lite0": Variant(1.0, 1.0, 0.2),
    "efficientnet_lite2": Variant(1.1, 1.2, 0.3),
}


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's padding of an axis: as little as needed, the odd pixel at the end.

    The kernel is at least the stride: it is never negative, and a traced size needs no branch.
    """
    total = ((size + stride - 1) // stride - 1) * stride + kernel - size
    return total // 2, total - total // 2


def round_channels(channels: int, factor: float) -> int:
    """Channels times `factor`, as a multiple of 8 that is at least 0.9 of it."""
    grown = channels * factor
    rounded = max(DIVISOR, int(grown + DIVISOR / 2) // DIVISOR * DIVISOR)
    return rounded if rounded >= 0.9 * grown else rounded + DIVISOR


class ConvNorm(nn.Layer):
    """Convolution, BatchNorm and, if wanted, ReLU6.

    `[B, I, H, W]` -> `[B, O, H/stride, W/stride]`
    """

    def __init__(self, i: int, o: int, kernel: int, stride: int, groups: int, act: bool) -> None:
        super().__init__()
        self.kernel, self.stride, self.act = kernel, stride, act
        # With stride 1 the padding is the same on all sides, and the convolution's own, which
        # engines are quicker with. With stride 2 it depends on the size of the map.
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2D(i, o, kernel, stride, padding, groups=groups, bias_attr=False)
        self.norm = nn.BatchNorm2D(o, epsilon=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            top, bottom = same_padding(x.shape[2], self.kernel, self.stride)
            left, right = same_padding(x.shape[3], self.kernel, self.stride)
            x = F.pad(x, [left, right, top, bottom])
        x = self.norm(self.conv(x))
        return F.relu6(x) if self.act else x


class Block(nn.Layer):
    """Inverted residual: expand, filter each channel, project.

    `[B, I, H, W]` -> `[B, O, H/stride, W/stride]`
    """

    def __init__(self, i: int, o: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = i * expansion
        self.expand = ConvNorm(i, wide, 1, 1, 1, True) if expansion > 1 else None
        self.depthwise = ConvNorm(wide, wide, kernel, stride, wide, True)
        self.project = ConvNorm(wide, o, 1, 1, 1, False)
        self.residual = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        return x + y if self.residual else y


class EfficientNetLite(nn.Layer):
    """`[B, in_channels, H, W]` -> logits `[B, num_classes]`.

    Args:
        variant: one of `VARIANTS`.
        num_classes: of the head. Default 1000.
        in_channels: of the picture. Default 3.

    Raises:
        ValueError: num_classes or in_channels below 1.
    """

    def __init__(self, variant: Variant, num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}: expected a whole number of at least 1, got {value!r}.")
        self.stem = ConvNorm(in_channels, STEM_CHANNELS, 3, 2, 1, True)
        blocks, channels = [], STEM_CHANNELS
        for place, (repeats, kernel, stride, expansion, out) in enumerate(STAGES):
            out = round_channels(out, variant.width)
            # The first and the last stage keep their one block.
            inner = 0 < place < len(STAGES) - 1
            for number in range(math.ceil(repeats * variant.depth) if inner else repeats):
                blocks.append(Block(channels, out, kernel, stride if number == 0 else 1, expansion))
                channels = out
        self.blocks = nn.LayerList(blocks)
        self.top = ConvNorm(channels, TOP_CHANNELS, 1, 1, 1, True)
        self.dropout = nn.Dropout(variant.dropout)
        self.head = nn.Linear(TOP_CHANNELS, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(self.top(x).mean(axis=[2, 3])))
