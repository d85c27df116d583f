"""What the artefacts were written with: inputs and a small network.

Never change anything here: the artefacts and their expected outputs belong to these very numbers
and names. Only add.
"""

import numpy as np
import paddle.nn.functional as F
from paddle import Tensor, nn

CLASSES = ["circle", "square", "star", "cross", "ring"]
NORMALIZE = {"type": "Normalize", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


class SmallNet(nn.Layer):
    """Logits of `CLASSES`: `[B, 3, H, W]` -> `[B, 5]`. About 1500 weights, so files stay small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2D(3, 8, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2D(8)
        self.conv = nn.Conv2D(8, 16, 3, padding=1, bias_attr=False)
        self.norm2 = nn.BatchNorm2D(16)
        self.head = nn.Linear(16, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.stem(x)))  # [B, 8, H/2, W/2]
        x = F.relu(self.norm2(self.conv(x)))  # [B, 16, H/2, W/2]
        return self.head(x.mean(axis=[2, 3]))


def make_batch(*shape: int) -> np.ndarray:
    """A float32 array from whole numbers alone, so that every machine makes the same one."""
    places = np.arange(np.prod(shape), dtype=np.int64)
    # 251 and 1009 are primes: no period of the pattern fits into a row.
    return (
        ((places * 37 % 251 + places * places % 1009) / 315 - 2).astype(np.float32).reshape(shape)
    )


def make_picture(height: int, width: int) -> np.ndarray:
    """A picture `[H, W, 3]`, uint8: slopes and stripes, other ones in each channel."""
    y, x = np.mgrid[:height, :width]
    channels = [(5 * x + 2 * y) % 256, (x * y // 8) % 256, ((x // 8 + y // 8) % 2) * 160 + 40]
    return np.stack(channels, axis=-1).astype(np.uint8)
