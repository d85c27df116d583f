"""8-bit integers: what codes and roundings stand for, against loops in float64 and integers."""

import numpy as np
import paddle
import pytest
from paddle import nn

from ppvision.deploy.write.export import record_scores
from ppvision.errors import InputError
from ppvision.quant.integers import (
    CODES,
    IntegerActivation,
    IntegerWeight,
    quantize_weight,
)
from ppvision.quant.packed import (
    IntegerLayer,
    IntegerRounding,
    _Tables,
    pack_fields,
    pack_model,
)
from ppvision.quant.ptq.integers import RULES, Observed, quantize_to_integers
from ppvision.quant.store.state import LayeredActivation, LayeredState, LayeredWeight
from tests.helpers.configs import ROOT
from tests.helpers.messages import raises_naming


def naive_codes(weight, scale, axis):
    """One weight after another, in float64."""
    codes = np.zeros(weight.shape, np.int64)
    for place in np.ndindex(weight.shape):
        s = float(scale[place[axis]])
        if s > 0:
            codes[place] = max(-127, min(127, round(float(weight[place]) / s)))
    return codes


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_are_the_nearest_codes(axis):
    random = np.random.default_rng(0)
    weight = random.standard_normal((5, 4, 3, 3)) * np.geomspace(1e-4, 10, 20).reshape(5, 4, 1, 1)
    found = quantize_weight(weight.astype(np.float32), axis)
    assert found.codes.dtype == np.int8
    differ = np.abs(naive_codes(weight.astype(np.float32), found.scale, axis) - found.codes)
    assert differ.max() <= 1  # a quotient in float32 may sit on a half
    assert differ.mean() < 0.01
    error = np.abs(found.dequantize() - weight)
    shape = [1] * 4
    shape[axis] = -1
    half = found.scale.reshape(shape) / 2
    inside = np.abs(weight) <= 127 * found.scale.reshape(shape)
    assert (error <= half * 1.001)[inside].all()


def test_the_scale_has_the_least_error_of_those_tried():
    """An outlier is clipped where that pays for the rest."""
    weight = np.full((1, 4000), 0.01, np.float32) * np.linspace(-1, 1, 4000, dtype=np.float32)
    weight[0, 0] = 0.02
    found = quantize_weight(weight, 0)
    whole = IntegerWeight(
        np.rint(weight / (0.02 / 127)).astype(np.int8), np.float32([0.02 / 127]), 0
    )
    squares = [np.square(w.dequantize() - weight).sum() for w in (found, whole)]
    assert squares[0] <= squares[1]


def test_channels_of_zeros_stay_zero():
    weight = np.zeros((3, 7), np.float32)
    weight[1] = 1.0
    found = quantize_weight(weight, 0)
    assert found.scale[0] == found.scale[2] == 0
    assert not found.dequantize()[[0, 2]].any()
    np.testing.assert_allclose(found.dequantize()[1], 1.0, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    with pytest.raises(InputError, match="finite"):
        quantize_weight(np.float32([[1, bad]]), 0)


@pytest.mark.parametrize("low", [0, -3, -128, -255])
def test_a_rounding_is_clip_of_round(low):
    activation = IntegerActivation(0.05, low)
    layer = IntegerRounding(activation)
    x = np.linspace(-20, 20, 4001).astype(np.float32)
    found = layer(paddle.to_tensor(x)).numpy()
    high = low + CODES - 1
    expected = [0.05 * max(low, min(high, np.floor(float(v) / 0.05 + 0.5))) for v in x]
    # On a border between two codes the quotient's last digit decides.
    close = np.isclose(found, expected, atol=1e-5)
    assert (close | np.isclose(np.abs(found - expected), 0.05, atol=1e-5)).all()
    assert close.mean() > 0.98
    assert int(layer.zero) == -128 - low  # the lowest code is -128 as int8
    assert float(layer.scale) == pytest.approx(127 * 0.05)


def test_fewer_codes_are_clipped_off():
    layer = IntegerRounding(IntegerActivation(1.0, -128), (-8, 7))
    found = layer(paddle.to_tensor(np.float32([-100, -8, 3, 7, 100]))).numpy()
    assert found.tolist() == [-8, -8, 3, 7, 7]
    assert layer.limits == (-8, 7)


class Small(nn.Layer):
    """Every kind of layer that can hold integers."""

    def __init__(self):
        super().__init__()
        paddle.seed(0)
        self.stem = nn.Conv2D(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2D(8, 8, 3, padding=2, dilation=2, groups=8)
        self.grouped = nn.Conv2D(8, 12, 1, groups=4)
        self.up = nn.Conv2DTranspose(12, 6, 2, stride=2)
        self.head = nn.Linear(6, 5)
        self.auxiliary = nn.Linear(6, 5)  # does not run

    def forward(self, x):
        x = nn.functional.relu(self.stem(x))
        x = nn.functional.gelu(self.depthwise(x))
        x = self.up(nn.functional.relu(self.grouped(x)))
        return self.head(x.mean(axis=[2, 3]))


def shows(count=4, side=16):
    random = np.random.default_rng(1)
    pictures = random.standard_normal((count, 1, 3, side, side)).astype(np.float32)
    return [lambda model, x=x: model(paddle.to_tensor(x)) for x in pictures], pictures


def integer_reference(layer, x):
    """What the layer must give, with sums of integers and the float layer's own operator on them:
    codes are whole numbers that float64 holds exactly."""
    rounding = layer.activation
    step = np.float64(rounding.scale.numpy()[0]) / 127
    zero = float(rounding.zero)
    codes = np.clip(np.floor(x / np.float32(step) + 0.5) + zero, rounding.low, rounding.high) - zero
    return codes, step


@pytest.mark.parametrize("rule", RULES)
def test_a_model_becomes_integers(rule):
    model = Small()
    model.eval()
    before = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    calls, pictures = shows()
    quantized = quantize_to_integers(model, calls, rule=rule)
    kinds = {name: type(layer).__name__ for name, layer in quantized.named_sublayers()}
    held = [n for n, layer in quantized.named_sublayers() if isinstance(layer, IntegerLayer)]
    assert held == ["stem", "depthwise", "grouped", "up", "head"], kinds
    assert type(quantized.auxiliary) is nn.Linear  # no picture reached it
    with paddle.no_grad():
        a = np.concatenate([model(paddle.to_tensor(x)).numpy() for x in pictures])
        b = np.concatenate([quantized(paddle.to_tensor(x)).numpy() for x in pictures])
    assert 0 < np.abs(a - b).max() < 0.05 * np.abs(a).max()
    assert all((v.numpy() == before[k]).all() for k, v in model.state_dict().items())
    assert not model.training
    assert not quantized.training


def test_a_convolution_sums_integers():
    """Against a loop over the definition in whole numbers."""
    model = Small()
    model.eval()
    calls, _ = shows(2, 8)
    layer = quantize_to_integers(model, calls).grouped
    x = np.abs(np.random.default_rng(2).standard_normal((1, 8, 2, 2))).astype(np.float32)
    codes, step = integer_reference(layer, x)
    weight = layer.codes.numpy().astype(np.int64)  # [12, 2, 1, 1]
    scale = layer.cell.numpy().reshape(-1).astype(np.float64)
    bias = layer.bias.numpy().astype(np.float64)
    expected = np.zeros((1, 12, 2, 2))
    for out in range(12):
        group = out // 3
        for row in range(2):
            for column in range(2):
                total = 0
                for channel in range(2):
                    code = int(codes[0, 2 * group + channel, row, column])
                    total += code * int(weight[out, channel, 0, 0])
                expected[0, out, row, column] = total * step * scale[out] + bias[out]
    with paddle.no_grad():
        found = layer(paddle.to_tensor(x)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def _paths_with_weights(model):
    return [path for path, layer in model.named_sublayers() if hasattr(layer, "weight")]


def test_layers_can_stay_in_float(caplog):
    model = Small()
    model.eval()
    with caplog.at_level("INFO", "ppvision"):
        quantized = quantize_to_integers(model, shows()[0], keep_float=["head", "stem"])
    assert "which were named: stem, head" in caplog.text
    assert "no image reaches them: auxiliary" in caplog.text
    assert type(quantized.head) is nn.Linear
    assert type(quantized.stem) is nn.Conv2D
    assert isinstance(quantized.up, IntegerLayer)
    with pytest.raises(InputError, match="names"):
        quantize_to_integers(model, shows()[0], keep_float=_paths_with_weights(model))
    with pytest.raises(InputError, match="haed"):
        quantize_to_integers(model, shows()[0], keep_float=["haed"])


def test_no_picture_and_no_layer_are_refused():
    model = Small()
    model.eval()
    with raises_naming(InputError, "calibration:", "image", "none"):
        quantize_to_integers(model, [])
    with raises_naming(InputError, "model:", "layers", "none"):
        quantize_to_integers(nn.ReLU(), shows()[0])


def test_infinities_in_calibration_are_refused():
    model = Small()
    model.eval()
    x = np.full((1, 3, 16, 16), np.inf, np.float32)
    with pytest.raises(InputError, match="infinity"):
        quantize_to_integers(model, [lambda m: m(paddle.to_tensor(x))])


@pytest.mark.parametrize("rule", RULES)
def test_the_window_covers_what_was_seen(rule):
    seen = Observed()
    seen.add(np.float32([-1.0, 0.0, 3.0]))
    found = seen.activation(rule)
    assert found.low < 0 < found.high
    assert found.high - found.low == CODES - 1
    reach = found.low * found.step, found.high * found.step
    assert reach == pytest.approx((-1, 3), abs=0.05)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("values", [np.zeros(10), np.full(10, 1e-42)], ids=["zeros", "subnormal"])
def test_zeros_alone_have_a_step(values, rule):
    seen = Observed()
    seen.add(values.astype(np.float32))
    assert seen.activation(rule) == IntegerActivation(1.0, 0)
    assert seen.activation(rule, symmetric=True) == IntegerActivation(1.0, -128)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_a_value_among_many_zeros_has_a_step(rule, symmetric):
    """One in a million, which a percentile does not see."""
    seen = Observed()
    values = np.zeros(4000, np.float32)
    seen.add(values)
    for _ in range(20):
        seen.add(values)
    values[0] = 3.0
    seen.add(values)
    assert seen.activation(rule, symmetric).step > 0


@pytest.mark.parametrize("rule", RULES)
def test_symmetric_codes_reach_the_largest_magnitude(rule):
    seen = Observed()
    seen.add(np.float32([-1.0, 0.0, 3.0]))
    found = seen.activation(rule, symmetric=True)
    assert found.low == -128
    assert 127 * found.step == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("size", [1e-38, 1e30])
def test_sizes_at_the_end_of_float32_are_rounded(size):
    """Their squares are beyond it."""
    weight = (size * np.linspace(-1, 1, 51)).astype(np.float32).reshape(1, 51)
    found = quantize_weight(weight, 0)
    np.testing.assert_allclose(found.dequantize(), weight, atol=size / 127)
    seen = Observed()
    seen.add(weight)
    for rule in RULES:
        activation = seen.activation(rule)
        assert activation.step == pytest.approx(2 * size / 255, rel=0.2)


@pytest.mark.parametrize("rule", RULES)
def test_a_small_range_has_a_zero_point_that_openvino_keeps(rule):
    seen, positive = Observed(), Observed()
    seen.add(np.float32([-1e-8, 0.0, 3e-8]))
    assert seen.activation(rule).low == -128
    positive.add(np.float32([0.0, 3e-8]))
    assert positive.activation(rule).low == 0


def _layered(bits, held_bits, shape=(6, 4, 3, 3)):
    random = np.random.default_rng(bits)
    low = -(2 ** (held_bits - 1))
    codes = random.integers(low, -low, shape).astype(np.int8)
    step = random.uniform(0.01, 1, shape[0]).astype(np.float32)
    return LayeredWeight(codes, held_bits, 8, 2, 0, step, (8, 6, 4, 3, 2))


@pytest.mark.parametrize("bits", range(2, 9))
def test_layered_codes_mean_the_same_up_to_7_bits(bits):
    """`s (q + 1/2) = (s / 2) (2q + 1)`, which are integers of 8 bits up to 7; of 8 the first 7 are
    taken, and half of the last step is lost, no more and no less."""
    model = nn.Sequential(nn.Conv2D(4, 6, 3))
    weight = _layered(8, 8).at(bits)
    state = LayeredState(
        bits=(8, 2),
        held_bits=8,
        weights={"0": _layered(8, 8)},
        floats={"0.bias": model[0].bias.numpy()},
        activations={"0": LayeredActivation(np.float32([0.1, 0.1]), (8, 8), 8, 8, signed=True)},
    )
    layer = pack_model(model, state, bits, integers=True)[0]
    codes, scale = (tensor.numpy() for tensor in layer.integer_weight())
    assert codes.dtype == np.int8
    assert scale.shape == (6, 1, 1, 1)  # a step per output channel
    found = codes.astype(np.float64) * scale.astype(np.float64)
    q = weight.codes.astype(np.float64)
    exact = (q + 0.5) * weight.cell().astype(np.float64)[:, None, None, None]
    if bits <= 7:
        np.testing.assert_allclose(found, exact, rtol=1e-6)
    else:
        half = 0.5 * weight.cell().astype(np.float64)[:, None, None, None]
        np.testing.assert_allclose(np.abs(found - exact), np.broadcast_to(half, q.shape), rtol=1e-5)
    np.testing.assert_allclose(layer.unpacked.numpy(), found, rtol=1e-6)


def test_scores_of_integers_belong_to_an_export_with_integers():
    in_float = ROOT / "tests" / "compat" / "0.1.0" / "classification"
    with raises_naming(InputError, "record_scores:", "float,"):
        record_scores(in_float, "top1", 0.5, 0.5)


def test_fields_of_five_bits():
    """By hand: 10110 is -10, in fields of 4 bits (1011: -5 times 2) and 1 bit (0)."""
    codes = np.int8([-10, 15, -16])  # 10110, 01111, 10000
    fours, ones = pack_fields(codes, 5)
    assert fours.tolist() == [0b10110111, 0b10000000]
    assert ones.tolist() == [0b01000000]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 1000])
def test_bytes_of_fields_are_worth_their_codes(bits, count):
    random = np.random.default_rng(bits)
    codes = random.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), count).astype(np.int8)
    fields, tables = pack_fields(codes, bits), _Tables().of(bits)
    worth = [
        table.numpy()[field].reshape(-1)[:count]
        for field, table in zip(fields, tables, strict=True)
    ]
    assert np.array_equal(np.sum(worth, axis=0), codes)
    assert sum(field.size for field in fields) <= -(-count * bits // 8) + len(fields) - 1
