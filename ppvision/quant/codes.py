"""Integer codes of weights, nested so that a narrower code is the first bits of a wider one.

Source: "Vertical Layering of Quantized Neural Networks for Heterogeneous Inference", Wu, He, Tan,
Qi, Huang, TPAMI 2023, arXiv 2212.05326: a weight is a group of bits, and each dropped bit is a
layer that can be added again. We derived that a cascade of floors makes one bit per layer exact. We
chose signed codes without a zero.

    q_8 = clip(floor(w / s_8), -128, 127)        codes at the highest width
    q_k = q_8 >> (8 - k)                         those of width k: the k first of their 8 bits
    w_k = s_k (q_k + 1/2),  s_k = s_8 2^(8 - k)  the middle of the cell that q_k stands for

A step of 0 represents weights that are all zero, and gives zeros.

Bits are stored in planes. A plane contains one bit of every code, eight per byte, the first code in
the highest bit. The plane of the sign is first. So the planes of a narrow code are the first planes
of a wide one, and one more bit adds one plane, for all widths.
"""

from collections.abc import Sequence

import numpy as np

from ppvision.errors import InputError, shorten

MAX_BITS = 8
FLOAT_BITS = 32  # the width of a model without quantisation


def code_range(bits: int) -> tuple[int, int]:
    """Return the lowest and highest code of a width: -2^(bits-1), 2^(bits-1) - 1."""
    check_bits("bits", bits)
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def quantize_codes(
    weight: np.ndarray, step: np.ndarray | float, bits: int = MAX_BITS, axis: int | None = None
) -> np.ndarray:
    """Quantise weights: the code of each weight is `clip(floor(w / step))`.

    Args:
        weight: finite floats of any shape; float64 at most.
        step: size of a cell, at least 0: one number, or one per channel with `axis`.
        bits: bit-width of the codes, 1 to 8. Default 8.
        axis: axis of the channels. Default None: one step for all.

    Returns:
        int8 codes with the shape of the weight. They are 0 if the step is 0.

    Raises:
        ValueError: a weight is not finite, a step is negative or not finite, or the steps do not
            fit the axis.
    """
    low, high = code_range(bits)
    weight = np.asarray(weight)
    if not np.issubdtype(weight.dtype, np.floating):
        raise InputError(f"weight: expected floats, got {weight.dtype}.")
    if not np.isfinite(weight).all():
        raise InputError("weight: expected finite numbers, got nan or infinity. Train them again.")
    step = _aligned_step(step, weight.shape, axis)
    # A quotient is rounded, in float64 too, and may reach a border although the weight is below it.
    # `floor_divide` subtracts the exact remainder first.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        cells = np.floor_divide(weight.astype(np.float64), step)
    return np.where(step > 0, np.clip(cells, low, high), 0).astype(np.int8)


def _aligned_step(step: np.ndarray | float, shape: tuple[int, ...], axis: int | None) -> np.ndarray:
    """Return the steps in float64, in a shape that multiplies an array of `shape`."""
    step = np.asarray(step, np.float64)
    if axis is not None and not -len(shape) <= axis < len(shape):
        raise InputError(f"axis: expected one of the {len(shape)} of {list(shape)}, got {axis}.")
    expected = () if axis is None else (shape[axis],)
    if step.shape != expected:
        raise InputError(
            f"step: expected shape {list(expected)} for a weight {list(shape)} and axis {axis}, "
            f"got {list(step.shape)}."
        )
    if not (np.isfinite(step).all() and (step >= 0).all()):
        raise InputError("step: expected finite numbers of at least 0, got others.")
    if axis is None:
        return step
    aligned = [1] * len(shape)
    aligned[axis] = -1
    return step.reshape(aligned)


def dequantize_codes(
    codes: np.ndarray,
    step: np.ndarray | float,
    bits: int,
    top_bits: int = MAX_BITS,
    axis: int | None = None,
) -> np.ndarray:
    """Return the middle of the cell of each code: `step 2^(top_bits - bits) (code + 1/2)`.

    Args:
        codes: codes of width `bits`.
        step: step of width `top_bits`; one number, or one per channel with `axis`.
        bits: width of the codes.
        top_bits: width of the step, at least `bits`. Default 8.
        axis: axis of the channels. Default None: one step for all.

    Returns:
        float32 with the shape of the codes; exactly 0 if the step is 0.
    """
    codes = check_codes(codes, bits)
    _check_narrower(bits, top_bits)
    step = _aligned_step(step, codes.shape, axis) * 2.0 ** (top_bits - bits)
    return (step * (codes + 0.5)).astype(np.float32)


def downsample_codes(codes: np.ndarray, from_bits: int, to_bits: int) -> np.ndarray:
    """Return the codes of a lower width: the first `to_bits` bits of each code.

    Args:
        codes: codes of width `from_bits`, 1 to 8.
        to_bits: 1 to `from_bits`.

    Returns:
        int8 with the shape of the codes.
    """
    _check_narrower(to_bits, from_bits)
    return check_codes(codes, from_bits) >> (from_bits - to_bits)


def split_planes(
    codes: np.ndarray, bits: int, base_bits: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Split codes into codes of the lowest width and planes of the remaining bits.

    Args:
        codes: codes of width `bits`.
        bits: 1 to 8.
        base_bits: the lowest width, 1 to `bits`.

    Returns:
        int8 codes of width `base_bits`, and `bits - base_bits` arrays of 0 and 1 (uint8), the most
        significant bit first. All have the shape of the codes.
    """
    basic = downsample_codes(codes, bits, base_bits)
    shifts = range(bits - base_bits - 1, -1, -1)
    return basic, [((np.asarray(codes) >> shift) & 1).astype(np.uint8) for shift in shifts]


def join_planes(basic: np.ndarray, planes: Sequence[np.ndarray]) -> np.ndarray:
    """Join codes and planes; the inverse of `split_planes`.

    Args:
        basic: codes of the lowest width.
        planes: the next bits, any number of them, the most significant first.

    Returns:
        int8 codes with the shape of `basic`, one bit wider per plane.

    Raises:
        ValueError: a plane has another shape or values other than 0 and 1, or the codes do not fit
            8 bits.
    """
    codes = check_codes(basic, MAX_BITS).astype(np.int64)
    for number, plane in enumerate(planes):
        plane = np.asarray(plane)
        if plane.shape != codes.shape or not np.isin(plane, (0, 1)).all():
            raise InputError(
                f"planes: expected arrays {list(codes.shape)} of 0 and 1, number {number} is not."
            )
        codes = 2 * codes + plane
    return check_codes(codes, MAX_BITS)


def count_plane_bytes(count: int) -> int:
    """Return the number of bytes of one plane of `count` codes."""
    return -(-count // 8)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes into planes of bits.

    Args:
        codes: codes of width `bits`, any shape, in the order of rows.
        bits: 1 to 8.

    Returns:
        uint8 `[bits, ceil(count / 8)]`: sign first; bits beyond the last code are 0.
    """
    flat = check_codes(codes, bits).reshape(-1)
    shifts = np.arange(bits - 1, -1, -1, dtype=np.int8)[:, None]  # [bits, 1]
    return np.packbits((flat[None] >> shifts) & 1, axis=1)  # [bits, count] -> [bits, bytes]


def unpack_codes(packed: np.ndarray, count: int) -> np.ndarray:
    """Return the codes of planes; the inverse of `pack_codes`.

    Args:
        packed: uint8 `[bits, ceil(count / 8)]`, 1 to 8 planes.
        count: number of codes.

    Returns:
        int8 `[count]`.

    Raises:
        ValueError: the shape or type is wrong, or a bit after the last code is not 0.
    """
    packed = np.asarray(packed)
    if count < 0:
        raise InputError(f"count: expected at least 0, got {count}.")
    if packed.dtype != np.uint8 or packed.ndim != 2 or not 1 <= len(packed) <= MAX_BITS:
        raise InputError(
            f"packed: expected 1 to {MAX_BITS} planes of uint8, got {packed.dtype} "
            f"{list(packed.shape)}."
        )
    if packed.shape[1] != count_plane_bytes(count):
        raise InputError(
            f"packed: expected planes of {count_plane_bytes(count)} bytes for {count} codes, got "
            f"{packed.shape[1]}."
        )
    codes = np.zeros(count, np.int8)
    for number, plane in enumerate(packed):  # one after another: eight bytes per code are too many
        bits = np.unpackbits(plane).view(np.int8)  # [8 * bytes]
        if bits[count:].any():
            raise InputError("packed: expected zeros after the last code, got others.")
        codes = 2 * codes + bits[:count] if number else -bits[:count]  # sign first
    return codes


def check_bits(name: str, bits: int) -> None:
    """Raise `ValueError` unless `bits` is a whole number from 1 to 8."""
    whole = isinstance(bits, (int, np.integer)) and not isinstance(bits, bool)
    if not whole or not 1 <= bits <= MAX_BITS:
        raise InputError(
            f"{name}: expected a whole number from 1 to {MAX_BITS}, got {shorten(bits)}."
        )


def _check_narrower(bits: int, top_bits: int) -> None:
    check_bits("bits", bits)
    check_bits("bits", top_bits)
    if bits > top_bits:
        raise InputError(
            f"bits: expected at most {top_bits}, the width of the given codes, got {bits}. A wider "
            "code needs more planes."
        )


def check_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return the codes as int8.

    Raises:
        ValueError: they are not whole numbers, or outside the width.
    """
    low, high = code_range(bits)
    codes = np.asarray(codes)
    if not np.issubdtype(codes.dtype, np.integer):
        raise InputError(f"codes: expected whole numbers, got {codes.dtype}.")
    if codes.size and not (low <= codes.min() and codes.max() <= high):
        raise InputError(
            f"codes: expected {low} to {high} at {bits} bits, got {codes.min()} to {codes.max()}."
        )
    return codes.astype(np.int8)
