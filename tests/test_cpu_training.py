"""`ppvision/forms/cpu_training.py`: quicker, and the same numbers."""

import ctypes

import numpy as np
import paddle
import pytest
from paddle import nn
from paddleslim.quant import SlimQuantConfig

from ppvision import create_model
from ppvision.forms import cpu_training as quick
from ppvision.nn import ChannelLayerNorm, PaleAttention
from ppvision.plugins.paddleslim import LayeredQAT
from ppvision.quant import LayeredWeightQuanter, OnceQAT

FLAG = "FLAGS_use_stride_kernel"


def gradients(layer: nn.Layer, x: np.ndarray) -> list[np.ndarray]:
    """The output, and the gradients of input and parameters, for a fixed gradient of the output."""
    x = paddle.to_tensor(x, stop_gradient=False)
    layer.clear_gradients()
    y = layer(x)
    weights = np.random.default_rng(1).normal(size=y.shape).astype(y.numpy().dtype)
    (y * paddle.to_tensor(weights)).sum().backward()
    trainable = [p for p in layer.parameters() if not p.stop_gradient]
    return [y.numpy(), x.grad.numpy(), *(p.grad.numpy() for p in trainable)]


def assert_same(quicker: list[np.ndarray], reference: list[np.ndarray], tolerance: float) -> None:
    for a, b in zip(quicker, reference, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(1, np.abs(b).max())


LAYERS = {
    "pointwise": lambda: nn.Conv2D(6, 10, 1),
    "pointwise without bias": lambda: nn.Conv2D(6, 10, 1, bias_attr=False),
    "pointwise, same": lambda: nn.Conv2D(6, 10, 1, padding="same"),
    "pointwise at stride": lambda: nn.Conv2D(6, 10, 1, stride=2),
    "pointwise, padded": lambda: nn.Conv2D(6, 10, 1, padding=1),
    "pointwise, in groups": lambda: nn.Conv2D(6, 10, 1, groups=2),
    "depthwise": lambda: nn.Conv2D(6, 6, 3, padding=1, groups=6),
    "depthwise without bias": lambda: nn.Conv2D(6, 6, 3, padding=1, groups=6, bias_attr=False),
    "depthwise, twice as many": lambda: nn.Conv2D(6, 12, 3, padding=1, groups=6),
    "depthwise, dilated": lambda: nn.Conv2D(6, 6, 3, padding=2, dilation=2, groups=6),
    "depthwise, 5 x 5": lambda: nn.Conv2D(6, 6, 5, padding=2, groups=6),
    "depthwise, reflected": lambda: nn.Conv2D(6, 6, 3, padding=1, groups=6, padding_mode="reflect"),
    "whole": lambda: nn.Conv2D(6, 8, 3, padding=[1, 1, 2, 1]),
    "whole without bias": lambda: nn.Conv2D(6, 8, 3, stride=2, bias_attr=False),
}


@pytest.mark.parametrize("size", [(8, 8), (3, 5), (1, 1), (17, 9)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_convolutions_and_their_gradients_are_the_same(name, size):
    if size == (1, 1) and name in ("depthwise, reflected", "whole without bias"):
        pytest.skip("too small for Paddle's own layer")
    layer = LAYERS[name]()
    x = np.random.default_rng(0).normal(size=(2, 6, *size)).astype(np.float32)
    reference = gradients(layer, x)
    with quick.quick_convolutions(layer):
        assert_same(gradients(layer, x), reference, 2e-6)


def test_float64_and_channels_last_are_the_same():
    x = np.random.default_rng(0).normal(size=(2, 6, 5, 6))
    layers = [layer().to(dtype="float64") for layer in LAYERS.values()]
    layers += [nn.Conv2D(6, 4, 1, data_format="NHWC").to(dtype="float64")]
    for layer in layers:
        reference = gradients(layer, x)
        with quick.quick_convolutions(layer):
            assert_same(gradients(layer, x), reference, 1e-14)


def test_a_wrong_number_of_channels_is_paddles_error():
    layer = nn.Conv2D(6, 10, 1)
    with quick.quick_convolutions(layer), pytest.raises(ValueError, match="channel"):
        layer(paddle.zeros([1, 5, 4, 4]))


def test_a_batch_without_samples_passes():  # regions of a picture without objects
    layer = nn.Conv2D(6, 10, 1)
    with quick.quick_convolutions(layer):
        assert layer(paddle.zeros([0, 6, 7, 7])).shape == [0, 10, 7, 7]


@pytest.mark.parametrize("shape", [(2, 6, 8, 5), (1, 6, 1, 1), (3, 4, 2, 7)], ids=str)
def test_norms_and_their_gradients_are_the_same(shape):
    layer = ChannelLayerNorm(shape[1])
    rng = np.random.default_rng(0)
    for parameter in layer.parameters():
        parameter.set_value(rng.normal(size=parameter.shape).astype(np.float32))
    x = rng.normal(3, 2, size=shape)
    for dtype, tolerance in (("float32", 1e-5), ("float64", 1e-12)):
        layer.to(dtype=dtype)
        reference = gradients(layer, x.astype(dtype))
        with quick.quick_norms(layer):
            assert_same(gradients(layer, x.astype(dtype)), reference, tolerance)


def test_a_norm_whose_weight_is_frozen_trains_its_bias():
    layer = ChannelLayerNorm(6)
    layer.weight.stop_gradient = True
    x = np.random.default_rng(0).normal(size=(2, 6, 3, 4)).astype(np.float32)
    reference = gradients(layer, x)
    with quick.quick_norms(layer):
        assert_same(gradients(layer, x), reference, 1e-5)


def test_norms_without_gradients_or_parameters_are_paddles():
    x = paddle.randn([2, 6, 4, 4])
    layers = [ChannelLayerNorm(6), ChannelLayerNorm(6, bias_attr=False)]
    layers.append(ChannelLayerNorm(6, weight_attr=False, bias_attr=False))
    for layer in layers:
        reference = layer(x)
        with quick.quick_norms(layer):
            np.testing.assert_allclose(layer(x).numpy(), reference.numpy(), atol=1e-6)
            with paddle.no_grad():
                assert (layer(x) == reference).all()
    layer = ChannelLayerNorm(6)
    with quick.quick_norms(layer), pytest.raises(ValueError, match="shape"):
        layer(paddle.zeros([1, 5, 4, 4]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(14, 7), (9, 15)], ids=str)  # with padding, and without
def test_projections_their_gradients_and_statistics_are_the_same(size, training):
    x = np.random.default_rng(0).normal(size=(2, 8, *size)).astype(np.float32)
    found = []
    for manager in (lambda model: quick.ExitStack(), quick.shared_projections):
        paddle.seed(0)
        layer = PaleAttention(8, 2, pale_size=7)
        layer.train() if training else layer.eval()
        with manager(layer):
            values = gradients(layer, x)
        found.append(values + [value.numpy() for value in layer.state_dict().values()])
    assert_same(found[1], found[0], 5e-5)


def test_projections_run_as_one_convolution_unless_quantised_or_hooked(monkeypatch):
    calls = []
    convolve = quick.F.conv2d
    monkeypatch.setattr(quick.F, "conv2d", lambda *a, **n: calls.append(1) or convolve(*a, **n))
    config = SlimQuantConfig(activation=None, weight=LayeredWeightQuanter((8, 2)))
    attention = PaleAttention(8, 2)
    quantised = LayeredQAT(config).quantize(nn.Sequential(PaleAttention(8, 2)))[0]
    x = paddle.randn([1, 8, 7, 7])
    reference = quantised(x).numpy()
    calls.clear()
    with quick.shared_projections(attention), quick.shared_projections(quantised):
        attention(x)
        assert len(calls) == 1
        np.testing.assert_array_equal(quantised(x).numpy(), reference)
        seen = []
        attention.key[0].register_forward_post_hook(lambda *_: seen.append(1))
        attention(x)
        assert seen == [1]


def test_a_quantised_layer_computes_its_weight_once(monkeypatch):
    model = nn.Sequential(nn.Conv2D(3, 8, 3), nn.Conv2D(8, 4, 1), nn.Conv2D(4, 4, 3, groups=4))
    config = SlimQuantConfig(activation=None, weight=LayeredWeightQuanter((8, 2)))
    once = OnceQAT(LayeredQAT(config).quantize(model), (8, 2))
    x = np.random.default_rng(0).normal(size=(1, 3, 6, 6)).astype(np.float32)
    quanters = [layer.weight_quanter for layer in once.model if hasattr(layer, "weight_quanter")]
    assert len(quanters) == 3
    calls = []
    for quanter in quanters:
        quanter.register_forward_post_hook(lambda *_: calls.append(1))
    once.train()
    reference = [y.numpy() for y in once(paddle.to_tensor(x))]
    assert len(calls) == 2 * 3
    calls.clear()
    with quick.quick_convolutions(once):
        found = [y.numpy() for y in once(paddle.to_tensor(x))]
    assert len(calls) == 2 * 3
    assert_same(found, reference, 1e-5)


def test_a_norm_of_one_channel_gives_its_bias():
    layer = ChannelLayerNorm(1)
    layer.bias.set_value(np.array([0.25], np.float32))
    with quick.quick_norms(layer):
        found = layer(paddle.randn([2, 1, 3, 3]))
    assert np.array_equal(found.numpy(), np.full([2, 1, 3, 3], 0.25, np.float32))


def test_a_model_trains_alike():
    losses = []
    for manager in (quick.cpu_training, None):
        paddle.seed(1)
        model = create_model("pale_nano", num_classes=4)
        optimizer = paddle.optimizer.AdamW(1e-3, parameters=model.parameters())
        x, y = paddle.randn([2, 3, 60, 52]), paddle.to_tensor([1, 3])
        found = []
        context = manager(model) if manager else quick.ExitStack()
        with context:
            for _ in range(3):
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.clear_grad()
                found.append(float(loss))
        losses.append(found)
    assert losses[0] != losses[1]  # other kernels have run
    np.testing.assert_allclose(*losses, rtol=2e-3)


def kinds(model: nn.Layer) -> list[type]:
    return [type(layer) for layer in model.sublayers(include_self=True)]


def test_everything_is_put_back():
    def methods() -> list[object]:
        return [nn.Conv2D.forward, ChannelLayerNorm.forward, PaleAttention._projections]

    model = create_model("pale_nano", num_classes=4)
    own, of_classes, flags = kinds(model), methods(), paddle.get_flags(FLAG)

    def break_off() -> None:
        with quick.cpu_training(model):
            assert methods() == of_classes
            changed = {a for a, b in zip(own, kinds(model), strict=True) if a is not b}
            assert changed == {nn.Conv2D, ChannelLayerNorm, PaleAttention}
            assert paddle.get_flags(FLAG) == {FLAG: False}
            raise KeyError

    with pytest.raises(KeyError):
        break_off()
    assert kinds(model) == own
    assert methods() == of_classes
    assert paddle.get_flags(FLAG) == flags


class Training:
    """Three steps of a small Pale, one at a time."""

    def __init__(self) -> None:
        paddle.seed(1)
        self.model = create_model("pale_nano", num_classes=4, drop_path_rate=0.0)
        self.optimizer = paddle.optimizer.AdamW(1e-3, parameters=self.model.parameters())
        self.x, self.y = paddle.randn([2, 3, 60, 52]), paddle.to_tensor([1, 3])
        self.losses: list[float] = []

    def step(self) -> None:
        loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.clear_grad()
        self.losses.append(float(loss))

    def result(self) -> list[np.ndarray]:
        return [np.array(self.losses), *(p.numpy() for p in self.model.state_dict().values())]


@pytest.mark.parametrize("fails", [False, True])
def test_two_trainings_in_one_process_do_not_influence_each_other(fails):
    """One inside the context and one outside, in turn; also after the first has failed."""
    inside, outside = Training(), Training()
    with quick.cpu_training(inside.model):
        for _ in range(3):
            inside.step()
    for _ in range(3):
        outside.step()
    assert inside.losses != outside.losses  # other kernels have run

    first, second = Training(), Training()
    own = kinds(second.model)

    def train_in_turn() -> None:
        with quick.cpu_training(first.model):
            assert kinds(second.model) == own
            for _ in range(2):
                first.step()
                second.step()
            if fails:
                raise KeyError
            first.step()

    if fails:
        with pytest.raises(KeyError):
            train_in_turn()
    else:
        train_in_turn()
        for a, b in zip(first.result(), inside.result(), strict=True):
            np.testing.assert_array_equal(a, b)
    second.step()
    for a, b in zip(second.result(), outside.result(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert kinds(first.model) == own


def test_the_last_of_two_trainings_sets_paddles_flag_back():
    before = paddle.get_flags(FLAG)
    first, second = quick.cpu_training(nn.Linear(1, 1)), quick.cpu_training(nn.Linear(1, 1))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert paddle.get_flags(FLAG) == {FLAG: False}
    second.__exit__(None, None, None)
    assert paddle.get_flags(FLAG) == before


def test_a_class_of_others_goes_through_the_quicker_one(monkeypatch):
    class Twice(nn.Conv2D):
        def forward(self, x: paddle.Tensor) -> paddle.Tensor:
            return 2 * super().forward(x)

    layer = Twice(6, 10, 1)
    x = np.random.default_rng(0).normal(size=(2, 6, 5, 4)).astype(np.float32)
    reference, calls = gradients(layer, x), []
    pointwise = quick._pointwise
    monkeypatch.setattr(quick, "_pointwise", lambda *a: calls.append(1) or pointwise(*a))
    with quick.quick_convolutions(layer):
        assert isinstance(layer, Twice)
        assert_same(gradients(layer, x), reference, 2e-6)
    assert calls == [1]
    assert type(layer) is Twice
    layer.eval()
    # Tracing reads its `super()` in a way of its own.
    with quick.quick_convolutions(layer), paddle.no_grad():
        spec = [paddle.static.InputSpec([2, 6, 5, 4])]
        traced = paddle.jit.to_static(layer, input_spec=spec, full_graph=True)
        np.testing.assert_allclose(traced(paddle.to_tensor(x)).numpy(), reference[0], atol=1e-5)


def test_graphs_are_those_of_paddle(tmp_path):
    def operators(training: bool) -> list[str]:
        layer = nn.Sequential(nn.Conv2D(4, 6, 1), ChannelLayerNorm(6), PaleAttention(6, 2))
        spec = [paddle.static.InputSpec([2, 4, 14, 14])]
        with quick.cpu_training(layer) if training else quick.ExitStack():
            graph = paddle.jit.to_static(layer, input_spec=spec, full_graph=True)
            return [op.name() for op in graph.forward.main_program.global_block().ops]

    assert operators(True) == operators(False)


def test_other_devices_keep_their_habits(monkeypatch):
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    layer = nn.Conv2D(1, 1, 1)
    with quick.cpu_training(layer):
        assert type(layer) is nn.Conv2D


def test_memory_is_kept_unless_the_user_has_said_otherwise(monkeypatch):
    calls = []

    class Library:
        def mallopt(self, *arguments: int) -> None:
            calls.append(arguments)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    quick.keep_freed_memory()
    assert calls == []
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    quick.keep_freed_memory()
    assert sorted(calls) == [(-3, 2**30), (-1, 2**30)]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # no glibc
    quick.keep_freed_memory()
