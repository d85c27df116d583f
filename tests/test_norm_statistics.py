"""`ppvision/quant/ptq/norm_statistics.py` against NumPy and against Paddle's own training mode."""

import threading
from functools import partial

import numpy as np
import paddle
from paddle import nn

from ppvision.quant.ptq.norm_statistics import IN_STEP, estimate_statistics
from tests.helpers.messages import raises_naming

EPSILON = 1e-5


def pictures(count: int = 6) -> list[np.ndarray]:
    """float64 `[3, 5, 7]` each, of different means, so that one alone tells little of all."""
    rng = np.random.default_rng(0)
    return [rng.normal(rng.normal(0, 2, (3, 1, 1)), 1, (3, 5, 7)) for _ in range(count)]


def shows(model: nn.Layer, images: list[np.ndarray]) -> list[partial]:
    model.eval()
    return [partial(model, paddle.to_tensor(image[None], "float32")) for image in images]


def moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over all but axis 1 of `[count, C, ...]`."""
    axes = (0, *range(2, values.ndim))
    return values.mean(axes), values.var(axes)


def assert_statistics(norm: nn.Layer, mean: np.ndarray, variance: np.ndarray) -> None:
    np.testing.assert_allclose(norm._mean.numpy(), mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm._variance.numpy(), variance, rtol=1e-4, atol=1e-8)


def test_statistics_are_those_of_all_pictures():
    """Of a norm behind another one and behind global pooling as well, by NumPy in float64."""
    first, second = nn.BatchNorm2D(3), nn.BatchNorm2D(3)
    first.weight.set_value(np.float32([0.5, 1, 2]))
    first.bias.set_value(np.float32([1, 0, -1]))
    net = nn.Sequential(first, nn.AdaptiveAvgPool2D(1), second)
    images = pictures()
    estimate_statistics([first, second], shows(net, images))
    x = np.stack(images)
    mean, variance = moments(x)
    assert_statistics(first, mean, variance)
    shape = (3, 1, 1)
    weight, bias = np.array([0.5, 1, 2]).reshape(shape), np.array([1, 0, -1]).reshape(shape)
    x = (x - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + EPSILON) * weight + bias
    assert_statistics(second, *moments(x.mean((2, 3))))


def deep() -> tuple[nn.Layer, list[nn.Layer]]:
    """Twelve norms, each behind the others, some channels dead for some pictures."""
    paddle.seed(3)
    layers = []
    for _ in range(12):
        layers += [nn.Conv2D(3, 3, 3, padding=1), nn.BatchNorm2D(3), nn.ReLU()]
    net = nn.Sequential(*layers)
    return net, [layer for layer in layers if isinstance(layer, nn.BatchNorm2D)]


def test_a_deep_network_gets_the_statistics_of_its_batches():
    """Those of Paddle's training mode; of two batches where the pictures pass in two groups."""
    for count in (20, IN_STEP + 8):
        net, norms = deep()
        images = np.float32(pictures(count))
        groups = 1 if count <= IN_STEP else 2
        batches = []
        net.train()
        for norm in norms:
            norm._momentum = 0.0  # the batch's own
        for group in range(groups):
            with paddle.no_grad():
                net(paddle.to_tensor(images[group::groups]))
            batches.append([(n._mean.numpy(), n._variance.numpy()) for n in norms])
        net, norms = deep()
        estimate_statistics(norms, shows(net, list(images)))
        for number, norm in enumerate(norms):
            means, variances = (np.float64([b[number][i] for b in batches]) for i in (0, 1))
            mean = means.mean(0)
            variance = (variances + means**2).mean(0) - mean**2
            np.testing.assert_allclose(norm._mean.numpy(), mean, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(norm._variance.numpy(), variance, rtol=2e-3, atol=1e-5)


def test_pictures_of_different_sizes_and_more_than_one_pass():
    """As sliding windows do it; each pass through a norm counts as much as any other."""
    norm = nn.BatchNorm2D(3)
    rng = np.random.default_rng(1)
    parts = [[rng.normal(size=(1, 3, 4, 6))], [rng.normal(size=(1, 3, 9, 2)) for _ in range(3)]]

    def show(windows: list[np.ndarray]) -> None:
        for window in windows:
            norm(paddle.to_tensor(window, "float32"))

    norm.eval()
    estimate_statistics([norm], [partial(show, windows) for windows in parts])
    seen = [window for windows in parts for window in windows]
    mean = np.mean([w.mean((0, 2, 3)) for w in seen], 0)
    square = np.mean([(w**2).mean((0, 2, 3)) for w in seen], 0)
    assert_statistics(norm, mean, square - mean**2)


def test_branches_that_differ_by_picture():
    """A norm that only some of the pictures pass gets theirs; nobody waits for ever."""
    shared, rare, unused = (nn.BatchNorm2D(3) for _ in range(3))
    images = [image[None] for image in pictures(4)]

    def show(number: int) -> None:
        x = paddle.to_tensor(images[number], "float32")
        if number == 2:
            rare(x)
        shared(x)

    for norm in (shared, rare, unused):
        norm.eval()
    estimate_statistics([shared, rare, unused], [partial(show, n) for n in range(4)])
    assert_statistics(rare, *moments(images[2]))
    assert_statistics(shared, *moments(np.concatenate(images)))
    assert_statistics(unused, np.zeros(3), np.ones(3))


def test_one_value_tells_nothing():
    norm = nn.BatchNorm2D(3)
    norm.eval()
    estimate_statistics([norm], [lambda: norm(paddle.full([1, 3, 1, 1], 5.0))])
    assert_statistics(norm, np.zeros(3), np.ones(3))
    estimate_statistics([norm], [])
    assert_statistics(norm, np.zeros(3), np.ones(3))


def test_a_mean_far_from_zero_keeps_its_variance():
    norm = nn.BatchNorm2D(3)
    norm.eval()
    x = np.random.default_rng(0).normal(1000, 0.1, (5, 1, 3, 16, 16)).astype(np.float32)
    estimate_statistics([norm], [partial(norm, paddle.to_tensor(image)) for image in x])
    np.testing.assert_allclose(norm._variance.numpy(), moments(x[:, 0].astype(float))[1], rtol=1e-2)


def test_a_picture_that_fails_ends_all_threads():
    norm = nn.BatchNorm2D(3)
    norm.eval()
    before = threading.active_count()

    def fails() -> None:
        raise OSError("no such picture")

    good = partial(norm, paddle.ones([1, 3, 2, 2]))
    for wrong in ([fails, good, good], [good, fails, good], [good, good, fails]):
        with raises_naming(OSError, "such", "picture"):
            estimate_statistics([norm], wrong)
        assert threading.active_count() == before
    assert not norm._forward_pre_hooks


def test_gradients_are_neither_kept_nor_switched_off():
    net, norms = deep()
    estimate_statistics(norms, shows(net, pictures(3)))
    assert paddle.is_grad_enabled()
    assert all(p.grad is None for p in net.parameters())
