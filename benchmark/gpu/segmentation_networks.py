"""Pale under PaddleSeg's SegFormer head, with every form of SDN, in PyTorch.

It shares no code with `ppvision.nn` and PaddleSeg, only what parameters are called inside of the
head and of SDN, so that weights trained here go into ours (`benchmark/gpu/convert.py`). A test
compares the logits of both for each form. The arithmetic is arranged for a GPU:

    the head's 1x1 fusion commutes with bilinear enlargement, so every level is fused at its own
    size and 128 channels are enlarged, not 512;
    enlargement by a fixed factor is a product with two small matrices, whose gradient needs no
    atomic additions;
    all nine differences of SDN are one tensor (`unfold`) and enter the sum by one product.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmark.sdn_forms import FORMS
from benchmark.torch_pale import EPSILON, Pale

# Width, depths and heads, as `ppvision.models.pale_transformer.VARIANTS` has them.
PALE = {
    "pale_nano": (32, (1, 2, 2, 1), (2, 2, 4, 8)),
    "pale_tiny": (64, (2, 2, 16, 2), (2, 4, 8, 16)),
}
EMBEDDING = 128  # channels of the head, as in our configs


# -- sizes -----------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _bilinear_weights(length: int, target: int) -> Tensor:
    """`[target, length]`: what each place of a longer axis takes of a shorter one."""
    eye = torch.eye(length)[None]  # [1, length, length]: channels are the unit vectors
    return F.interpolate(eye, target, mode="linear", align_corners=False)[0].T.contiguous()


_ON_DEVICE: dict[tuple, Tensor] = {}


def _weights_on(length: int, target: int, like: Tensor) -> Tensor:
    key = (length, target, like.device, like.dtype)
    if key not in _ON_DEVICE:
        _ON_DEVICE[key] = _bilinear_weights(length, target).to(like.device, like.dtype)
    return _ON_DEVICE[key]


def enlarge(x: Tensor, size: tuple[int, int], by_product: bool) -> Tensor:
    """Bilinear, pixel centres aligned. Shapes: `[B, C, h, w]` -> `[B, C, *size]`.

    Args:
        by_product: with two matrices; otherwise by PyTorch's operator. Equal but for rounding.
    """
    height, width = x.shape[2:]
    if (height, width) == tuple(size):
        return x
    if not by_product:
        return F.interpolate(x, size, mode="bilinear", align_corners=False)
    x = torch.matmul(_weights_on(height, size[0], x), x)  # [B, C, H, w]
    return torch.matmul(x, _weights_on(width, size[1], x).T)  # [B, C, H, W]


def replicate(x: Tensor) -> Tensor:
    """A border of one pixel that repeats its neighbours. Shapes: `[B, C, H, W]` -> H+2, W+2."""
    x = torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2)
    return torch.cat([x[:, :, :, :1], x, x[:, :, :, -1:]], dim=3)


def neighbourhoods(x: Tensor) -> Tensor:
    """The 3x3 pixels around each, row by row. Shapes: `[B, C, H, W]` -> `[B, C, 9, H, W]`."""
    batch, channels, height, width = x.shape
    # Pictures as channels: PyTorch starts a kernel per picture otherwise.
    x = replicate(x).reshape(1, batch * channels, height + 2, width + 2)
    return F.unfold(x, 3).reshape(batch, channels, 9, height, width)


class Depthwise(nn.Conv2d):
    """A depthwise convolution that may put its input in order first: which is quicker depends on
    the versions of PyTorch and cuDNN."""

    in_order = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous() if Depthwise.in_order else x)


def choose_depthwise(device: torch.device, repeats: int = 20) -> dict[str, float]:
    """Time both ways of `Depthwise`, with gradients, and take the quicker one from then on.

    Returns:
        Milliseconds of each; empty on a CPU.
    """
    found: dict[str, float] = {}
    if device.type != "cuda":
        return found
    layer = Depthwise(64, 64, 3, padding=1, groups=64, bias=False).to(device)
    tokens = torch.randn(16, 56, 56, 64, device=device, requires_grad=True)

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
        y.float().sum().backward()

    for name, in_order in (("as they are", False), ("in order", True)):
        Depthwise.in_order = in_order
        times = []
        for _ in range(5 + repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        found[name] = round(min(times[5:]), 3)  # the least: others may use the GPU as well
    Depthwise.in_order = found["in order"] < found["as they are"]
    return found


# -- SDN -------------------------------------------------------------------------------------------


class Difference(nn.Module):
    """`ppvision.nn.SemanticDifferenceConv2D` of one group, for the similarities used here.

    Shapes: u `[B, C, H, W]`, guidance `[B, C (product: any), h, w]` -> `[B, C, H, W]`.
    """

    def __init__(self, channels: int, similarity: str) -> None:
        super().__init__()
        if similarity not in ("gaussian", "product", "none"):
            raise ValueError(f"similarity: expected gaussian, product or none, got {similarity}.")
        self.similarity = similarity
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        if similarity == "gaussian":
            self.raw_lambda = nn.Parameter(torch.full([1], math.log(math.e - 1)))  # softplus: 1

    def forward(self, u: Tensor, v: Tensor | None) -> Tensor:
        if self.similarity == "none":
            centre = torch.zeros_like(self.weight)
            centre[:, :, 1, 1] = 1.0
            others = self.weight * (1 - centre)
            kernel = others - centre * others.sum(dim=(2, 3), keepdim=True)
            return F.conv2d(replicate(u), kernel)
        batch, channels, height, width = u.shape
        with torch.autocast(u.device.type, enabled=False):  # differences in float32
            u, v = u.float(), v.float()
            edges = neighbourhoods(u) - u[:, :, None]  # [B, C, 9, H, W], nothing at the centre
            if self.similarity == "gaussian":
                v = enlarge(v / F.softplus(self.raw_lambda), (height, width), self.training)
                distance = neighbourhoods(v) - v[:, :, None]
                edges = torch.exp(-0.5 * distance.square()) * edges
            else:
                v = enlarge(v, (height, width), self.training)
                near = (neighbourhoods(v) * v[:, :, None]).sum(dim=1, keepdim=True)
                edges = near * edges
        edges = edges.reshape(batch, channels * 9, height * width)
        return torch.matmul(self.weight.flatten(1), edges).reshape(batch, -1, height, width)


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs, eps=EPSILON),
    )


class Diffusion(nn.Module):
    """`ppvision.nn.SemanticDiffusion`; the last convolution starts at zero."""

    def __init__(
        self,
        channels: int,
        guidance_channels: int | None,
        similarity: str,
        operator: str,
        steps: int,
        detach_guidance: bool,
    ) -> None:
        super().__init__()
        self.steps, self.detach_guidance, self.similarity = steps, detach_guidance, similarity
        self.guide, wide = None, channels
        if operator == "convolution":
            wide = equal_width(channels, guidance_channels)
            self.difference = nn.Conv2d(channels, wide, 3, padding=1, bias=False)
            self.similarity = "none"
        else:
            self.difference = Difference(channels, similarity)
            if similarity == "gaussian" and guidance_channels is None:
                self.guide = _conv_norm(channels, channels, 3, 2)
            elif similarity == "gaussian":
                self.guide = _conv_norm(guidance_channels, channels, 1)
        self.plain = operator == "convolution"
        self.norm = nn.BatchNorm2d(wide, eps=EPSILON)
        self.fuse = nn.Conv2d(channels + wide, channels, 1)

    def start_as_nothing(self) -> None:
        nn.init.zeros_(self.fuse.weight)
        nn.init.zeros_(self.fuse.bias)

    def forward(self, u: Tensor, v: Tensor | None) -> Tensor:
        v = u if v is None else v
        if self.detach_guidance:
            v = v.detach()
        if self.guide is not None:
            v = self.guide(v)
        for _ in range(self.steps):
            y = self.difference(u) if self.plain else self.difference(u, v)
            u = u + self.fuse(torch.cat([u, F.relu(self.norm(y)).to(u.dtype)], dim=1))
        return u


def equal_width(channels: int, guidance_channels: int | None) -> int:
    """Channels of a plain convolution, so that all has as many parameters as SDN has."""
    guide = 9 * channels**2 if guidance_channels is None else guidance_channels * channels
    sdn = 9 * channels**2 + 1 + guide + 2 * channels + 2 * channels + channels * channels
    return round(sdn / (9 * channels + 2 + channels))  # convolution, BatchNorm, its part of `fuse`


class GuidanceHead(nn.Module):
    """A linear classifier of all levels at the size of the finest: the guidance's own logits."""

    def __init__(self, feat_channels: list[int], outputs: int) -> None:
        super().__init__()
        self.scores = nn.ModuleList(nn.Conv2d(c, outputs, 1) for c in feat_channels)

    def forward(self, features: list[Tensor]) -> Tensor:
        size = features[0].shape[2:]
        maps = [score(x) for score, x in zip(self.scores, features, strict=True)]
        return sum(enlarge(x, size, self.training) for x in maps)


class DiffusionPyramid(nn.Module):
    """`ppvision.nn.SemanticDiffusionPyramid`; gives the logits of the guidance's own head as well,
    `[B, K, H/4, W/4]`, or None."""

    def __init__(
        self,
        feat_channels: list[int],
        num_classes: int,
        levels: list[int] | None = None,
        similarity: str = "gaussian",
        guidance: str = "next_level",
        operator: str = "difference",
        steps: int = 1,
        detach_guidance: bool = False,
    ) -> None:
        super().__init__()
        count = len(feat_channels)
        self.levels = list(range(count)) if levels is None else levels
        self.guidance = guidance
        if guidance != "next_level":
            outputs = num_classes if guidance == "classes" else 1
            self.guidance_head = GuidanceHead(feat_channels, outputs)

        def channels_of_guidance(level: int) -> int | None:
            if guidance != "next_level":
                return outputs
            return feat_channels[level + 1] if level + 1 < count else None

        self.diffusions = nn.ModuleList(
            Diffusion(
                feat_channels[level],
                channels_of_guidance(level),
                similarity,
                operator,
                steps,
                detach_guidance,
            )
            for level in self.levels
        )

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        given, logits = [*features[1:], None], None
        if self.guidance != "next_level":
            logits = self.guidance_head(features).float()
            given = [as_guidance(logits, self.guidance)] * len(features)
        result = list(features)
        for level, diffusion in zip(self.levels, self.diffusions, strict=True):
            result[level] = diffusion(features[level], given[level])
        return result, logits


def as_guidance(logits: Tensor, guidance: str) -> Tensor:
    """What `product` multiplies: its sum over channels is the Bhattacharyya coefficient of two
    class distributions, or the chance that neither of two pixels is a boundary."""
    if guidance == "classes":
        return torch.exp(0.5 * F.log_softmax(logits, dim=1))
    return torch.sigmoid(-logits)


class DiffusionBackbone(nn.Module):
    """`ppvision.plugins.paddleseg.SemanticDiffusionBackbone`."""

    def __init__(self, backbone: Pale, feat_channels: list[int], num_classes: int, options: dict):
        super().__init__()
        self.backbone = backbone
        self.diffusion = DiffusionPyramid(feat_channels, num_classes, **options)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        return self.diffusion(self.backbone(x))


# -- the head --------------------------------------------------------------------------------------


class _Projection(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, EMBEDDING)


class _Fusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._conv = nn.Conv2d(4 * EMBEDDING, EMBEDDING, 1, bias=False)
        self._batch_norm = nn.BatchNorm2d(EMBEDDING, eps=EPSILON)


class SegFormer(nn.Module):
    """PaddleSeg's SegFormer over Pale, with a form of SDN between them.

    Args:
        num_classes: of the data set.
        form: a name of `FORMS`.
        model: a name of `PALE`.
        pale_size: rows and columns of a pale.

    Shapes: `[B, 3, H, W]` -> logits `[B, K, H, W]`; in training mode a pair, whose second part are
    the logits of the guidance's own head at the same size, or None.
    """

    def __init__(
        self, num_classes: int, form: str = "none", model: str = "pale_nano", pale_size: int = 7
    ) -> None:
        super().__init__()
        channels, depths, heads = PALE[model]
        widths = [channels << stage for stage in range(4)]
        backbone = Pale(channels, depths, heads, None, pale_size)
        options = FORMS[form]
        self.backbone = (
            backbone
            if options is None
            else DiffusionBackbone(backbone, widths, num_classes, options)
        )
        self.form, self.num_classes, self.pale_size = form, num_classes, pale_size
        for number, width in enumerate(widths, start=1):
            setattr(self, f"linear_c{number}", _Projection(width))
        self.linear_fuse = _Fusion()
        self.linear_pred = nn.Conv2d(EMBEDDING, num_classes, 1)
        self.dropout = 0.1
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                module.__class__ = Depthwise

    @property
    def pale(self) -> Pale:
        return self.backbone if self.form == "none" else self.backbone.backbone

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        size = x.shape[2:]
        features, guidance = (self.backbone(x), None) if self.form == "none" else self.backbone(x)
        weights = self.linear_fuse._conv.weight.chunk(4, dim=1)  # of c4, c3, c2, c1
        total = None
        for number, weight in zip((4, 3, 2, 1), weights, strict=True):
            projection = getattr(self, f"linear_c{number}").proj
            tokens = features[number - 1].permute(0, 2, 3, 1)
            tokens = F.linear(projection(tokens), weight[:, :, 0, 0])  # [B, h, w, E]
            part = enlarge(tokens.permute(0, 3, 1, 2), features[0].shape[2:], self.training)
            total = part if total is None else total + part
        total = F.relu(self.linear_fuse._batch_norm(total))
        logits = self.linear_pred(F.dropout2d(total, self.dropout, self.training))
        logits = self._whole(logits, size)
        if not self.training:
            return logits
        return logits, None if guidance is None else self._whole(guidance, size)

    def _whole(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            return enlarge(logits.float(), size, self.training)


def start_forms(model: nn.Module) -> None:
    """What differs from the usual initial values: SDN starts as nothing."""
    for module in model.modules():
        if isinstance(module, Diffusion):
            module.start_as_nothing()


def multiply_adds(model: SegFormer, height: int, width: int) -> int:
    """Of one picture: convolutions, linear layers, the two products of attention; as
    `benchmark/sdn_boundary.py` counts them, but that a head's fusion is counted at its whole size.
    """
    counted = []
    size = model.pale_size

    def count(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            counted.append(layer.weight.numel() * output.shape[-1] * output.shape[-2])
        elif isinstance(layer, Difference):
            taps = layer.weight.numel() * (9 if layer.similarity == "none" else 8) // 9
            counted.append(taps * output.shape[-1] * output.shape[-2])
        elif isinstance(layer, nn.Linear):
            counted.append(layer.weight.numel() * output.numel() // output.shape[-1])
        elif type(layer).__name__ == "PaleAttention":
            rows, columns = (-(-n // size) * size for n in output.shape[1:3])
            counted.append(output.shape[3] * rows * columns * size * (rows + columns))

    hooks = [layer.register_forward_hook(count) for layer in model.modules()]
    was_training = model.training
    device = next(model.parameters()).device
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, height, width, device=device))
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    finest = -(-height // 4) * -(-width // 4)
    return sum(counted) + model.linear_fuse._conv.weight.numel() * finest
