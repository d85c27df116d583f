"""EfficientNet-Lite: EfficientNet for integers, without squeeze-and-excitation, with ReLU6.

Source: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML
2019, arXiv 1905.11946 (blocks: table 1); the Lite form by its authors' code
(https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite): width and depth
of a variant, dropout, a stem of 32 and a top of 1280 channels that no variant scales, and no more
repeats of the first and last stage.

    variant              width  depth  image  dropout   parameters   multiply-adds
    efficientnet_lite0    1.0    1.0    224      0.2        4,652,008    385,187,552 at 224
    efficientnet_lite2    1.1    1.2    260      0.3        6,092,072    859,736,272 at 260

Its convolutions pad as TensorFlow does: as little as needed, the odd pixel at the end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import paddle.nn.functional as F
from paddle import Tensor, nn

from ppvision.models.base import Stage, ZooModel, check_rate
from ppvision.nn import DropPath

STEM, TOP = 32, 1280  # channels

# Repeats, kernel, stride, expansion, channels of each stage (table 1).
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
# The stages that give the maps of stride 4, 8, 16 and 32: the last of each size.
_MAPS = (1, 2, 4, 6)


@dataclass(frozen=True)
class LiteConfig:
    """The values of one variant."""

    width: float  # factor of the channels of blocks
    depth: float  # factor of the number of blocks in a stage
    drop_rate: float  # dropout of the features before the head
    drop_path_rate: float = 0.2  # of the last block; rises linearly from 0

    @property
    def blocks(self) -> tuple[tuple[int, int, int, int, int], ...]:
        """Return stage, kernel, stride, expansion and channels of each block."""
        found = []
        for stage, (repeats, kernel, stride, expansion, channels) in enumerate(_STAGES):
            ends = stage in (0, len(_STAGES) - 1)
            count = repeats if ends else math.ceil(self.depth * repeats)
            out = _round_channels(channels * self.width)
            found += [(stage, kernel, stride, expansion, out)]
            found += [(stage, kernel, 1, expansion, out)] * (count - 1)
        return tuple(found)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the four parts that end in a feature map."""
        parts, stride, start = [], 2, 0
        for last in _MAPS:
            own = [i for i, block in enumerate(self.blocks) if start <= block[0] <= last]
            stride *= math.prod(self.blocks[i][2] for i in own)
            channels = self.blocks[own[-1]][4]
            parts.append(Stage(channels, stride, tuple((f"blocks.{i}",) for i in own)))
            start = last + 1
        return tuple(parts)


VARIANTS = {
    "efficientnet_lite0": LiteConfig(1.0, 1.0, 0.2),
    "efficientnet_lite2": LiteConfig(1.1, 1.2, 0.3),
}


def _round_channels(channels: float) -> int:
    """Round to a multiple of 8, but not down by more than a tenth."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


class ConvNorm(nn.Layer):
    """Convolution, BatchNorm and, if wanted, ReLU6.

    `[B, I, H, W]` -> `[B, O, ceil(H / stride), ceil(W / stride)]`
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, groups: int, act: bool
    ) -> None:
        super().__init__()
        # "SAME" is TensorFlow's padding. At stride 1 it equals the usual padding, which is given as
        # numbers, because exports and quantisation recognise layers by it.
        padding = "SAME" if stride > 1 else kernel // 2
        self.conv = nn.Conv2D(
            inputs, outputs, kernel, stride, padding, groups=groups, bias_attr=False
        )
        self.norm = nn.BatchNorm2D(outputs, momentum=0.99, epsilon=1e-3)  # the authors' code
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return F.relu6(x) if self.act else x


class InvertedResidual(nn.Layer):
    """Expand, filter each channel separately, project; with a residual connection if input and
    output have the same shape. `[B, I, H, W]` -> `[B, O, ceil(H / stride), ceil(W / stride)]`."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, drop_path: float
    ) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = ConvNorm(inputs, wide, 1, 1, 1, True) if expansion > 1 else None
        self.depthwise = ConvNorm(wide, wide, kernel, stride, wide, True)
        self.project = ConvNorm(wide, outputs, 1, 1, 1, False)
        self.drop_path = DropPath(drop_path)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        return x + self.drop_path(y) if self.residual else y


class EfficientNetLite(ZooModel):
    """`[B, in_channels, H, W]` -> `[B, num_classes]`, or with `features_only` maps at strides 4, 8,
    16, 32.

    Args:
        config: one of `VARIANTS`.
        drop_rate: dropout before the head; None takes the config's.
        drop_path_rate: stochastic depth of the last block; None takes the config's (0.2).
        num_classes, in_channels, features_only, out_indices, recompute: see `ZooModel.declare`.

    Raises:
        ValueError: a number out of its range.
    """

    first_conv = "stem.conv"
    classifier = "head"
    stem_layers = ("stem",)
    behind_stages = ("top", "head")
    # Names of github.com/lukemelas/EfficientNet-PyTorch, which the ports of the Lite form also use.
    torch_names = (
        (r"^_conv_stem\.", "stem.conv."),
        (r"^_bn0\.", "stem.norm."),
        (r"^_conv_head\.", "top.conv."),
        (r"^_bn1\.", "top.norm."),
        (r"^_fc\.", "head."),
        (r"^_blocks\.", "blocks."),
        (r"\._expand_conv\.", ".expand.conv."),
        (r"\._bn0\.", ".expand.norm."),
        (r"\._depthwise_conv\.", ".depthwise.conv."),
        (r"\._bn1\.", ".depthwise.norm."),
        (r"\._project_conv\.", ".project.conv."),
        (r"\._bn2\.", ".project.norm."),
    )

    def __init__(
        self,
        config: LiteConfig,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        drop_rate: float | None = None,
        drop_path_rate: float | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        count = self.declare(
            config.stages,
            num_classes=num_classes,
            num_features=TOP,
            in_channels=in_channels,
            features_only=features_only,
            out_indices=out_indices,
            recompute=recompute,
        )
        rate = config.drop_path_rate if drop_path_rate is None else drop_path_rate
        drop_rate = config.drop_rate if drop_rate is None else drop_rate
        check_rate("drop_path_rate", rate)
        check_rate("drop_rate", drop_rate)
        self.stem = ConvNorm(in_channels, STEM, 3, 2, 1, True)
        self.blocks = nn.LayerList()
        built = sum(len(stage.groups) for stage in config.stages[:count])
        previous = STEM
        for number, (_, kernel, stride, expansion, channels) in enumerate(config.blocks[:built]):
            drop_path = rate * number / len(config.blocks)
            self.blocks.append(
                InvertedResidual(previous, channels, kernel, stride, expansion, drop_path)
            )
            previous = channels
        # Numbers of the blocks after which a stage ends.
        self.ends = tuple(
            sum(len(stage.groups) for stage in config.stages[: i + 1]) - 1 for i in range(count)
        )
        if not features_only:
            self.top = ConvNorm(previous, TOP, 1, 1, 1, True)
            self.dropout = nn.Dropout(drop_rate)
            self.head = self.make_head(num_classes)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        features = []
        for number, block in enumerate(self.blocks):
            x = self.run_block(block, x)
            if number in self.ends:
                features.append(x)
        return features

    def forward_features(self, x: Tensor) -> Tensor:
        return self.top(self.forward_stages(x)[-1])  # [B, 1280, H/32, W/32]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean(axis=[2, 3])  # [B, 1280]
        return x if pre_logits else self.head(self.dropout(x))
