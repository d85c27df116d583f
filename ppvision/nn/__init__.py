"""Operators in pure Paddle, independent of PaddleSeg and PaddleDetection."""

from ppvision.nn.flops import FLOP_COUNTERS
from ppvision.nn.layers import ChannelLayerNorm, DropPath
from ppvision.nn.pale_attention import PaleAttention, pale_merge, pale_partition
from ppvision.nn.semantic_diffusion import (
    SemanticDifferenceConv2D,
    SemanticDiffusion,
    SemanticDiffusionPyramid,
)

__all__ = [
    "FLOP_COUNTERS",
    "ChannelLayerNorm",
    "DropPath",
    "PaleAttention",
    "SemanticDifferenceConv2D",
    "SemanticDiffusion",
    "SemanticDiffusionPyramid",
    "pale_merge",
    "pale_partition",
]
