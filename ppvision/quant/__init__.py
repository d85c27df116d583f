"""Layered quantization: one training, one stored model, any bit-width (TPAMI 2023, 2212.05326)."""

from ppvision.quant.codes import (
    dequantize_codes,
    downsample_codes,
    join_planes,
    pack_codes,
    quantize_codes,
    split_planes,
    unpack_codes,
)
from ppvision.quant.once_qat import OnceQAT
from ppvision.quant.quanters import LayeredActivationQuanter, LayeredWeightQuanter

__all__ = [
    "LayeredActivationQuanter",
    "LayeredWeightQuanter",
    "OnceQAT",
    "dequantize_codes",
    "downsample_codes",
    "join_planes",
    "pack_codes",
    "quantize_codes",
    "split_planes",
    "unpack_codes",
]
