"""Small layers that Paddle does not have, for all models of the zoo."""

import paddle
from paddle import Tensor, nn

from ppvision.errors import InputError


class DropPath(nn.Layer):
    """Stochastic depth: drops a residual branch for some samples of a batch.

    Args:
        drop_prob: probability in [0, 1) that the branch of a sample is dropped in training. Kept
            branches are divided by `1 - drop_prob`, so the expectation does not change. Default 0.

    Shapes: any `[B, ...]` -> the same.

    Source: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise InputError(
                f"DropPath: expected drop_prob in [0, 1), got {drop_prob}. "
                "Lower the model's drop_path_rate."
            )
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        shape = [x.shape[0]] + [1] * (x.ndim - 1)
        mask = paddle.floor(paddle.rand(shape, dtype="float32") + keep)
        return x * (mask / keep).astype(x.dtype)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


def is_pointwise(layer: nn.Conv2D) -> bool:
    """Whether a convolution with zero padding is 1x1, with stride 1 and over all channels."""
    sizes = (layer._kernel_size, layer._stride, layer._updated_padding)
    return layer._groups == 1 and sizes == ([1, 1], [1, 1], [0, 0])


def is_depthwise(layer: nn.Conv2D) -> bool:
    """Whether a convolution with zero padding is 3x3 and depthwise, and keeps the size of its
    map."""
    sizes = (layer._kernel_size, layer._stride, layer._updated_padding, layer._dilation)
    channels = (layer._in_channels, layer._out_channels)
    return {*channels} == {layer._groups} and sizes == ([3, 3], [1, 1], [1, 1], [1, 1])


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a feature map.

    Shapes: `[B, C, H, W]` -> the same. Parameters, epsilon and errors as `paddle.nn.LayerNorm(C)`.
    """

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.transpose([0, 2, 3, 1])  # [B, H, W, C]
        return super().forward(tokens).transpose([0, 3, 1, 2])  # [B, C, H, W]
