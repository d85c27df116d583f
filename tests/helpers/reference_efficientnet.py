"""EfficientNet-Lite by its definition: NumPy in float64, TensorFlow's padding computed as it says.

Takes the parameters of a `ppvision` model by name, and nothing else from it.
"""

import math

import numpy as np

# Kernel, stride, expansion, repeats of each stage: table 1 of the paper.
STAGES = (
    *((3, 1, 1, 1), (3, 2, 6, 2), (5, 2, 6, 2), (3, 2, 6, 3)),
    *((5, 1, 6, 3), (5, 2, 6, 4), (3, 1, 6, 1)),
)


def convolve(x: np.ndarray, weight: np.ndarray, stride: int) -> np.ndarray:
    """`[C, H, W]` by `[O, C / groups, k, k]`, padded as TensorFlow's "SAME"; groups 1 or C."""
    kernel = weight.shape[2]
    sizes = [math.ceil(n / stride) for n in x.shape[1:]]
    pads = []
    for size, out in zip(x.shape[1:], sizes, strict=True):
        total = max((out - 1) * stride + kernel - size, 0)
        pads.append((total // 2, total - total // 2))
    x = np.pad(x, [(0, 0), *pads])
    result = np.zeros((weight.shape[0], *sizes))
    for row in range(kernel):
        for column in range(kernel):
            part = x[
                :,
                row : row + stride * (sizes[0] - 1) + 1 : stride,
                column : column + stride * (sizes[1] - 1) + 1 : stride,
            ]
            taps = weight[:, :, row, column]
            if weight.shape[1] == 1 and weight.shape[0] == x.shape[0]:
                result += part * taps[:, 0, None, None]
            else:
                result += np.einsum("chw,oc->ohw", part, taps)
    return result


def efficientnet_lite(x: np.ndarray, p: dict[str, np.ndarray], depth: float) -> np.ndarray:
    """Logits `[K]` of one picture `[3, H, W]`.

    Args:
        x: the picture.
        p: parameters by name, float64.
        depth: multiplier of the repeats.
    """

    def layer(x: np.ndarray, name: str, stride: int = 1, act: bool = True) -> np.ndarray:
        x = convolve(x, p[f"{name}.conv.weight"], stride)
        mean, variance, weight, bias = (
            p[f"{name}.norm.{part}"][:, None, None]
            for part in ("_mean", "_variance", "weight", "bias")
        )
        x = (x - mean) / np.sqrt(variance + 1e-3) * weight + bias
        return np.clip(x, 0, 6) if act else x

    x = layer(x, "stem", 2)
    number = 0
    for stage, (_, stride, expansion, repeats) in enumerate(STAGES):
        ends = stage in (0, len(STAGES) - 1)
        for repeat in range(repeats if ends else math.ceil(repeats * depth)):
            name = f"blocks.{number}"
            y = layer(x, f"{name}.expand") if expansion > 1 else x
            y = layer(y, f"{name}.depthwise", stride if repeat == 0 else 1)
            y = layer(y, f"{name}.project", act=False)
            x = x + y if repeat and x.shape == y.shape else y
            number += 1
    x = layer(x, "top").mean((1, 2))
    return x @ p["head.weight"] + p["head.bias"]
