"""Quanters against loops over the definition."""

import math

import numpy as np
import paddle
import pytest
from paddle import nn

from ppvision.nn import SemanticDifferenceConv2D
from ppvision.quant import (
    LayeredActivationQuanter,
    LayeredWeightQuanter,
    downsample_codes,
    quantize_codes,
)
from ppvision.quant.train.quanters import find_initial_steps, find_rounding_step
from tests.helpers.messages import raises_naming

BITS = (8, 6, 4, 3, 2)


def layer_of(kind: str) -> tuple[nn.Layer, int]:
    """A layer and the axis of its weight's channels."""
    paddle.seed(3)
    return {
        "conv": (nn.Conv2D(6, 5, 3), 0),
        "grouped": (nn.Conv2D(6, 4, 3, groups=2), 0),
        "depthwise": (nn.Conv2D(6, 6, 3, groups=6), 0),
        "transposed": (nn.Conv2DTranspose(6, 5, 2), 1),
        "linear": (nn.Linear(6, 5), 1),
        "sdn": (SemanticDifferenceConv2D(6, 5), 0),
    }[kind]


KINDS = ("conv", "grouped", "depthwise", "transposed", "linear", "sdn")


def relative_errors(rows: np.ndarray, step: float, top: int) -> dict[int, float]:
    """Squared error of each width, over the weights' own, by the definition, in float64."""
    errors = {}
    for bits in BITS:
        cell, half = step * 2.0 ** (top - bits), 2 ** (bits - 1)
        codes = np.minimum(np.maximum(np.floor(rows / cell), -half), half - 1)
        errors[bits] = np.square(rows - cell * (codes + 0.5)).sum() / np.square(rows).sum()
    return errors


# -- initial steps ---------------------------------------------------------------------------------


def test_initial_steps_serve_all_widths():
    rows = np.random.default_rng(0).normal(size=(1, 3000)).astype(np.float32)
    tried = np.geomspace(0.001, 0.05, 120)
    errors = [relative_errors(rows[0].astype(np.float64), step, 8) for step in tried]
    least = {k: min(e[k] for e in errors) for k in BITS}
    objective = [sum(e[k] / least[k] for k in BITS) for e in errors]
    (step,) = find_initial_steps(rows, BITS)
    ours = relative_errors(rows[0].astype(np.float64), float(step), 8)
    assert sum(ours[k] / least[k] for k in BITS) < 1.05 * min(objective)
    best_at_8 = min(errors, key=lambda e: e[8])
    assert ours[2] < best_at_8[2] - 0.02


def test_initial_steps_of_one_width_are_its_best():
    rows = np.random.default_rng(1).normal(size=(1, 4000)).astype(np.float32)
    (step,) = find_initial_steps(rows, (2,))
    # The optimal uniform quantiser of 4 levels for a Gaussian: step 0.9957, error 0.1188 (Max 1960)
    assert step == pytest.approx(0.9957, rel=0.08)
    (code,) = (np.clip(np.floor(rows / step), -2, 1),)
    assert np.square(rows - step * (code + 0.5)).mean() == pytest.approx(0.1188, rel=0.08)


def test_zeros_have_steps():
    rows = np.zeros((3, 4), np.float32)
    assert (find_initial_steps(rows, BITS) == 0).all()
    rows[0] = [1.0, -2.0, 0.5, 0.1]
    rows[2] = [0.1, 0.2, 0.3, 0.1]
    steps = find_initial_steps(rows, BITS)
    assert steps[1] == pytest.approx(np.median(steps[[0, 2]]))
    assert (steps > 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_initial_steps_follow_the_weights(scale):
    rows = np.random.default_rng(2).normal(size=(2, 50)).astype(np.float32)
    small = find_initial_steps(rows, BITS)
    np.testing.assert_allclose(
        find_initial_steps(rows * np.float32(scale), BITS), small * scale, 1e-5
    )


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 7, 6, 5, 4, 3, 2])
def test_weights_are_the_centres_of_nested_codes(kind, bits):
    layer, axis = layer_of(kind)
    quanter = LayeredWeightQuanter(BITS)._instance(layer)
    quanter.set_bits(bits)
    weight, steps = layer.weight.numpy(), quanter.steps()
    assert steps.shape == (weight.shape[axis],)
    codes = downsample_codes(quantize_codes(weight, steps, 8, axis=axis), 8, bits)
    shape = [1] * weight.ndim
    shape[axis] = -1
    cell = steps.astype(np.float64).reshape(shape) * 2 ** (8 - bits)
    np.testing.assert_allclose(quanter(layer.weight).numpy(), cell * (codes + 0.5), 1e-6)
    assert quanter.bit_length() == bits
    np.testing.assert_allclose(quanter.scales().numpy(), cell.ravel(), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 3])
def test_gradients_are_those_of_lsq(kind, bits):
    """Straight through inside of the range; the step's gradient as the paper has it, by loops."""
    layer, axis = layer_of(kind)
    quanter = LayeredWeightQuanter(BITS)._instance(layer)
    quanter.set_bits(bits)
    quanter.initial_step.set_value(quanter.initial_step * 0.5)  # some weights are clipped
    upstream = np.random.default_rng(5).normal(size=layer.weight.shape).astype(np.float32)
    (quanter(layer.weight) * paddle.to_tensor(upstream)).sum().backward()

    weight = np.moveaxis(layer.weight.numpy().astype(np.float64), axis, 0)
    channels = len(weight)
    weight = weight.reshape(channels, -1)
    gradient = np.moveaxis(upstream.astype(np.float64), axis, 0).reshape(channels, -1)
    steps, half = quanter.steps().astype(np.float64) * 2 ** (8 - bits), 2 ** (bits - 1)
    of_weight, of_log = np.zeros_like(weight), np.zeros(channels)
    for c in range(channels):
        for n in range(weight.shape[1]):
            u = weight[c, n] / steps[c]
            code = min(max(math.floor(u), -half), half - 1)
            inside = -half <= u < half
            of_weight[c, n] = gradient[c, n] * inside
            of_step = gradient[c, n] * (code + 0.5 - (u if inside else 0.0))
            # Of the logarithm, over the square of the codes' reach and the root of their number.
            learning = 1 / (math.sqrt(weight.shape[1]) * (half * steps[c]) ** 2)
            of_log[c] += learning * steps[c] * of_step
    found = np.moveaxis(layer.weight.grad.numpy(), axis, 0).reshape(channels, -1)
    np.testing.assert_allclose(found, of_weight, atol=1e-6)
    np.testing.assert_allclose(quanter.log_scale.grad.numpy(), of_log, 2e-4, atol=1e-4)
    assert (of_weight == 0).any(), "nothing was clipped"


def test_a_step_stays_positive_whatever_the_optimiser_does():
    layer, _ = layer_of("linear")
    quanter = LayeredWeightQuanter(BITS)._instance(layer)
    sgd = paddle.optimizer.SGD(1.0, parameters=[quanter.log_scale])
    for _ in range(20):
        quanter.log_scale.clear_gradient()
        (quanter(layer.weight).abs().sum() * 3).backward()
        sgd.step()
    assert (quanter.steps() > 0).all()
    assert np.isfinite(quanter.steps()).all()


def test_a_layer_of_zeros_stays_zero_until_it_has_weights():
    layer = nn.Linear(4, 3, weight_attr=nn.initializer.Constant(0.0))
    quanter = LayeredWeightQuanter(BITS)._instance(layer)
    quanter.eval()
    assert (quanter(layer.weight).numpy() == 0).all()
    quanter.train()
    (quanter(layer.weight) * 2).sum().backward()
    assert (layer.weight.grad.numpy() == 2).all()  # it can learn
    layer.weight.set_value(np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32))
    np.testing.assert_allclose(quanter(layer.weight).numpy(), layer.weight.numpy(), atol=0.03)
    assert (quanter.steps() > 0).all()


@pytest.mark.parametrize("rate", [0.1, 0.01])
@pytest.mark.parametrize("bits", [8, 2])
def test_steps_stay_where_they_belong_under_momentum(rate, bits):
    """Near the solution, as QAT begins. With LSQ's own factor they run away at 8 bits."""
    random = np.random.default_rng(0)
    solution = random.normal(size=(200, 6))
    layer = nn.Linear(200, 6)
    layer.weight.set_value((solution + 0.1 * random.normal(size=solution.shape)).astype("float32"))
    quanter = LayeredWeightQuanter((bits,))._instance(layer)
    x = paddle.to_tensor(random.normal(size=(400, 200)), "float32")
    y = x @ paddle.to_tensor(solution, "float32")
    parameters = [layer.weight, quanter.log_scale]
    sgd = paddle.optimizer.Momentum(rate, 0.9, parameters=parameters)
    losses = []
    for _ in range(100):
        losses.append((x @ quanter(layer.weight) - y).square().mean())
        losses[-1].backward()
        sgd.step()
        sgd.clear_grad()
    # Two bits can do little better than they begin.
    assert float(losses[-1]) < (0.6 if bits == 8 else 1.3) * float(losses[0])
    assert np.abs(quanter.log_scale.numpy()).max() < 0.7


@pytest.mark.parametrize("optimiser", ["Adam", "Momentum"])
def test_a_layer_that_begins_at_zero_learns(optimiser):
    """Its steps follow its weights, which grow a thousandfold."""
    layer = nn.Linear(20, 6, weight_attr=nn.initializer.Constant(0.0))
    quanter = LayeredWeightQuanter((8,))._instance(layer)
    random = np.random.default_rng(0)
    x = paddle.to_tensor(random.normal(size=(64, 20)), "float32")
    y = x @ paddle.to_tensor(random.normal(size=(20, 6)), "float32")
    parameters = [layer.weight, quanter.log_scale]
    rate = {"Adam": 0.02, "Momentum": 0.05}[optimiser]
    steps = getattr(paddle.optimizer, optimiser)(rate, parameters=parameters)
    for _ in range(200):
        loss = (x @ quanter(layer.weight) - y).square().mean()
        loss.backward()
        steps.step()
        steps.clear_grad()
    assert float(loss) < 0.05 * float(y.square().mean())


def test_a_layer_stays_within_its_own_widths():
    layer, _ = layer_of("conv")
    quanter = LayeredWeightQuanter(BITS, min_bits=4, max_bits=6)._instance(layer)
    assert quanter.widths == (6, 4)
    assert quanter.top_bits == 6
    found = []
    for bits in (8, 6, 5, 4, 2):
        quanter.set_bits(bits)
        found.append(quanter.bit_length())
    assert found == [6, 6, 5, 4, 4]


def test_a_factor_for_every_width_lowers_the_error():
    layer = nn.Linear(400, 4)
    layer.weight.set_value(np.random.default_rng(0).normal(size=(400, 4)).astype(np.float32))
    errors = {}
    for steps in ("shared", "per_width"):
        quanter = LayeredWeightQuanter(BITS, steps=steps)._instance(layer)
        quanter.set_bits(2)
        errors[steps] = float((quanter(layer.weight) - layer.weight).square().mean())
    assert errors["per_width"] < errors["shared"]
    quanter(layer.weight).sum().backward()
    moved = quanter.log_widths.grad.numpy().reshape(5, 4)
    assert (moved[4] != 0).all()
    assert (moved[:4] == 0).all()  # the factors of the other widths


def test_the_gradient_of_a_widths_own_factor():
    layer, _ = layer_of("linear")
    quanter = LayeredWeightQuanter(BITS, steps="per_width")._instance(layer)
    quanter.set_bits(3)
    upstream = np.random.default_rng(5).normal(size=layer.weight.shape).astype(np.float32)
    (quanter(layer.weight) * paddle.to_tensor(upstream)).sum().backward()
    count, channels = layer.weight.shape
    centres = quanter(layer.weight).numpy().astype(np.float64)
    found = quanter.log_widths.grad.numpy().reshape(len(BITS), channels)[3]
    for c in range(channels):
        reach = 4 * quanter.steps()[c] * 2 ** (8 - 3)
        learning = 1 / (math.sqrt(count) * reach**2)
        expected = learning * sum(upstream[n, c] * centres[n, c] for n in range(count))
        assert found[c] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_half_precision_does_not_reach_the_codes():
    layer, _ = layer_of("linear")
    quanter = LayeredWeightQuanter(BITS)._instance(layer)
    half = layer.weight.astype("bfloat16")
    found = quanter(half)
    assert found.dtype == paddle.float32
    np.testing.assert_array_equal(found.numpy(), quanter(half.astype("float32")).numpy())


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"bits": []}, "bits: list []"),
        ({"bits": [8, 8]}, "bits: once"),
        ({"bits": [9]}, "bits: 1 8, 9"),
        ({"bits": [8], "min_bits": 6, "max_bits": 4}, "min_bits max_bits"),
        ({"bits": [8], "steps": "many"}, "steps: shared per_width"),
    ],
)
def test_wrong_widths_are_refused(options, tokens):
    with raises_naming(ValueError, *tokens.split()):
        LayeredWeightQuanter(**options)._instance(nn.Linear(2, 2))


# -- activations -----------------------------------------------------------------------------------


def activations(signed: bool) -> np.ndarray:
    x = np.random.default_rng(4).normal(size=(3, 50)).astype(np.float32)
    return x if signed else np.abs(x)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_activations_are_rounded(signed, bits):
    quanter = LayeredActivationQuanter(BITS)._instance(nn.Linear(2, 2))
    x = paddle.to_tensor(activations(signed))
    quanter.train()
    quanter(x)  # sets the steps
    quanter.set_bits(bits)
    step = float(quanter.scales())
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    expected = [
        step * min(max(round(v / step), low), high) for v in x.numpy().astype(np.float64).ravel()
    ]
    np.testing.assert_allclose(quanter(x).numpy().ravel(), expected, atol=1e-5)


def test_activation_gradients_are_those_of_lsq():
    quanter = LayeredActivationQuanter(BITS)._instance(nn.Linear(2, 2))
    x = paddle.to_tensor(activations(True), stop_gradient=False)
    quanter(x)
    quanter.set_bits(3)
    upstream = np.random.default_rng(6).normal(size=x.shape).astype(np.float32)
    (quanter(x) * paddle.to_tensor(upstream)).sum().backward()
    step, total, passed = float(quanter.scales()), 0.0, []
    for value, g in zip(x.numpy().ravel(), upstream.ravel(), strict=True):
        u = float(value) / step
        inside = -4 <= u <= 3
        code = min(max(round(u), -4), 3)
        total += float(g) * (code - (u if inside else 0.0))
        passed.append(float(g) * inside)
    np.testing.assert_allclose(x.grad.numpy().ravel(), passed, atol=1e-6)
    learning = 1 / (math.sqrt(x.size) * (3 * step) ** 2)
    expected = np.zeros(5)
    expected[3] = learning * step * total  # of the logarithm of the step of 3 bits
    np.testing.assert_allclose(quanter.log_scale.grad.numpy(), expected, 1e-3, atol=1e-5)


def test_rounding_step_has_the_lowest_error():
    values = activations(True).ravel()
    step = find_rounding_step(values, 3, signed=True)

    def error(s: float) -> float:
        return sum((v - s * min(max(round(v / s), -4), 3)) ** 2 for v in values.tolist())

    assert error(step) < 1.03 * min(error(s) for s in np.geomspace(0.05, 2, 200))
    assert find_rounding_step(np.zeros(4), 3, signed=False) == 1.0


def test_activations_without_steps_are_an_error():
    quanter = LayeredActivationQuanter(BITS)._instance(nn.Linear(2, 2))
    quanter.eval()
    with pytest.raises(ValueError, match="calibrate"):
        quanter(paddle.ones([2, 2]))


def test_calibration_sees_all_batches():
    quanter = LayeredActivationQuanter(BITS)._instance(nn.Linear(2, 2))
    quanter.calibrating = True
    quanter(paddle.ones([4]))
    np.testing.assert_array_equal(quanter(paddle.full([4], -3.0)).numpy(), -3.0)  # left alone
    quanter.finish_calibration()
    assert float(quanter.signed) == 1
    assert quanter.steps()[0] * 128 > 2.5
    with raises_naming(ValueError, "activations", "calibrate", "none"):
        quanter.finish_calibration()


def test_calibration_keeps_a_bounded_share_of_each_batch():
    """Nothing of a batch but its share stays in memory, and early batches count like late ones."""
    quanter = LayeredActivationQuanter(BITS)._instance(nn.Linear(2, 2))
    quanter.calibrating = True
    for number in range(40):
        quanter(paddle.full([1 << 16], float(number)))
    assert len(quanter._seen) <= 1 << 20
    assert all(part.base is None for part in quanter._seen._parts)
    _, counts = np.unique(quanter._seen.values, return_counts=True)
    assert len(counts) == 40
    assert counts.max() <= 2 * counts.min()
