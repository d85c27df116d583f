"""The Pale Transformer in PyTorch, for `deploy_latency.py`: written as PyTorch's users would.

It shares no code with `ppvision.models`, only what its parameters are called, so that the same
weights go into both. Tokens are channels-last inside of blocks, pointwise layers are Linear,
attention is `scaled_dot_product_attention`. Sizes that the pale does not divide are padded, masked.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-5  # of LayerNorm and BatchNorm, in both frameworks


class SeparableConv(nn.Module):
    """Depthwise 3x3, BatchNorm, pointwise. Shapes: `[B, C, H, W]` -> `[B, H, W, C]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels, eps=EPSILON)
        self.pointwise = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.norm(self.depthwise(x)).permute(0, 2, 3, 1))


class PaleAttention(nn.Module):
    """Interlaced rows for half of the heads, interlaced columns for the others.

    Shapes: `[B, H, W, C]` -> the same.
    """

    def __init__(self, channels: int, heads: int, size: int) -> None:
        super().__init__()
        self.size, self.heads = size, heads
        self.query, self.key, self.value = (SeparableConv(channels) for _ in range(3))
        self.project = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        down, across = -height % self.size, -width % self.size
        x = F.pad(x, (0, 0, 0, across, 0, down)).permute(0, 3, 1, 2)  # [B, C, H', W']
        real = None
        if down or across:
            real = torch.zeros(x.shape[2:], dtype=torch.bool, device=x.device)
            real[:height, :width] = True
        parts = [layer(x) for layer in (self.query, self.key, self.value)]  # [B, H', W', C]
        rows, columns = zip(*(part.chunk(2, dim=3) for part in parts), strict=True)
        turned = [part.transpose(1, 2) for part in columns]  # columns become rows
        found = [
            self._among_rows(rows, real),
            self._among_rows(turned, None if real is None else real.t()).transpose(1, 2),
        ]
        return self.project(torch.cat(found, dim=3)[:, :height, :width])

    def _among_rows(self, parts: list[Tensor], real: Tensor | None) -> Tensor:
        """`[B, H, W, C/2]` three times -> once, among rows that lie `H / size` apart."""
        batch, height, width, channels = parts[0].shape
        heads, size, pales = self.heads // 2, self.size, height // self.size

        def grouped(x: Tensor) -> Tensor:
            x = x.reshape(batch, size, pales, width, heads, channels // heads)
            x = x.permute(0, 2, 4, 1, 3, 5)  # [B, N, heads, s, W, d]
            return x.reshape(batch * pales, heads, size * width, -1)  # [B*N, heads, s*W, d]

        mask = None
        if real is not None:
            mask = real.reshape(size, pales, width).transpose(0, 1).reshape(pales, 1, 1, -1)
            mask = mask.repeat(batch, 1, 1, 1)  # [B*N, 1, 1, s*W]
        out = F.scaled_dot_product_attention(*map(grouped, parts), attn_mask=mask)
        out = out.reshape(batch, pales, heads, size, width, -1).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(batch, height, width, channels)


class Block(nn.Module):
    """Position encoding, attention, MLP. Shapes: `[B, H, W, C]` -> the same."""

    def __init__(self, channels: int, heads: int, size: int, ratio: int) -> None:
        super().__init__()
        self.position = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm1 = nn.LayerNorm(channels, eps=EPSILON)
        self.attention = PaleAttention(channels, heads, size)
        self.norm2 = nn.LayerNorm(channels, eps=EPSILON)
        self.mlp = nn.Sequential(
            nn.Linear(channels, ratio * channels), nn.GELU(), nn.Linear(ratio * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Pale(nn.Module):
    """The backbone.

    Args:
        channels: C of the first stage.
        depths, heads: of the four stages.
        num_classes: of the head; None for the four feature maps.
        size: rows and columns of a pale.
        ratio: of the MLP.
    """

    def __init__(
        self,
        channels: int,
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        num_classes: int | None = 1000,
        size: int = 7,
        ratio: int = 4,
    ) -> None:
        super().__init__()
        widths = [channels << stage for stage in range(len(depths))]
        self.merges, self.merge_norms = nn.ModuleList(), nn.ModuleList()
        self.stages = nn.ModuleList()
        for stage, width in enumerate(widths):
            kernel, stride = (7, 4) if stage == 0 else (3, 2)
            before = widths[stage - 1] if stage else 3
            self.merges.append(nn.Conv2d(before, width, kernel, stride, kernel // 2))
            self.merge_norms.append(nn.LayerNorm(width, eps=EPSILON))
            blocks = [Block(width, heads[stage], size, ratio) for _ in range(depths[stage])]
            self.stages.append(nn.Sequential(*blocks))
        self.head = None if num_classes is None else nn.Linear(widths[-1], num_classes)
        shown = widths if num_classes is None else widths[-1:]
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=EPSILON) for width in shown)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """`[B, 3, H, W]` -> logits `[B, K]`, or maps `[B, C, H / s, W / s]`."""
        maps = []
        for merge, norm, blocks in zip(self.merges, self.merge_norms, self.stages, strict=True):
            tokens = blocks(norm(merge(x).permute(0, 2, 3, 1)))
            x = tokens.permute(0, 3, 1, 2)
            maps.append(tokens)
        if self.head is None:
            pairs = zip(self.norms, maps, strict=True)
            return [norm(tokens).permute(0, 3, 1, 2).contiguous() for norm, tokens in pairs]
        return self.head(self.norms[0](maps[-1]).mean(dim=(1, 2)))


_INSIDE = {  # names in ppvision -> names here, inside of a block
    "query.0": "query.depthwise",
    "query.1": "query.norm",
    "query.2": "query.pointwise",
}
_INSIDE |= {
    a.replace("query", n): b.replace("query", n)
    for n in ("key", "value")
    for a, b in _INSIDE.items()
}
_ENDS = {"_mean": "running_mean", "_variance": "running_var"}


def torch_name(name: str) -> str:
    """The name here of a parameter of `ppvision`'s."""
    for theirs, ours in _INSIDE.items():
        name = name.replace(f"attention.{theirs}.", f"attention.{ours}.")
    parts = name.split(".")
    if parts[0] == "merges":
        parts = [("merges", "merge_norms")[int(parts[2])], parts[1], *parts[3:]]
    parts[0] = {"feature_norms": "norms"}.get(parts[0], parts[0])
    if parts[0] == "norm":
        parts[:1] = ["norms", "0"]
    parts[-1] = _ENDS.get(parts[-1], parts[-1])
    return ".".join(parts)


def load(model: Pale, arrays: dict[str, np.ndarray]) -> None:
    """Put `ppvision`'s weights in: 1x1 convolutions become Linear, Paddle's Linear is turned."""
    own, given = model.state_dict(), {}
    for name, array in arrays.items():
        ours = torch_name(name)
        if array.ndim == 4 and own[ours].ndim == 2:
            array = array[:, :, 0, 0]
        elif array.ndim == 2:
            array = array.T
        given[ours] = torch.from_numpy(np.ascontiguousarray(array))
    counters = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    model.load_state_dict(given | counters)
