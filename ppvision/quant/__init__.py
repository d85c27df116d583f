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
from ppvision.quant.store.files import LayeredModelError
from ppvision.quant.store.model import (
    LayeredDescription,
    LayeredModel,
    describe_layered,
    load_layered,
    save_layered,
)
from ppvision.quant.train.once_qat import OnceQAT
from ppvision.quant.train.quanters import LayeredActivationQuanter, LayeredWeightQuanter

__all__ = [
    "LayeredActivationQuanter",
    "LayeredDescription",
    "LayeredModel",
    "LayeredModelError",
    "LayeredWeightQuanter",
    "OnceQAT",
    "dequantize_codes",
    "describe_layered",
    "downsample_codes",
    "join_planes",
    "load_layered",
    "pack_codes",
    "quantize_codes",
    "save_layered",
    "split_planes",
    "unpack_codes",
]
