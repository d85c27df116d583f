"""Random integer layers: whole numbers in NumPy against eager mode, Paddle Inference (OpenVINO in
integers, oneDNN in float) and ONNX Runtime.

Every layer is given codes, and gives a sum of products of whole numbers, times a scale per channel,
plus a bias. The reference adds those up in int64, by its own windows and not by Paddle's.
"""

import os
from dataclasses import dataclass

import numpy as np
import paddle
import pytest
from paddle import nn

from ppvision.deploy.run.engines import OnnxRuntime, has_openvino
from ppvision.deploy.run.isolated import IsolatedRuntime
from ppvision.deploy.run.manifest import FILES
from ppvision.deploy.run.precision import find_integer_unit, find_usable_flags
from ppvision.deploy.verify.running import run_in_openvino
from ppvision.deploy.write.graph import Products, save_graph, trace_products
from ppvision.deploy.write.onnx_integers import write_onnx_products
from ppvision.deploy.write.openvino import write_products
from ppvision.quant.integers import WEIGHT_LIMIT, IntegerActivation, IntegerWeight
from ppvision.quant.packed import IntegerRounding, copy_with_integers
from ppvision.quant.train.quanters import find_channel_axis

PER_GRAPH = 200
# Other layers are the same code: by default 200 in OpenVINO and 200 others in ONNX Runtime, by
# --all ten thousand in both.
GRAPHS = [pytest.param(k, marks=() if k < 1 else pytest.mark.all) for k in range(50)]
TOLERANCE = 1e-6  # of what a channel's codes, with the largest code of the input, could give


@dataclass
class Case:
    """One layer, and what goes into it and must come out."""

    layer: nn.Layer  # in integers
    x: np.ndarray  # float32, whole steps, some beyond the highest code
    expected: np.ndarray  # float64
    largest: np.ndarray  # per channel, with the axes of `expected`: what errors are compared with


def one_of(random, *values):
    return values[int(random.integers(len(values)))]


def random_layer(random: np.random.Generator) -> tuple[nn.Layer, list[int]]:
    """A layer in float, and the shape of its input."""
    kind = one_of(random, "conv", "conv", "conv", "depthwise", "linear", "transpose")
    bias = None if random.random() < 0.7 else False
    if kind == "linear":
        inputs, outputs = (int(n) for n in random.integers(1, 40, 2))
        return nn.Linear(inputs, outputs, bias_attr=bias), [one_of(random, 1, 3), 5, inputs]
    groups = one_of(random, 1, 1, 1, 2, 4)
    inputs, outputs = (groups * int(n) for n in random.integers(1, 13, 2))
    if kind == "depthwise":
        groups = inputs = outputs = int(random.integers(1, 33))
    kernel = [int(n) for n in random.integers(1, 6, 2)]
    stride = [int(n) for n in random.integers(1, 4, 2)]
    dilation = [int(n) for n in random.integers(1, 4, 2)]
    if kind == "transpose":
        dilation, groups = [1, 1], 1
        layer = nn.Conv2DTranspose(inputs, outputs, kernel, stride, 0, bias_attr=bias)
        return layer, [1, inputs, *(int(n) for n in random.integers(2, 7, 2))]
    padding = [int(random.integers(0, k)) for k in kernel]
    layer = nn.Conv2D(inputs, outputs, kernel, stride, padding, dilation, groups, bias_attr=bias)
    least = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    sides = [max(3, n + int(random.integers(0, 6))) for n in least]
    return layer, [one_of(random, 1, 1, 2), inputs, *sides]


def make_case(random: np.random.Generator, limit: int = WEIGHT_LIMIT) -> Case:
    """A layer whose weight has the codes -limit to limit."""
    layer, shape = random_layer(random)
    axis = find_channel_axis(layer)
    weight_shape = layer.weight.shape
    codes = random.integers(-limit, limit + 1, weight_shape).astype(np.int8)
    if random.random() < 0.2:
        codes = np.where(codes < 0, -limit, limit).astype(np.int8)  # sums as large as can be
    far = random.random() < 0.15  # scales that no trained layer has
    exponents = (-15, 10) if far else (-6, 2)
    scale = (10.0 ** random.uniform(*exponents, weight_shape[axis])).astype(np.float32)
    if random.random() < 0.3:  # a channel of zeros
        dead = [slice(None)] * len(weight_shape)
        dead[axis] = int(random.integers(weight_shape[axis]))
        codes[tuple(dead)], scale[dead[axis]] = 0, 0
    low = one_of(random, 0, 0, -128, int(random.integers(-255, 1)))
    step = float(np.float32(10.0 ** random.uniform(*((-12, 6) if far else (-4, 2)))))
    if step < 1e-6 and low:  # as calibration does
        low = -128
    whole = random.integers(low, low + 256, shape)
    if random.random() < 0.2:
        whole[...] = low + 255
    if layer.bias is not None:  # Paddle's are 0 at first
        some = random.normal(0, 1000, layer.bias.shape) * np.resize(scale, layer.bias.shape) * step
        layer.bias.set_value(some.astype(np.float32))
    model = nn.Sequential(layer)
    weight = IntegerWeight(codes, scale, axis)
    held = copy_with_integers(model, {"0": weight}, {"0": IntegerActivation(step, low)})[0]
    step = float(held.activation.scale.numpy()[0]) / 127
    x = (whole * step).astype(np.float32)
    if low in (0, -128) and random.random() < 0.3:  # fewer codes, as learned at fewer bits
        half = 2 ** int(random.integers(0, 7))
        limits = (0, 2 * half - 1) if low == 0 else (-half, half - 1)
        held.activation = IntegerRounding(IntegerActivation(step, low), limits)
        whole = np.clip(whole, *limits)
    sums = integer_sums(layer, whole, codes.astype(np.int64))
    # OpenVINO has the zero point in float32, so its digits count by the largest code of the window.
    window = np.full_like(whole, max(-low, low + 255))
    most = integer_sums(layer, window, np.abs(codes.astype(np.int64)))
    channels = 1 if isinstance(layer, (nn.Conv2D, nn.Conv2DTranspose)) else sums.ndim - 1
    aligned = [1] * sums.ndim
    aligned[channels] = -1
    bias = 0.0 if layer.bias is None else layer.bias.numpy().astype(np.float64).reshape(aligned)
    scales = np.tile(scale, sums.shape[channels] // len(scale)).astype(np.float64)
    expected = sums * step * scales.reshape(aligned) + bias
    # A channel of small scale stands beside one of large scale: each is compared with itself.
    others = tuple(n for n in range(sums.ndim) if n != channels)
    largest = (most * step * scales.reshape(aligned) + np.abs(bias)).max(others, keepdims=True)
    return Case(held, x, expected, np.maximum(largest, 1e-30))


def integer_sums(layer: nn.Layer, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The layer's sums of products of whole numbers, int64."""
    if isinstance(layer, nn.Linear):
        return x @ weight
    if isinstance(layer, nn.Conv2DTranspose):
        return transposed_sums(layer, x, weight)
    (top, left), groups = layer._updated_padding, layer._groups
    padded = np.pad(x, [(0, 0), (0, 0), (top, top), (left, left)])
    rows, columns = (
        d * (k - 1) + 1 for d, k in zip(layer._dilation, layer._kernel_size, strict=True)
    )
    windows = np.lib.stride_tricks.sliding_window_view(padded, (rows, columns), axis=(2, 3))
    (down, right), (dy, dx) = layer._stride, layer._dilation
    windows = windows[:, :, ::down, ::right, ::dy, ::dx]  # [B, C, H', W', kh, kw]
    parts = zip(np.split(windows, groups, axis=1), np.split(weight, groups, axis=0), strict=True)
    return np.concatenate(
        [np.einsum("bchwyx,ocyx->bohw", part, kernel) for part, kernel in parts], axis=1
    )


def transposed_sums(layer: nn.Conv2DTranspose, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Each input adds its kernel to the output."""
    batch, _, height, width = x.shape
    (down, right), (rows, columns) = layer._stride, layer._kernel_size
    out = np.zeros(
        (batch, weight.shape[1], (height - 1) * down + rows, (width - 1) * right + columns),
        np.int64,
    )
    for row in range(height):
        for column in range(width):
            part = np.einsum("bc,coyx->boyx", x[:, :, row, column], weight)
            place = (
                slice(row * down, row * down + rows),
                slice(column * right, column * right + columns),
            )
            out[:, :, place[0], place[1]] += part
    return out


def cases_of(graph: int, limit: int = WEIGHT_LIMIT) -> list[Case]:
    random = np.random.default_rng([7, graph])
    return [make_case(random, limit) for _ in range(PER_GRAPH)]


def check(cases: list[Case], found: list[np.ndarray], engine: str) -> None:
    for number, (case, got) in enumerate(zip(cases, found, strict=True)):
        assert got.shape == case.expected.shape
        error = (np.abs(got - case.expected) / case.largest).max()
        assert error <= TOLERANCE, f"{engine}, layer {number}: {case.layer}: {error:.3g}"


@pytest.mark.parametrize("graph", GRAPHS)
def test_eager_and_openvino_add_whole_numbers(graph, tmp_path):
    cases = cases_of(graph)
    with paddle.no_grad():
        eager = [case.layer(paddle.to_tensor(case.x)).numpy() for case in cases]
    check(cases, eager, "eager")
    if not has_openvino() or find_integer_unit(find_usable_flags()) is None:
        pytest.skip("no OpenVINO, or a processor without VNNI")
    write_products([c.layer for c in cases], [list(c.x.shape) for c in cases], tmp_path / "graph")
    named = {f"x{place}": case.x for place, case in enumerate(cases)}
    ((outputs,),) = run_in_openvino([tmp_path / "graph"], [named])
    check(cases, outputs, "OpenVINO")


# One channel per group, stride 1 from row to row and more from column to column, one column out.
WRONG_IN_OPENVINO = [
    (nn.Conv2D(1, 8, [3, 2], [1, 3]), [1, 1, 6, 3]),
    (nn.Conv2D(4, 8, [5, 3], [1, 2], [4, 0], groups=4), [2, 4, 6, 4]),
]


@pytest.mark.skipif(find_integer_unit(find_usable_flags()) is None, reason="no VNNI")
@pytest.mark.parametrize(("layer", "shape"), WRONG_IN_OPENVINO)
def test_what_openvino_adds_wrongly_is_written_otherwise(layer, shape, tmp_path):
    random = np.random.default_rng(3)
    codes = random.integers(-127, 128, layer.weight.shape).astype(np.int8)
    weight = IntegerWeight(codes, np.full(8, 0.01, np.float32), 0)
    model = nn.Sequential(layer)
    held = copy_with_integers(model, {"0": weight}, {"0": IntegerActivation(0.02, -90)})[0]
    step = float(held.activation.scale.numpy()[0]) / 127
    whole = random.integers(-90, 166, shape)
    expected = integer_sums(layer, whole, codes.astype(np.int64)) * step * np.float32(0.01)
    write_products([held], [shape], tmp_path / "graph")
    x = (whole * step).astype(np.float32)
    ((outputs,),) = run_in_openvino([tmp_path / "graph"], [{"x0": x}])
    np.testing.assert_allclose(outputs[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("graph", GRAPHS)
def test_onnx_runtime_adds_whole_numbers(graph, tmp_path):
    """In integers, and with the same codes in float."""
    pytest.importorskip("paddle2onnx", reason="pip install paddle2onnx")
    pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    cases = cases_of(graph ^ 1)  # the graphs in another order: 1, 0, 3, 2, ...
    with paddle.no_grad():
        check(cases, [case.layer(paddle.to_tensor(case.x)).numpy() for case in cases], "eager")
    shapes = [list(case.x.shape) for case in cases]
    write_onnx_products([case.layer for case in cases], shapes, tmp_path / "graph")
    named = {f"x{place}": case.x for place, case in enumerate(cases)}
    for integers in (True, False):
        runtime = OnnxRuntime(tmp_path / "graph" / "model.onnx", integers=integers)
        check(cases, runtime.run(named), f"ONNX Runtime, integers={integers}")


LIMITS = {"AVX512_CORE_VNNI": "avx512_vnni", "AVX512_CORE_AMX": "amx_int8", "AVX2_VNNI": "avx_vnni"}


@pytest.mark.all
@pytest.mark.parametrize("limit", LIMITS)
def test_every_instruction_set_with_products_of_integers(limit, tmp_path, monkeypatch):
    if LIMITS[limit] not in find_usable_flags():
        pytest.skip(f"the processor has no {LIMITS[limit]}")
    monkeypatch.setitem(os.environ, "ONEDNN_MAX_CPU_ISA", limit)
    cases = cases_of(0)
    write_products([c.layer for c in cases], [list(c.x.shape) for c in cases], tmp_path / "graph")
    named = {f"x{place}": case.x for place, case in enumerate(cases)}
    ((outputs,),) = run_in_openvino([tmp_path / "graph"], [named])
    check(cases, outputs, limit)


# Without them `auto` runs the same codes in float, which oneDNN does.
FLOAT_LIMITS = {"AVX2": "avx2", "AVX512_CORE": "avx512bw"}


@pytest.mark.all
@pytest.mark.parametrize("limit", FLOAT_LIMITS)
def test_every_instruction_set_without_products_of_integers(limit, tmp_path, monkeypatch):
    if FLOAT_LIMITS[limit] not in find_usable_flags():
        pytest.skip(f"the processor has no {FLOAT_LIMITS[limit]}")
    monkeypatch.setitem(os.environ, "ONEDNN_MAX_CPU_ISA", limit)
    assert find_integer_unit(find_usable_flags()) is None
    cases = cases_of(0)
    products = Products([case.layer for case in cases])
    graph = trace_products(products, [list(case.x.shape) for case in cases])
    save_graph(graph, str(tmp_path / "graph" / "model"), None)
    how = {"threads": 1, "device": "cpu", "engine": "onednn", "bfloat16": False}
    runtime = IsolatedRuntime(tmp_path / "graph", "paddle", files=FILES["paddle"], **how)
    try:
        found = runtime.run({f"x{place}": case.x for place, case in enumerate(cases)})
    finally:
        runtime.close()
    check(cases, found, limit)


@pytest.mark.all
def test_seven_bits_need_no_products_of_integers(tmp_path, monkeypatch):
    """Two products of 8-bit and 7-bit codes fit in 16 bits, which AVX2 adds them in."""
    monkeypatch.setitem(os.environ, "ONEDNN_MAX_CPU_ISA", "AVX2")
    cases = cases_of(0, limit=63)
    write_products([c.layer for c in cases], [list(c.x.shape) for c in cases], tmp_path / "graph")
    named = {f"x{place}": case.x for place, case in enumerate(cases)}
    ((outputs,),) = run_in_openvino([tmp_path / "graph"], [named])
    check(cases, outputs, "AVX2, 7 bits")
