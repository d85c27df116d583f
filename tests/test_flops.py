"""`paddle.flops` with the counters of `ppvision.nn`, against closed formulas."""

import contextlib
import io

import paddle
import pytest

import ppvision
from ppvision.models.pale_transformer import VARIANTS
from ppvision.nn import FLOP_COUNTERS, SemanticDifferenceConv2D


def flops(net: paddle.nn.Layer, shape: list[int], counters: dict | None = None) -> int:
    with contextlib.redirect_stdout(io.StringIO()):  # its report
        return paddle.flops(net, shape, custom_ops=counters)


@pytest.mark.parametrize("size", [(224, 224), (112, 137)])
def test_attention_is_counted(size):
    """`docs/pale.md`: the products of a block on a map padded to h x w are hwC(s*w + s*h)."""
    model = ppvision.create_model("pale_nano", num_classes=10)
    shape = [1, 3, *size]
    expected, side = 0, 7
    config = VARIANTS["pale_nano"]
    height, width = size
    for stage, (channels, depth) in enumerate(
        zip(config.stage_channels, config.depths, strict=True)
    ):
        stride = 4 if stage == 0 else 2
        height, width = -(-height // stride), -(-width // stride)
        h, w = (-(-length // side) * side for length in (height, width))
        expected += depth * h * w * channels * side * (w + h)
    assert expected > 0
    assert flops(model, shape, FLOP_COUNTERS) - flops(model, shape) == expected
    assert not any("total_ops" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("similarity", "groups", "expected"),
    [
        ("none", 1, 9 * 4 * 6 * 5 * 7),  # a 3x3 convolution, 4 to 6 channels on 5 x 7
        ("none", 2, 9 * 2 * 6 * 5 * 7),
        ("gaussian", 1, 9 * 4 * 6 * 5 * 7 + 9 * 4 * 5 * 7),  # and each difference weighted
    ],
)
def test_semantic_differences_are_counted(similarity, groups, expected):
    layer = SemanticDifferenceConv2D(4, 6, similarity=similarity, groups=groups)

    class Guided(paddle.nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: paddle.Tensor) -> paddle.Tensor:
            return self.layer(x, None if similarity == "none" else x)

    assert flops(Guided(), [1, 4, 5, 7], FLOP_COUNTERS) == expected
    assert flops(Guided(), [1, 4, 5, 7]) == 0
