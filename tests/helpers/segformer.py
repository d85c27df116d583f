"""A small SegFormer of PaddleSeg."""

import itertools

import paddle
import pytest
from paddle import nn


class Pyramid(nn.Layer):
    """A backbone whose four maps each have half the size of the one before, the first that of the
    picture.

    Args:
        in_channels: of the picture.
    """

    feat_channels = (8, 6, 10, 4)

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2D(in_channels, self.feat_channels[0], 3, padding=1)
        self.steps = nn.LayerList(
            nn.Conv2D(a, b, 3, 2, 1) for a, b in itertools.pairwise(self.feat_channels)
        )

    def forward(self, x: paddle.Tensor) -> list[paddle.Tensor]:
        maps = [self.first(x)]
        for step in self.steps:
            maps.append(step(maps[-1]))
        return maps


def make_segformer(align_corners: bool = False, in_channels: int = 3) -> nn.Layer:
    """Of 5 classes, with a head of 12 channels."""
    models = pytest.importorskip("paddleseg.models", exc_type=ImportError)
    return models.SegFormer(5, Pyramid(in_channels), 12, align_corners)
