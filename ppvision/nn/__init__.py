"""Operators in pure Paddle: they know no framework above them."""

from ppvision.nn.layers import ChannelLayerNorm, DropPath
from ppvision.nn.pale_attention import PaleAttention, pale_merge, pale_partition

__all__ = ["ChannelLayerNorm", "DropPath", "PaleAttention", "pale_merge", "pale_partition"]
