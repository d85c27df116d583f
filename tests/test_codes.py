"""Codes: every one at every width, and properties against definitions in plain Python."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ppvision.quant import (
    dequantize_codes,
    downsample_codes,
    join_planes,
    pack_codes,
    quantize_codes,
    split_planes,
    unpack_codes,
)
from ppvision.quant.codes import code_range
from tests.helpers.messages import raises_naming

WIDTHS = range(1, 9)
PAIRS = [(wide, narrow) for wide in WIDTHS for narrow in range(1, wide + 1)]


def all_codes(bits: int) -> np.ndarray:
    return np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=np.int8)


def float32s(low: float, high: float):
    return st.floats(low, high, width=32, allow_nan=False)


# -- every code ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wide", "narrow"), PAIRS)
def test_downsampling_is_a_floor_division(wide, narrow):
    codes = all_codes(wide)
    found = downsample_codes(codes, wide, narrow)
    assert found.dtype == np.int8
    assert found.tolist() == [int(code) // 2 ** (wide - narrow) for code in codes]
    assert set(found.tolist()) == set(all_codes(narrow).tolist())


@pytest.mark.parametrize(("wide", "narrow"), PAIRS)
def test_downsampling_goes_by_way_of_any_width_between(wide, narrow):
    direct = downsample_codes(all_codes(wide), wide, narrow)
    for between in range(narrow, wide + 1):
        step = downsample_codes(all_codes(wide), wide, between)
        np.testing.assert_array_equal(downsample_codes(step, between, narrow), direct)


@pytest.mark.parametrize(("wide", "narrow"), PAIRS)
def test_split_and_join(wide, narrow):
    codes = all_codes(wide).reshape(2, -1)
    basic, planes = split_planes(codes, wide, narrow)
    np.testing.assert_array_equal(basic, downsample_codes(codes, wide, narrow))
    assert len(planes) == wide - narrow
    for count in range(len(planes) + 1):  # every prefix of planes is a narrower model
        joined = join_planes(basic, planes[:count])
        assert joined.dtype == np.int8
        np.testing.assert_array_equal(joined, downsample_codes(codes, wide, narrow + count))
    assert all(p.dtype == np.uint8 and p.shape == codes.shape for p in planes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_joining_any_bits_and_splitting_them_again(bits):
    for narrow in range(1, bits + 1):
        for basic in all_codes(narrow):
            for number in range(2 ** (bits - narrow)):
                text = f"{number:0{bits - narrow}b}" if bits > narrow else ""
                planes = [np.array(int(bit)) for bit in text]
                joined = join_planes(np.array(basic), planes)
                again, found = split_planes(joined, bits, narrow)
                assert (int(again), [int(p) for p in found]) == (int(basic), [*map(int, planes)])


def packed_bit_by_bit(codes: list[int], bits: int) -> list[list[int]]:
    """Two's complement as text, a plane a bit, eight codes to a byte."""
    texts = [f"{code % 2**bits:0{bits}b}" for code in codes]
    planes = []
    for place in range(bits):
        plane = "".join(text[place] for text in texts)
        plane += "0" * (-len(plane) % 8)
        planes.append([int(plane[i : i + 8], 2) for i in range(0, len(plane), 8)])
    return planes


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 15, 16, 17, 31, 100])
def test_packing_against_a_bit_by_bit_reference(bits, count):
    low, high = code_range(bits)
    codes = np.random.default_rng(bits).integers(low, high + 1, count).astype(np.int8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (bits, math.ceil(count / 8))
    assert packed.tolist() == packed_bit_by_bit(codes.tolist(), bits)
    found = unpack_codes(packed, count)
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_every_code(bits):
    codes = all_codes(bits)
    packed = pack_codes(codes, bits)
    assert packed.tolist() == packed_bit_by_bit(codes.tolist(), bits)
    np.testing.assert_array_equal(unpack_codes(packed, len(codes)), codes)


@pytest.mark.parametrize(("wide", "narrow"), PAIRS)
def test_the_first_planes_are_those_of_the_narrow_codes(wide, narrow):
    codes = all_codes(wide)
    narrow_codes = downsample_codes(codes, wide, narrow)
    np.testing.assert_array_equal(
        pack_codes(codes, wide)[:narrow], pack_codes(narrow_codes, narrow)
    )


def test_packing_goes_row_by_row():
    codes = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
    np.testing.assert_array_equal(pack_codes(codes, 4), pack_codes(codes.reshape(-1), 4))
    turned = codes.T  # not contiguous
    np.testing.assert_array_equal(unpack_codes(pack_codes(turned, 4), 12), turned.reshape(-1))


# -- properties ------------------------------------------------------------------------------------


def naive_codes(weight: np.ndarray, step: np.ndarray | float, bits: int, axis: int | None) -> list:
    """The definition, a weight at a time."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    found = np.zeros(weight.shape, np.int64)
    for index in np.ndindex(weight.shape):
        own = float(step if axis is None else step[index[axis]])
        if own > 0:
            ratio = float(weight[index]) / own
            found[index] = (
                max(low, min(high, math.floor(ratio)))
                if math.isfinite(ratio)
                else (high if ratio > 0 else low)
            )
    return found.tolist()


@settings(max_examples=150, deadline=None)
@given(data=st.data(), bits=st.integers(1, 8))
def test_quantize_against_the_definition(data, bits):
    shape = data.draw(st.tuples(*[st.integers(1, 4)] * data.draw(st.integers(1, 3))))
    weight = data.draw(arrays(np.float32, shape, elements=float32s(-4, 4)))
    axis = data.draw(st.sampled_from([None, *range(len(shape))]))
    count = 1 if axis is None else shape[axis]
    step = data.draw(arrays(np.float32, count, elements=float32s(0, 2)))
    step = step[0] if axis is None else step
    found = quantize_codes(weight, step, bits, axis)
    assert found.dtype == np.int8
    assert found.tolist() == naive_codes(weight, step, bits, axis)


@settings(max_examples=150, deadline=None)
@given(
    weight=arrays(np.float32, st.integers(0, 40), elements=float32s(-300, 300)),
    step=float32s(2.0**-10, 4),
    bits=st.integers(1, 8),
)
def test_quantizing_at_once_is_quantizing_and_downsampling(weight, step, bits):
    wide = quantize_codes(weight, step)
    np.testing.assert_array_equal(
        quantize_codes(weight, step * 2.0 ** (8 - bits), bits), downsample_codes(wide, 8, bits)
    )


@settings(max_examples=150, deadline=None)
@given(
    codes=arrays(
        np.int8, st.tuples(st.integers(1, 3), st.integers(1, 5)), elements=st.integers(-8, 7)
    ),
    step=float32s(0, 10),
    top_bits=st.integers(4, 8),
)
def test_dequantize_against_the_definition(codes, step, top_bits):
    found = dequantize_codes(codes, step, 4, top_bits)
    assert found.dtype == np.float32
    expected = [[step * 2 ** (top_bits - 4) * (int(c) + 0.5) for c in row] for row in codes]
    np.testing.assert_array_equal(found, np.float32(expected))


@settings(max_examples=100, deadline=None)
@given(bits=st.integers(1, 8), data=st.data())
def test_a_centre_has_the_code_of_its_cell(bits, data):
    step = data.draw(arrays(np.float32, 3, elements=float32s(2.0**-20, 2.0**20)))
    low, high = code_range(bits)
    codes = data.draw(arrays(np.int8, (2, 3), elements=st.integers(low, high)))
    centres = dequantize_codes(codes, step, bits, bits, axis=1)
    np.testing.assert_array_equal(quantize_codes(centres, step, bits, axis=1), codes)


@settings(max_examples=100, deadline=None)
@given(weight=arrays(np.float32, 20, elements=float32s(-1, 1)), bits=st.integers(1, 8))
def test_the_error_is_at_most_half_a_cell_inside_of_the_range(weight, bits):
    step = 2.0 / 2**bits  # nothing but 1 itself is clipped
    found = dequantize_codes(quantize_codes(weight, step, bits), step, bits, bits)
    assert np.abs(found - weight).max() <= step / 2


# -- ends of the range -----------------------------------------------------------------------------


def test_a_step_of_zero_gives_zeros():
    weight = np.zeros((3, 4), np.float32)
    codes = quantize_codes(weight, 0.0)
    assert not codes.any()
    np.testing.assert_array_equal(dequantize_codes(codes, 0.0, 8), weight)


def test_a_channel_of_zeros_beside_others():
    weight = np.float32([[0, 0, 0], [-1, 0.5, 1]])
    step = np.float32([0, 1 / 128])
    codes = quantize_codes(weight, step, axis=0)
    assert codes.tolist() == [[0, 0, 0], [-128, 64, 127]]
    centres = dequantize_codes(codes, step, 8, axis=0)
    assert not centres[0].any()
    assert centres.tolist()[1] == [-127.5 / 128, 64.5 / 128, 127.5 / 128]
    narrow = downsample_codes(codes, 8, 2)
    assert not dequantize_codes(narrow, step, 2, axis=0)[0].any()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1)])
def test_single_elements(shape):
    codes = quantize_codes(np.full(shape, -0.3, np.float32), 0.1)
    assert codes.shape == shape
    assert codes.reshape(-1).tolist() == [-4]  # float32's -0.3 lies below -3 steps
    assert dequantize_codes(codes, 0.1, 8).shape == shape
    assert pack_codes(codes, 8).tolist() == [[128]] * 6 + [[0], [0]]
    np.testing.assert_array_equal(unpack_codes(pack_codes(codes, 8), 1), codes.reshape(-1))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty_arrays(shape):
    codes = quantize_codes(np.zeros(shape, np.float32), 0.5, 4)
    assert codes.shape == shape
    assert downsample_codes(codes, 4, 2).shape == shape
    basic, planes = split_planes(codes, 4, 2)
    assert join_planes(basic, planes).shape == shape
    assert dequantize_codes(codes, 0.5, 4).shape == shape
    assert pack_codes(codes, 4).shape == (4, 0)
    assert unpack_codes(np.zeros((4, 0), np.uint8), 0).shape == (0,)


def test_empty_channels():
    codes = quantize_codes(np.zeros((0, 3), np.float32), np.zeros(0, np.float32), axis=0)
    assert codes.shape == (0, 3)


@pytest.mark.parametrize("step", [1e30, 1e-38, float(np.nextafter(np.float32(0), np.float32(1)))])
def test_huge_and_tiny_steps(step):
    step = np.float32(step)
    weight = np.float32([-200, -1.5, -1, 0, 0.5, 1, 126.5]) * step
    codes = quantize_codes(weight, step)
    assert codes.tolist() == naive_codes(weight, step, 8, None)
    assert codes[[0, 3, -1]].tolist() == [-128, 0, 126]
    for bits in WIDTHS:
        centres = dequantize_codes(downsample_codes(codes, 8, bits), step, bits)
        assert np.isfinite(centres).all()


def test_a_step_that_is_far_from_its_weights():
    weight = np.float32([-3e38, -1e-30, 0, 1e-30, 3e38])
    assert quantize_codes(weight, 1e-38).tolist() == [-128, -128, 0, 127, 127]
    assert quantize_codes(weight, 5e-324).tolist() == [-128, -128, 0, 127, 127]
    assert quantize_codes(weight, np.float32(3e38)).tolist() == [-1, -1, 0, 0, 1]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_of_any_width(dtype):
    assert quantize_codes(np.array([-0.75, 0.5], dtype), 0.25, 3).tolist() == [-3, 2]


def test_a_negative_axis():
    weight = np.float32([[1, 10], [2, 20]])
    codes = quantize_codes(weight, np.float32([1, 10]), axis=-1)
    assert codes.tolist() == [[1, 1], [2, 2]]
    centres = dequantize_codes(codes, np.float32([1, 10]), 8, axis=-1)
    assert centres.tolist() == [[1.5, 15], [2.5, 25]]


# -- errors ----------------------------------------------------------------------------------------

ONES = np.ones((2, 3), np.float32)
CODES = np.zeros(3, np.int8)


@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, True, "4", None])
def test_widths_that_are_none(bits):
    for call in (
        lambda: quantize_codes(ONES, 1.0, bits),
        lambda: dequantize_codes(CODES, 1.0, bits),
        lambda: dequantize_codes(CODES, 1.0, 1, bits),
        lambda: downsample_codes(CODES, 8, bits),
        lambda: downsample_codes(CODES, bits, 1),
        lambda: split_planes(CODES, 8, bits),
        lambda: pack_codes(CODES, bits),
    ):
        with pytest.raises(ValueError, match="bits:"):
            call()


@pytest.mark.parametrize(
    ("call", "tokens"),
    [
        (lambda: quantize_codes(np.float32([1, np.nan]), 1.0), "weight: finite"),
        (lambda: quantize_codes(np.float32([1, np.inf]), 1.0), "weight: finite"),
        (lambda: quantize_codes(np.array([1, 2]), 1.0), "weight: floats int64"),
        (lambda: quantize_codes(np.array(["a"]), 1.0), "weight: floats <U1"),
        (lambda: quantize_codes(None, 1.0), "weight: floats object"),
        (lambda: quantize_codes(ONES, np.nan), "step: finite"),
        (lambda: quantize_codes(ONES, np.inf), "step: finite"),
        (lambda: quantize_codes(ONES, -0.1), "step: finite 0"),
        (lambda: quantize_codes(ONES, [1.0, 1.0]), "step: [] axis None [2]"),
        (lambda: quantize_codes(ONES, [1.0, 1.0], axis=1), "step: [3] axis 1 [2]"),
        (lambda: quantize_codes(ONES, 1.0, axis=0), "step: [2] axis 0 []"),
        (lambda: quantize_codes(ONES, [1.0], axis=2), "axis: [2, 3] 2"),
        (lambda: quantize_codes(ONES, [1.0], axis=-3), "axis: [2, 3] -3"),
        (lambda: dequantize_codes(np.int8([8]), 1.0, 4), "codes: -8 7 4 bits 8"),
        (lambda: dequantize_codes(ONES, 1.0, 4), "codes: whole float32"),
        (lambda: dequantize_codes(CODES, 1.0, 8, 4), "bits: most 4 8"),
        (lambda: dequantize_codes(CODES, np.nan, 8), "step: finite"),
        (lambda: dequantize_codes(CODES, [1.0], 8, axis=1), "axis: [3] 1"),
        (lambda: downsample_codes(np.int16([200]), 8, 4), "codes: -128 127 8 bits 200"),
        (lambda: downsample_codes(CODES, 2, 4), "bits: most 2 4"),
        (lambda: downsample_codes(np.zeros(2, bool), 2, 1), "codes: whole bool"),
        (lambda: split_planes(np.int8([4]), 3, 2), "codes: -4 3 bits 4"),
        (lambda: join_planes(CODES, [np.int8([0, 1, 2])]), "planes: [3] 0"),
        (lambda: join_planes(CODES, [np.zeros(2, np.uint8)]), "planes: [3] 0 1"),
        (lambda: join_planes(np.int8([127]), [[1]]), "codes: 8 bits 255"),
        (lambda: pack_codes(np.int8([-5]), 3), "codes: -4 3 bits -5"),
        (lambda: unpack_codes(np.zeros((2, 1), np.int8), 3), "packed: uint8 int8 [2, 1]"),
        (lambda: unpack_codes(np.zeros(2, np.uint8), 3), "packed: uint8 [2]"),
        (lambda: unpack_codes(np.zeros((9, 1), np.uint8), 3), "packed: 1 8 [9, 1]"),
        (lambda: unpack_codes(np.zeros((0, 1), np.uint8), 3), "packed: 1 8 [0, 1]"),
        (lambda: unpack_codes(np.zeros((2, 2), np.uint8), 3), "packed: 1 bytes 3 codes, 2"),
        (lambda: unpack_codes(np.uint8([[16]]), 3), "packed: zeros last"),
        (lambda: unpack_codes(np.zeros((2, 0), np.uint8), -1), "count: -1"),
    ],
)
def test_errors(call, tokens):
    with raises_naming(ValueError, *tokens.split()):
        call()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(3))
def test_weights_at_the_borders_of_cells(dtype, seed):
    """Against exact arithmetic: in float64 a quotient just below a border is rounded to it."""
    generator = np.random.default_rng(seed)
    steps = generator.uniform(1e-3, 1, 300)
    borders = np.arange(300) % 256 - 128
    on = (borders * steps).astype(dtype)
    below, above = (np.nextafter(on, dtype(end)) for end in (-np.inf, np.inf))
    for weight in (below, on, above):
        expected = [
            min(max(math.floor(Fraction(float(w)) / Fraction(float(s))), -128), 127)
            for w, s in zip(weight, steps, strict=True)
        ]
        np.testing.assert_array_equal(quantize_codes(weight, steps, 8, 0), expected)
