"""The small ResNet of CIFAR: 3 x 3 stem, three stages of basic blocks, 6n + 2 layers.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv
1512.03385, section 4.2. Shortcuts are the paper's option A: where a stage halves the map, every
second pixel, and zeros for the channels that are new; no parameters.
"""

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ppvision.errors import InputError, shorten

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
            x = F.max_pool2d(x, 1, self.stride)  # every second pixel, in an operator ONNX has
        if self.new_channels:
            # Not F.pad: Paddle Inference's oneDNN kernel of it for channels corrupts memory.
            x = paddle.concat([x, paddle.zeros_like(x[:, : self.new_channels])], axis=1)
        return x


class CifarResNet(nn.Layer):
    """ResNet for small pictures. `[B, in_channels, H, W]` -> `[B, num_classes]`.

    Args:
        blocks: of each stage; 3 makes ResNet-20.
        num_classes: of the head. Default 1000.
        in_channels: of the picture. Default 3.

    Raises:
        ValueError: num_classes or in_channels below 1.
    """

    def __init__(self, blocks: int, num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(
                    f"{name}: expected a whole number of at least 1, got {shorten(value)}."
                )
        width = CHANNELS[0]
        self.stem = nn.Conv2D(in_channels, width, 3, padding=1, bias_attr=False)
        self.norm = nn.BatchNorm2D(width)
        stages = []
        for number, channels in enumerate(CHANNELS):
            first = BasicBlock(width, channels, stride=2 if number else 1)
            rest = [BasicBlock(channels, channels) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(first, *rest))
            width = channels
        self.stages = nn.LayerList(stages)
        self.pool = nn.AdaptiveAvgPool2D(1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for stage in self.stages:
            x = stage(x)
        return self.head(self.pool(x).flatten(1))
