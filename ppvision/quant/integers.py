"""Weights and activations as 8-bit integers, for products in integer arithmetic.

    w = scale_c q,   q in -127..127, a scale per output channel c (symmetric: no zero point)
    x = step (q),    q in low..low + 255, one step per tensor

Source: the scheme of integer kernels on CPUs (oneDNN, OpenVINO, ONNX Runtime): Jacob et al.,
"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
CVPR 2018, arXiv 1712.05877. We chose the window of 256 codes for activations (`low`), which serves
ReLU (0..255), signed maps (-128..127) and GELU (a few negative codes) alike.

A layered weight has cell centres, `w = s (q + 1/2)`, which are integers at half the scale:
`w = (s / 2) (2q + 1)`. Up to 7 bits `2q + 1` fits in 8 bits and the two weights are equal. At 8
bits it would need nine: the integer graph then takes the first 7 bits of the codes.
"""

from dataclasses import dataclass

import numpy as np

from ppvision.errors import InputError

WEIGHT_LIMIT = 127  # the largest code of a weight; -128 is not used, so that both signs are equal
LAYERED_BITS = 7  # the largest width of a layered weight whose cell centres fit 8-bit integers
CODES = 256  # number of codes of an activation
INT8_LOW = -128

# Scales and steps that are tried, as fractions of the one without clipping.
_FRACTIONS = np.linspace(0.5, 1.0, 26, dtype=np.float32)


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as 8-bit integers.

    Attributes:
        codes: int8, of the weight's shape, -127 to 127.
        scale: float32 `[channels]`: the value of code 1; 0 for a channel of zeros.
        axis: of the channels.
    """

    codes: np.ndarray
    scale: np.ndarray
    axis: int

    def dequantize(self) -> np.ndarray:
        """Return the weight in float32, in its shape."""
        return self.codes * align(self.scale, self.codes.ndim, self.axis)


@dataclass(frozen=True)
class IntegerActivation:
    """The rounding of a layer's input to 256 codes: `step clip(round(x / step), low, high)`.

    Attributes:
        step: float32 above 0.
        low: the lowest code, -255 to 0. Zero is always one of the codes, so that padding is exact.
    """

    step: float
    low: int

    @property
    def high(self) -> int:
        """Return the highest code."""
        return self.low + CODES - 1


def align(values: np.ndarray, ndim: int, axis: int) -> np.ndarray:
    """Reshape `[channels]` to the axes of an array with its channels on `axis`."""
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def quantize_weight(weight: np.ndarray, axis: int) -> IntegerWeight:
    """Round a weight to 8-bit integers, with the scale per channel that has the lowest squared
    error.

    Args:
        weight: finite floats of any shape.
        axis: of the output channels.

    Raises:
        ValueError: a weight that is not finite.
    """
    weight = np.asarray(weight, np.float32)
    if not np.isfinite(weight).all():
        raise InputError("weight: expected finite numbers, got nan or infinity. Train them again.")
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)  # [channels, N]
    whole = np.abs(rows).max(axis=1, initial=0.0) / np.float32(WEIGHT_LIMIT)
    unit = np.where(whole > 0, whole, 1).astype(np.float32)
    errors = np.empty((len(_FRACTIONS), len(rows)), np.float64)
    for place, fraction in enumerate(_FRACTIONS):
        scale = (unit * fraction)[:, None]
        codes = np.clip(np.rint(rows / scale), -WEIGHT_LIMIT, WEIGHT_LIMIT)
        # float64, because squares of large weights overflow in float32.
        errors[place] = np.square(rows - codes * scale, dtype=np.float64).sum(axis=1)
    # For equal errors, the scale without clipping.
    best = len(_FRACTIONS) - 1 - errors[::-1].argmin(axis=0)
    scale = np.where(whole > 0, unit * _FRACTIONS[best], 0).astype(np.float32)
    divisor = align(np.where(scale > 0, scale, 1), weight.ndim, axis)
    codes = np.clip(np.rint(weight / divisor), -WEIGHT_LIMIT, WEIGHT_LIMIT).astype(np.int8)
    return IntegerWeight(codes, scale, axis)
