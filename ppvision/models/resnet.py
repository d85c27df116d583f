"""ResNets: the small one of CIFAR, and those of ImageNet.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv
1512.03385. CIFAR's (section 4.2): 3 x 3 stem, three stages of basic blocks, 6n + 2 layers; its
shortcuts are the paper's option A: if a stage halves the map, they take every second pixel, and
zeros for new channels, without parameters. ImageNet's (table 1) have option B, a 1 x 1 convolution.
Their stride is in the 3 x 3 convolution of a bottleneck, as in Paddle and PyTorch.
"""

from collections.abc import Sequence

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.vision.models.resnet import BasicBlock as ImageNetBasicBlock
from paddle.vision.models.resnet import BottleneckBlock

from ppvision.models.base import Stage, ZooModel

CHANNELS = (16, 32, 64)


class BasicBlock(nn.Layer):
    """Two 3 x 3 convolutions around a shortcut. `[B, C, H, W]` -> `[B, C', H/stride, W/stride]`.

    Args:
        in_channels: C.
        channels: C', from C to 2C.
        stride: 1 or 2.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2D(in_channels, channels, 3, stride, padding=1, bias_attr=False)
        self.norm1 = nn.BatchNorm2D(channels)
        self.conv2 = nn.Conv2D(channels, channels, 3, padding=1, bias_attr=False)
        self.norm2 = nn.BatchNorm2D(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.max_pool2d(x, 1, self.stride)  # every second pixel, by an operator of ONNX
        if self.new_channels:
            # Not F.pad: its oneDNN kernel for channels corrupts memory in Paddle Inference.
            x = paddle.concat([x, paddle.zeros_like(x[:, : self.new_channels])], axis=1)
        return x


class CifarResNet(ZooModel):
    """ResNet for small images. `[B, in_channels, H, W]` -> `[B, num_classes]`, or with
    `features_only` maps of 16, 32 and 64 channels at strides 1, 2 and 4.

    Args:
        blocks: number of blocks per stage; 3 makes ResNet-20.
        num_classes, in_channels, features_only, out_indices, recompute: see `ZooModel.declare`.

    Raises:
        ValueError: a number out of its range.
    """

    first_conv = "stem"
    classifier = "head"
    stem_layers = ("stem", "norm")
    behind_stages = ("head",)

    def __init__(
        self,
        blocks: int,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        count = self.declare(
            [
                Stage(channels, 2**i, tuple((f"stages.{i}.{k}",) for k in range(blocks)))
                for i, channels in enumerate(CHANNELS)
            ],
            num_classes=num_classes,
            in_channels=in_channels,
            features_only=features_only,
            out_indices=out_indices,
            recompute=recompute,
        )
        width = CHANNELS[0]
        self.stem = nn.Conv2D(in_channels, width, 3, padding=1, bias_attr=False)
        self.norm = nn.BatchNorm2D(width)
        stages = []
        for number, channels in enumerate(CHANNELS[:count]):
            first = BasicBlock(width, channels, stride=2 if number else 1)
            rest = [BasicBlock(channels, channels) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(first, *rest))
            width = channels
        self.stages = nn.LayerList(stages)
        if not features_only:
            self.head = self.make_head(num_classes)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.norm(self.stem(x)))
        features = []
        for stage in self.stages:
            for block in stage:
                x = self.run_block(block, x)
            features.append(x)
        return features


class ImageNetResNet(ZooModel):
    """ResNet for images of about 224 x 224. `[B, in_channels, H, W]` -> `[B, num_classes]`, or
    with `features_only` maps at strides 4, 8, 16, 32.

    Blocks and names of parameters are those of `paddle.vision.models.ResNet`, whose published
    weights fit. PyTorch's weights (torchvision, timm) fit by `create_model(..., pretrained=FILE)`.

    Args:
        block: `BasicBlock` or `BottleneckBlock` of `paddle.vision.models.resnet`.
        depths: number of blocks per stage.
        num_classes, in_channels, features_only, out_indices, recompute: see `ZooModel.declare`.

    Raises:
        ValueError: a number out of its range.
    """

    first_conv = "conv1"
    classifier = "fc"
    stem_layers = ("conv1", "bn1")
    behind_stages = ("fc",)

    def __init__(
        self,
        block: type[ImageNetBasicBlock] | type[BottleneckBlock],
        depths: Sequence[int],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        count = self.declare(
            [
                Stage(
                    64 * 2**i * block.expansion,
                    4 * 2**i,
                    tuple((f"layer{i + 1}.{k}",) for k in range(depth)),
                )
                for i, depth in enumerate(depths)
            ],
            num_classes=num_classes,
            in_channels=in_channels,
            features_only=features_only,
            out_indices=out_indices,
            recompute=recompute,
        )
        self.conv1 = nn.Conv2D(in_channels, 64, 7, 2, padding=3, bias_attr=False)
        self.bn1 = nn.BatchNorm2D(64)
        self.maxpool = nn.MaxPool2D(3, 2, padding=1)
        self.stage_names = [f"layer{i + 1}" for i in range(count)]
        previous = 64
        for i, name in enumerate(self.stage_names):
            width = 64 * 2**i
            out = width * block.expansion
            shortcut = None
            if i or previous != out:
                shortcut = nn.Sequential(
                    nn.Conv2D(previous, out, 1, stride=2 if i else 1, bias_attr=False),
                    nn.BatchNorm2D(out),
                )
            first = block(previous, width, 2 if i else 1, shortcut)
            rest = [block(out, width) for _ in range(depths[i] - 1)]
            setattr(self, name, nn.Sequential(first, *rest))
            previous = out
        if not features_only:
            self.fc = self.make_head(num_classes)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        features = []
        for name in self.stage_names:
            for block in getattr(self, name):
                x = self.run_block(block, x)
            features.append(x)
        return features
