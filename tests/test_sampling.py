"""The values that steps of activations come from: of every channel and place of a map."""

import numpy as np
import paddle
import pytest
from paddle import nn

from ppvision.quant.integers import IntegerActivation
from ppvision.quant.ptq.integers import RULES, Observed, quantize_to_integers
from ppvision.quant.sampling import ValueSample, draw_evenly
from ppvision.quant.train.quanters import LayeredActivationQuanter

SHAPES = [(1, 64 * 64, 32), (1, 128 * 128, 128), (1, 32, 64, 64), (2, 16, 128, 128), (1, 7, 31, 5)]


def uneven(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A map whose last axis has small values first and large values last."""
    scale = np.linspace(0.05, 3, shape[-1], dtype=np.float32)
    noise = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return noise * scale


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [1, -1])
def test_a_sample_has_all_channels_and_places(shape, axis):
    size = shape[axis]
    place = np.broadcast_to(
        np.arange(size).reshape([-1] + [1] * (len(shape) - 1 - axis % len(shape))), shape
    )
    found = draw_evenly(np.ascontiguousarray(place), 4096, np.random.default_rng(0))
    counts = np.bincount(found, minlength=size)
    if size <= 256:  # of more, a few may be missing
        assert counts.min() > 0
    assert counts.max() < 4 * max(1.0, len(found) / size) + 8


def test_a_small_array_is_kept_whole():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = draw_evenly(values, 10, np.random.default_rng(0))
    np.testing.assert_array_equal(found, np.arange(6))
    values[:] = 7  # it is a copy
    assert found.max() == 5


def test_places_of_parts_are_each_drawn_from_once():
    values = np.arange(1000)
    found = draw_evenly(values, 100, np.random.default_rng(0))
    np.testing.assert_array_equal(found // 10, np.arange(100))


def test_a_sample_knows_the_ends_and_the_number_of_all_values():
    sample = ValueSample(per_batch=10, in_all=25)
    for number in range(1, 9):
        values = np.zeros(1000, np.float32)
        values[137] = -number
        sample.add(values)
    assert (sample.low, sample.high, sample.count) == (-8.0, 0.0, 8000)
    assert len(sample) == len(sample.values) <= 25
    empty = ValueSample(10, 10)
    empty.add(np.zeros([0, 3], np.float32))
    assert len(empty) == empty.count == 0


def rounding_error(values: np.ndarray, activation: IntegerActivation) -> float:
    codes = np.rint(values.astype(np.float64) / activation.step)
    rounded = activation.step * np.clip(codes, activation.low, activation.high)
    return float(np.sqrt(np.square(values - rounded).mean()) / values.std())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_steps_suit_all_values_and_not_a_few_channels(shape, rule):
    seen = Observed()
    for seed in range(3):
        seen.add(uneven(shape, seed))
    other = uneven(shape, 3)
    assert rounding_error(other, seen.activation(rule)) < 0.03


@pytest.mark.parametrize("pictures", [1, 16, 64])
def test_learned_steps_start_from_all_channels(pictures):
    quanter = LayeredActivationQuanter([8, 4])._instance(nn.Linear(32, 2))
    quanter.calibrating = True
    x = uneven((1, 128 * 128, 32))
    x[..., 0] = np.abs(x[..., 0])  # the channel without a sign is no reason to leave it out
    tensor = paddle.to_tensor(x)
    for _ in range(pictures):
        quanter(tensor)
    quanter.finish_calibration()
    assert float(quanter.signed) == 1
    activation = IntegerActivation(float(quanter.steps()[0]), -128)
    assert rounding_error(x, activation) < 0.02


def test_one_negative_value_gives_codes_a_sign():
    quanter = LayeredActivationQuanter([8])._instance(nn.Linear(32, 2))
    x = np.ones((1, 128 * 128, 32), np.float32)
    x[0, 5, 7] = -1
    quanter(paddle.to_tensor(x))
    assert float(quanter.signed) == 1


class Tokens(nn.Layer):
    """A map of stride 4 as tokens whose channels differ in size, as after a trained LayerNorm."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2D(3, 32, 4, stride=4)
        self.norm = nn.LayerNorm(32)
        self.norm.weight.set_value(np.linspace(0.05, 3, 32).astype(np.float32))
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, x):
        tokens = self.norm(self.patches(x).flatten(2).transpose([0, 2, 1]))  # [B, HW, C]
        return self.second(nn.functional.relu(self.first(tokens)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("side", [128, 256])
def test_a_network_in_integers_is_near_the_one_in_float(rule, side):
    paddle.seed(0)
    model = Tokens()
    model.eval()
    random = np.random.default_rng(0)
    pictures = [
        paddle.to_tensor(random.standard_normal((1, 3, side, side)).astype(np.float32))
        for _ in range(5)
    ]
    shows = [lambda m, x=x: m(x) for x in pictures[:4]]
    integers = quantize_to_integers(model, shows, rule=rule)
    integers.eval()
    with paddle.no_grad():
        expected, found = model(pictures[4]).numpy(), integers(pictures[4]).numpy()
    assert np.sqrt(np.square(expected - found).mean()) < 0.03 * expected.std()
