"""`ppvision/engine/cpu_training.py`: quicker, and the same numbers."""

import ctypes

import numpy as np
import paddle
import pytest
from paddle import nn
from paddleslim.quant import SlimQuantConfig

from ppvision import create_model
from ppvision.engine import cpu_training as quick
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
    return [y.numpy(), x.grad.numpy(), *(p.grad.numpy() for p in layer.parameters())]


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
    with quick.quick_convolutions():
        assert_same(gradients(layer, x), reference, 2e-6)


def test_float64_and_channels_last_are_the_same():
    x = np.random.default_rng(0).normal(size=(2, 6, 5, 6))
    layers = [layer().to(dtype="float64") for layer in LAYERS.values()]
    layers += [nn.Conv2D(6, 4, 1, data_format="NHWC").to(dtype="float64")]
    for layer in layers:
        reference = gradients(layer, x)
        with quick.quick_convolutions():
            assert_same(gradients(layer, x), reference, 1e-14)


def test_a_wrong_number_of_channels_is_paddles_error():
    with quick.quick_convolutions(), pytest.raises(ValueError, match="channel"):
        nn.Conv2D(6, 10, 1)(paddle.zeros([1, 5, 4, 4]))


def test_a_batch_without_samples_passes():  # regions of a picture without objects
    with quick.quick_convolutions():
        assert nn.Conv2D(6, 10, 1)(paddle.zeros([0, 6, 7, 7])).shape == [0, 10, 7, 7]


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
    with quick.quick_convolutions():
        found = [y.numpy() for y in once(paddle.to_tensor(x))]
    assert len(calls) == 2 * 3
    assert_same(found, reference, 1e-5)


def test_a_model_trains_alike():
    losses = []
    for manager in (quick.cpu_training, None):
        paddle.seed(0)
        model = create_model("pale_nano", num_classes=4)
        optimizer = paddle.optimizer.AdamW(1e-3, parameters=model.parameters())
        x, y = paddle.randn([2, 3, 60, 52]), paddle.to_tensor([1, 3])
        found = []
        context = manager() if manager else quick.ExitStack()
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


def test_everything_is_put_back():
    forward, flags = nn.Conv2D.forward, paddle.get_flags(FLAG)

    def break_off() -> None:
        with quick.cpu_training():
            assert nn.Conv2D.forward is not forward
            assert paddle.get_flags(FLAG) == {FLAG: False}
            raise KeyError

    with pytest.raises(KeyError):
        break_off()
    assert nn.Conv2D.forward is forward
    assert paddle.get_flags(FLAG) == flags


def test_graphs_are_those_of_paddle(tmp_path):
    layer = nn.Conv2D(4, 6, 1)
    with quick.quick_convolutions():
        spec = [paddle.static.InputSpec([None, 4, None, None])]
        graph = paddle.jit.to_static(layer, input_spec=spec, full_graph=True)
        operators = [op.name() for op in graph.forward.main_program.global_block().ops]
    assert "pd_op.conv2d" in operators
    assert "pd_op.matmul" not in operators


def test_other_devices_keep_their_habits(monkeypatch):
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    forward = nn.Conv2D.forward
    with quick.cpu_training():
        assert nn.Conv2D.forward is forward


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
