"""PP-YOLOE over the Pale Transformer in PyTorch: the twin of `ppyoloe_pale_nano`.

It shares no code with PaddleDetection, only what its parameters are called, so that the same
weights go into both: `from_paddle` and `to_paddle` turn names and shapes. Written for training on
one GPU; `detection_losses.py` has the losses.

Source: Xu and others, PP-YOLOE: An evolved version of YOLO, 2022, https://arxiv.org/abs/2203.16250
(neck and head), as PaddleDetection 2.6 builds them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmark.gpu.common import initialise as initialise_pale
from benchmark.torch_pale import Pale, torch_name

STRIDES = (32, 16, 8)  # of the head's maps, the coarsest first, as PaddleDetection has them
BINS = 17  # a side's distance is the mean of a distribution over 0 .. 16 strides
PRIOR = 0.01  # probability of an object at each place, before any training
_BACKBONE = "backbone."
_BACKBONE_IN_PADDLE = "backbone.net."


class ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm, and SiLU unless `active` is false.

    Shapes: `[B, C, H, W]` -> `[B, C', H / stride, W / stride]`.
    """

    def __init__(
        self, before: int, after: int, kernel: int = 1, stride: int = 1, active: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(after)
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.silu(x) if self.active else x


class RepBlock(nn.Module):
    """A 3x3 convolution and a 1x1 convolution side by side, before one SiLU (RepVGG).

    Shapes: `[B, C, H, W]` -> the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3, active=False)
        self.conv2 = ConvNorm(channels, channels, 1, active=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv1(x) + self.conv2(x))


class BasicBlock(nn.Module):
    """A 3x3 convolution, then a `RepBlock`. Shapes: `[B, C, H, W]` -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3)
        self.conv2 = RepBlock(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class PoolingPyramid(nn.Module):
    """The map beside its maxima over 5, 9 and 13 pixels. Shapes: `[B, C, H, W]` -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = ConvNorm(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        pools = [F.max_pool2d(x, size, 1, size // 2) for size in (5, 9, 13)]
        return self.conv(torch.cat([x, *pools], dim=1))


class PartialStage(nn.Module):
    """Half of the channels pass the blocks, the other half passes by (CSP).

    Args:
        before, after: channels.
        blocks: their number.
        pooled: a `PoolingPyramid` after the middle block.

    Shapes: `[B, before, H, W]` -> `[B, after, H, W]`.
    """

    def __init__(self, before: int, after: int, blocks: int, pooled: bool) -> None:
        super().__init__()
        middle = after // 2
        self.conv1, self.conv2 = ConvNorm(before, middle), ConvNorm(before, middle)
        self.convs = nn.Sequential()
        for number in range(blocks):
            self.convs.add_module(str(number), BasicBlock(middle))
            if pooled and number == (blocks - 1) // 2:
                self.convs.add_module("spp", PoolingPyramid(middle))
        self.conv3 = ConvNorm(2 * middle, after)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(torch.cat([self.conv1(x), self.convs(self.conv2(x))], dim=1))


class PathAggregation(nn.Module):
    """PP-YOLOE's neck (`CustomCSPPAN`): from the coarsest map to the finest, and back.

    Args:
        before: channels of the maps, the finest first.
        after: channels of the results, the coarsest first.
        blocks: of each stage.

    Shapes: maps, the finest first -> maps of the same sizes, the coarsest first.
    """

    def __init__(self, before: Sequence[int], after: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.fpn_stages, self.fpn_routes = nn.ModuleList(), nn.ModuleList()
        self.pan_stages, self.pan_routes = nn.ModuleList(), nn.ModuleList()
        for number, (ours, result) in enumerate(zip(reversed(before), after, strict=True)):
            handed = after[number - 1] // 2 if number else 0
            stage = PartialStage(ours + handed, result, blocks, pooled=number == 0)
            self.fpn_stages.append(nn.Sequential(stage))
            if number < len(after) - 1:
                self.fpn_routes.append(ConvNorm(result, result // 2))
        for coarse, fine in pairwise(after):
            self.pan_routes.append(ConvNorm(fine, fine, 3, stride=2))
            stage = PartialStage(coarse + fine, coarse, blocks, pooled=False)
            self.pan_stages.append(nn.Sequential(stage))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        down: list[Tensor] = []
        for number, x in enumerate(reversed(maps)):
            if number:
                route = self.fpn_routes[number - 1](down[-1])
                route = F.interpolate(route, scale_factor=2.0)  # nearest
                x = torch.cat([route, x], dim=1)
            down.append(self.fpn_stages[number](x))
        found = [down[-1]]
        for number in reversed(range(len(self.pan_routes))):
            route = self.pan_routes[number](found[-1])
            found.append(self.pan_stages[number](torch.cat([route, down[number]], dim=1)))
        return found[::-1]


class ChannelGate(nn.Module):
    """Channels weighted by the mean of the map (`ESEAttn`). Shapes: `[B, C, H, W]` -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)
        self.conv = ConvNorm(channels, channels)

    def forward(self, x: Tensor, mean: Tensor) -> Tensor:
        return self.conv(x * torch.sigmoid(self.fc(mean)))


@dataclass(frozen=True)
class RawOutputs:
    """What the head gives at every place of its maps, the coarsest map first.

    Attributes:
        logits: `[B, L, K]` of the classes.
        sides: `[B, L, 4, BINS]` logits of the distances to left, top, right and bottom.
        sizes: height and width of each map.
    """

    logits: Tensor
    sides: Tensor
    sizes: tuple[tuple[int, int], ...]


class Head(nn.Module):
    """PP-YOLOE's head.

    Args:
        channels: of the maps, the coarsest first.
        num_classes: K.
    """

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.stem_cls = nn.ModuleList(ChannelGate(c) for c in channels)
        self.stem_reg = nn.ModuleList(ChannelGate(c) for c in channels)
        self.pred_cls = nn.ModuleList(nn.Conv2d(c, num_classes, 3, padding=1) for c in channels)
        self.pred_reg = nn.ModuleList(nn.Conv2d(c, 4 * BINS, 3, padding=1) for c in channels)
        self.proj_conv = nn.Conv2d(BINS, 1, 1, bias=False)
        self.proj_conv.weight.requires_grad_(False)

    def forward(self, maps: Sequence[Tensor]) -> RawOutputs:
        logits, sides = [], []
        for number, x in enumerate(maps):
            mean = x.mean(dim=(2, 3), keepdim=True)
            classes = self.pred_cls[number](self.stem_cls[number](x, mean) + x)
            distances = self.pred_reg[number](self.stem_reg[number](x, mean))
            logits.append(classes.flatten(2).transpose(1, 2))  # [B, h*w, K]
            sides.append(distances.flatten(2).transpose(1, 2))  # [B, h*w, 4*BINS]
        sizes = tuple((int(x.shape[2]), int(x.shape[3])) for x in maps)
        whole = torch.cat(sides, dim=1).unflatten(2, (4, BINS))
        return RawOutputs(torch.cat(logits, dim=1), whole, sizes)

    def boxes(self, raw: RawOutputs) -> tuple[Tensor, Tensor]:
        """Boxes `[B, L, 4]` (left, top, right, bottom in pixels of the input) and the
        probabilities of the classes `[B, L, K]`, both float32."""
        points, strides = places(raw.sizes, raw.logits.device)
        boxes = decode(points, self.distances(raw.sides.float())) * strides
        return boxes, raw.logits.float().sigmoid()

    def distances(self, sides: Tensor) -> Tensor:
        """Means of the distributions: `[B, L, 4, BINS]` logits -> `[B, L, 4]` in cells."""
        # A sum and no product of matrices, which a GPU would round to TF32.
        return (sides.softmax(dim=3) * self.proj_conv.weight.flatten()).sum(dim=3)


def places(sizes: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The middles of all cells `[L, 2]` (x, y in cells of their own map), and strides `[L, 1]`."""
    points, strides = [], []
    for (height, width), stride in zip(sizes, STRIDES, strict=True):
        y = torch.arange(height, device=device, dtype=torch.float32) + 0.5
        x = torch.arange(width, device=device, dtype=torch.float32) + 0.5
        points.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2))
        strides.append(torch.full((height * width, 1), float(stride), device=device))
    return torch.cat(points), torch.cat(strides)


def decode(points: Tensor, distances: Tensor) -> Tensor:
    """Boxes from the distances of their sides to a point."""
    left_top, right_bottom = distances.chunk(2, dim=-1)
    return torch.cat([points - left_top, points + right_bottom], dim=-1)


class Detector(nn.Module):
    """Backbone, neck and head.

    Args:
        channels, depths, heads, size: of the backbone (`Pale`).
        widths: channels of the neck, the coarsest map first.
        blocks: of each stage of the neck.
        num_classes: K.

    Shapes: pictures `[B, 3, H, W]`, H and W multiples of 32 -> `RawOutputs`.
    """

    def __init__(
        self,
        channels: int,
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        widths: Sequence[int],
        blocks: int,
        num_classes: int,
        size: int = 7,
    ) -> None:
        super().__init__()
        self.backbone = Pale(channels, depths, heads, num_classes=None, size=size)
        before = [channels << stage for stage in range(1, len(depths))]
        self.neck = PathAggregation(before, widths, blocks)
        self.yolo_head = Head(widths, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> RawOutputs:
        return self.yolo_head(self.neck(self.backbone(x)[1:]))


def ppyoloe_pale_nano(num_classes: int) -> Detector:
    """The network of `configs/detection/ppyoloe_pale_nano_bccd.yml`."""
    # width_mult 0.25 of 768, 384, 192; depth_mult 0.33 of 3 blocks.
    return Detector(32, (1, 2, 2, 1), (2, 2, 4, 8), (192, 96, 48), 1, num_classes)


@torch.no_grad()
def initialise(model: Detector) -> None:
    """Fresh weights as PaddleDetection and `ppvision` draw them."""
    initialise_pale(model.backbone)
    for part in (model.neck, model.yolo_head):
        for layer in part.modules():
            if isinstance(layer, nn.Conv2d):  # Paddle's default
                fan_in = layer.weight[0].numel()
                nn.init.normal_(layer.weight, std=math.sqrt(2.0 / fan_in))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    head = model.yolo_head
    for gate in (*head.stem_cls, *head.stem_reg):
        nn.init.normal_(gate.fc.weight, std=0.001)
    for classes, sides in zip(head.pred_cls, head.pred_reg, strict=True):
        nn.init.zeros_(classes.weight)
        nn.init.constant_(classes.bias, -math.log((1 - PRIOR) / PRIOR))
        nn.init.zeros_(sides.weight)
        nn.init.ones_(sides.bias)
    head.proj_conv.weight.copy_(torch.arange(BINS, dtype=torch.float32).reshape(1, BINS, 1, 1))


# -- the same weights in PaddleDetection ----------------------------------------------------------

_ENDS = {"running_mean": "_mean", "running_var": "_variance"}
_INSIDE = {"depthwise": "0", "norm": "1", "pointwise": "2"}  # of a query, key or value
_FRONTS = {"merges": ("merges", "0"), "merge_norms": ("merges", "1")}


def paddle_name(name: str) -> str | None:
    """The name in PaddleDetection of a parameter here; None for what it does not have."""
    parts = name.split(".")
    if parts[-1] == "num_batches_tracked":
        return None
    parts[-1] = _ENDS.get(parts[-1], parts[-1])
    if not name.startswith(_BACKBONE):
        return ".".join(parts)
    parts = parts[1:]
    if parts[0] in _FRONTS:
        front, place = _FRONTS[parts[0]]
        parts = [front, parts[1], place, *parts[2:]]
    elif parts[0] == "norms":
        parts[0] = "feature_norms"
    elif parts[3] == "attention":  # stages.S.B.attention.query.depthwise.weight
        parts[5] = _INSIDE.get(parts[5], parts[5])
    return _BACKBONE_IN_PADDLE + ".".join(parts)


def to_paddle(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Weights of a `Detector` under the names and in the shapes of PaddleDetection's."""
    arrays = {}
    for name, value in state.items():
        theirs = paddle_name(name)
        if theirs is None:
            continue
        array = value.detach().cpu().float().numpy()
        # Pointwise layers of the backbone are Linear here and 1x1 convolutions there.
        arrays[theirs] = np.ascontiguousarray(
            array[:, :, None, None] if array.ndim == 2 and _BACKBONE in name else array
        )
    return arrays


def from_paddle(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Weights of PaddleDetection's for `Detector.load_state_dict(..., strict=False)`, which then
    lacks the counters of BatchNorm alone."""
    state = {}
    for name, array in arrays.items():
        if name.startswith(_BACKBONE_IN_PADDLE):
            inner = name.removeprefix(_BACKBONE_IN_PADDLE)
            ours = _BACKBONE + torch_name(inner)
            if array.ndim == 4 and _is_linear(ours):
                array = array[:, :, 0, 0]
        else:
            *front, end = name.split(".")
            ours = ".".join([*front, {v: k for k, v in _ENDS.items()}.get(end, end)])
        state[ours] = torch.from_numpy(np.ascontiguousarray(array))
    return state


def _is_linear(name: str) -> bool:
    return any(part in name for part in (".pointwise.", ".project.", ".mlp."))


def load_backbone(model: Detector, state: Mapping[str, Tensor]) -> int:
    """Start the backbone from a classifier's weights (`Pale` with a head).

    The norms behind the stages and the head stay as they are: the classifier has others.

    Returns:
        How many tensors were taken.

    Raises:
        ValueError: not weights of this backbone.
    """
    own = model.backbone.state_dict()
    wanted = {n for n in own if not n.startswith("norms.") and not n.endswith("tracked")}
    wrong = [n for n in sorted(wanted) if n not in state or state[n].shape != own[n].shape]
    if wrong:
        raise ValueError(f"expected weights of the same Pale Transformer, wrong are {wrong[:5]}")
    model.backbone.load_state_dict(own | {n: state[n].to(own[n]) for n in wanted})
    return len(wanted)
