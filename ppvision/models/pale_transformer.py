"""Pale Transformer: a four-stage backbone whose attention is pale-shaped.

Source: Wu, Wu, Tan, Guo, AAAI 2022, arXiv 2112.14000. The authors did not release their code. The
    widths, depths and pale sizes below are the only ones that give the published sizes and costs
    (`docs/pale.md` derives them). We chose heads, drop path and initial values. `pale_nano` is
    ours: the same design, small enough to train on two CPU cores.

    variant     C    depths      heads       parameters   multiply-adds at 224
    pale_nano   32   1, 2, 2, 1   2, 2, 4, 8     1,978,600      428,131,840
    pale_tiny   64   2, 2, 16, 2  2, 4, 8, 16   21,748,712    4,202,551,296
    pale_small  96   2, 2, 16, 2  2, 4, 8, 16   48,308,200    8,977,204,224
    pale_base   128  2, 2, 16, 2  4, 8, 16, 32  85,324,776   15,534,108,672

Parameters are the trainable ones with 1000 classes; Paddle's `parameters()` also contains
BatchNorm's running statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from paddle import Tensor, nn

from ppvision.models.base import Stage, ZooModel, check_rate
from ppvision.nn import ChannelLayerNorm, DropPath, PaleAttention
from ppvision.nn.pale_attention import SeparableConv

STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True)
class PaleConfig:
    """The values of one variant."""

    channels: int  # C of the first stage; the others have 2C, 4C, 8C
    depths: tuple[int, int, int, int]
    num_heads: tuple[int, int, int, int]  # of both branches together
    drop_path_rate: float  # of the last block; rises linearly from 0
    pale_size: int | tuple[int, int] = 7
    mlp_ratio: int = 4

    @property
    def stage_channels(self) -> tuple[int, ...]:
        return tuple(self.channels * 2**stage for stage in range(len(self.depths)))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the groups of a stage. The patch merging before a stage belongs to its first
        block. (The first merging is the stem.)"""
        found = []
        for stage, channels in enumerate(self.stage_channels):
            groups = [[f"stages.{stage}.{block}"] for block in range(self.depths[stage])]
            if stage or not groups:
                groups = groups or [[]]
                groups[0].insert(0, f"merges.{stage}")
            found.append(Stage(channels, STRIDES[stage], tuple(map(tuple, groups))))
        return tuple(found)


VARIANTS = {
    "pale_nano": PaleConfig(32, (1, 2, 2, 1), (2, 2, 4, 8), 0.05),
    "pale_tiny": PaleConfig(64, (2, 2, 16, 2), (2, 4, 8, 16), 0.1),
    "pale_small": PaleConfig(96, (2, 2, 16, 2), (2, 4, 8, 16), 0.3),
    "pale_base": PaleConfig(128, (2, 2, 16, 2), (4, 8, 16, 32), 0.5),
}


class PatchMerging(nn.Sequential):
    """Overlapping patch merging: a strided convolution, then LayerNorm.

    Shapes: `[B, in_channels, H, W]` -> `[B, out_channels, ceil(H / stride), ceil(W / stride)]`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__(
            nn.Conv2D(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2),
            ChannelLayerNorm(out_channels),
        )


class Mlp(nn.Sequential):
    """Two pointwise layers with GELU between. Shapes: `[B, C, H, W]` -> the same."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__(
            nn.Conv2D(channels, channels * ratio, 1),
            nn.GELU(),
            nn.Conv2D(channels * ratio, channels, 1),
        )


class PaleBlock(nn.Layer):
    """Conditional position encoding, PS-Attention and MLP, each with a residual connection.

    Shapes: `[B, C, H, W]` -> the same.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        pale_size: int | tuple[int, int],
        mlp_ratio: int,
        drop_path: float,
        mask_padding: bool,
        fused: bool | None,
    ) -> None:
        super().__init__()
        self.position = nn.Conv2D(channels, channels, 3, padding=1, groups=channels)
        self.norm1 = ChannelLayerNorm(channels)
        self.attention = PaleAttention(
            channels, num_heads, pale_size, mask_padding=mask_padding, fused=fused
        )
        self.norm2 = ChannelLayerNorm(channels)
        self.mlp = Mlp(channels, mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position(x)
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _init_weights(layer: nn.Layer) -> None:
    """Initialise like Swin and CSWin (we chose this): truncated normal (0.02) for pointwise layers;
    larger convolutions keep the variance (Kaiming)."""
    if isinstance(layer, nn.Linear) or (
        isinstance(layer, nn.Conv2D) and layer._kernel_size == [1, 1]
    ):
        nn.initializer.TruncatedNormal(std=0.02)(layer.weight)
    elif isinstance(layer, nn.Conv2D):
        nn.initializer.KaimingNormal()(layer.weight)
    else:
        return
    if layer.bias is not None:
        nn.initializer.Constant(0.0)(layer.bias)


class PaleTransformer(ZooModel):
    """The backbone, with a classification head or as a feature pyramid.

    Args:
        config: widths, depths, heads (`VARIANTS` has the named ones).
        num_classes: outputs of the head; 0: no head. Default 1000.
        features_only: return feature maps, without a head. Default False.
        out_indices: feature maps to return, counted from the finest; None: all four.
        in_channels: channels of the image. Default 3.
        pale_size: rows and columns of a pale; None: from the config (7).
        drop_path_rate: stochastic depth of the last block; None: from the config.
        mask_padding: see `PaleAttention`.
        fused: see `PaleAttention`.
        recompute: compute the activations inside blocks again in the backward pass. This needs less
            memory, but runs the forward pass of the blocks twice. Default False.

    Shapes: images `[B, in_channels, H, W]`, any H and W of at least 1 -> logits
    `[B, num_classes]`, or with `features_only` a list of `[B, C_i, ceil(H / s), ceil(W / s)]` at
    strides s = 4, 8, 16, 32, each after its own LayerNorm, as in Swin and CSWin.

    Attributes:
        config: the argument. The others are those of `ZooModel`.

    Raises:
        ValueError: a number is out of its range, or sizes do not fit together (see
            `PaleAttention`).
    """

    first_conv = "merges.0.0"
    classifier = "head"
    stem_layers = ("merges.0",)
    behind_stages = ("norm", "head", "feature_norms")
    init_weights = staticmethod(_init_weights)

    def __init__(
        self,
        config: PaleConfig,
        *,
        num_classes: int = 1000,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        in_channels: int = 3,
        pale_size: int | tuple[int, int] | None = None,
        drop_path_rate: float | None = None,
        mask_padding: bool = True,
        fused: bool | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        count = self.declare(
            config.stages,
            num_classes=num_classes,
            in_channels=in_channels,
            features_only=features_only,
            out_indices=out_indices,
            recompute=recompute,
        )
        pale_size = config.pale_size if pale_size is None else pale_size
        rate = config.drop_path_rate if drop_path_rate is None else drop_path_rate
        check_rate("drop_path_rate", rate)
        depth = sum(config.depths)
        drop_paths = iter(rate * block / max(1, depth - 1) for block in range(depth))

        self.merges = nn.LayerList()
        self.stages = nn.LayerList()
        previous = in_channels
        for stage, channels in enumerate(config.stage_channels[:count]):
            kernel_size, stride = (7, 4) if stage == 0 else (3, 2)
            self.merges.append(PatchMerging(previous, channels, kernel_size, stride))
            self.stages.append(
                nn.LayerList(
                    PaleBlock(
                        channels,
                        config.num_heads[stage],
                        pale_size,
                        config.mlp_ratio,
                        next(drop_paths),
                        mask_padding,
                        fused,
                    )
                    for _ in range(config.depths[stage])
                )
            )
            previous = channels
        if features_only:
            # Named by the stage's number, so that weights of the whole pyramid fit a part of it.
            self.feature_norms = nn.LayerDict(
                {
                    str(i): ChannelLayerNorm(c)
                    for i, c in zip(self.out_indices, self.feat_channels, strict=True)
                }
            )
        else:
            self.norm = ChannelLayerNorm(previous)
            self.head = self.make_head(num_classes)
        self.apply(_init_weights)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The output of each stage, before any norm: `[B, C_i, H / s, W / s]`, s = 4, 8, 16, 32."""
        features = []
        for merge, blocks in zip(self.merges, self.stages):  # noqa: B905 (to_static has no strict)
            x = merge(x)
            for block in blocks:
                x = self.run_block(block, x)
            features.append(x)
        return features

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.forward_stages(x)[-1])  # [B, 8C, H/32, W/32]

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        stages = self.forward_stages(x)
        return [self.feature_norms[str(i)](stages[i]) for i in self.out_indices]


def multiply_adds(
    config: PaleConfig,
    height: int,
    width: int,
    *,
    num_classes: int | None = 1000,
    in_channels: int = 3,
    pale_size: int | tuple[int, int] | None = None,
) -> int:
    """Multiply-adds of one image: convolutions, Linear layers and the two attention products.

    Per block on an h x w map, padded to h' x w' for attention (derived; `docs/pale.md`):
    depthwise convolutions `9C(hw + 3h'w')`, q, k, v `3h'w'C^2`, the products
    `h'w'C(s_r*w' + s_c*h')`, output projection `hwC^2`, MLP `2*ratio*hwC^2`.

    Args:
        config: the variant.
        height, width: size of the image in pixels.
        num_classes: outputs of the head; None: only the features.
        in_channels: channels of the image.
        pale_size: None: from the config.
    """
    size = config.pale_size if pale_size is None else pale_size
    rows, columns = size if isinstance(size, Sequence) else (size, size)
    total, previous, h, w = 0, in_channels, height, width
    for stage, (channels, depth) in enumerate(
        zip(config.stage_channels, config.depths, strict=True)
    ):
        kernel_size, stride = (7, 4) if stage == 0 else (3, 2)
        h, w = -(-h // stride), -(-w // stride)
        total += h * w * channels * previous * kernel_size**2
        ph, pw = -(-h // rows) * rows, -(-w // columns) * columns
        area, padded = h * w, ph * pw
        depthwise = 9 * channels * (area + 3 * padded)
        products = padded * channels * (rows * pw + columns * ph)
        pointwise = channels**2 * (3 * padded + area + 2 * config.mlp_ratio * area)
        total += depth * (depthwise + products + pointwise)
        previous = channels
    return total if num_classes is None else total + previous * num_classes


__all__ = [
    "STRIDES",
    "VARIANTS",
    "Mlp",
    "PaleBlock",
    "PaleConfig",
    "PaleTransformer",
    "PatchMerging",
]
__all__ += ["SeparableConv", "multiply_adds"]
