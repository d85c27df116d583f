"""Which layers stay in float: a network in which one is built to lose most."""

import numpy as np
import paddle
import pytest
from paddle import nn

from ppvision.deploy.write.integers import _tell_change
from ppvision.errors import InputError
from ppvision.quant.packed import IntegerLayer
from ppvision.quant.ptq.integers import quantize_to_integers
from ppvision.quant.ptq.sensitivity import measure_change
from tests.helpers.messages import raises_naming

LAYERS = ("first", "middle", "last")


class Chain(nn.Layer):
    """Three products. The input of one has a channel of 2000 times the size of the others, and that
    product divides it by as much: in float nothing changes, in 256 codes the others are lost."""

    def __init__(self, sensitive: str):
        super().__init__()
        paddle.seed(3)
        for name in LAYERS:
            setattr(self, name, nn.Linear(8, 8))
        gain = np.ones(8, np.float32)
        gain[0] = 2000
        self.sensitive, self.gain = sensitive, paddle.to_tensor(gain)
        layer = getattr(self, sensitive)
        layer.weight.set_value(layer.weight / self.gain.unsqueeze(1))

    def forward(self, x):
        for name in LAYERS:
            if name == self.sensitive:
                x = x * self.gain
            x = nn.functional.gelu(getattr(self, name)(x))
        return [x]


@pytest.fixture
def pictures():
    return np.random.default_rng(0).standard_normal((12, 4, 8)).astype(np.float32)


def shows_of(pictures):
    return [lambda model, x=x: model(paddle.to_tensor(x)) for x in pictures]


def error_of(quantized, model, pictures):
    with paddle.no_grad():
        pairs = [[m(paddle.to_tensor(x))[0].numpy() for m in (model, quantized)] for x in pictures]
    return sum(np.square(a - b).sum() for a, b in pairs)


@pytest.mark.parametrize("sensitive", LAYERS)
def test_the_layer_that_loses_most_stays_in_float(sensitive, pictures, caplog):
    model = Chain(sensitive)
    model.eval()
    shows = shows_of(pictures)
    with caplog.at_level("INFO", "ppvision"):
        found = quantize_to_integers(model, shows, most_sensitive=1)
    kept = [name for name in LAYERS if not isinstance(getattr(found, name), IntegerLayer)]
    assert kept == [sensitive]
    assert f"{sensitive} (" in caplog.text  # and by how much
    everywhere = quantize_to_integers(model, shows)
    assert error_of(found, model, pictures) < 0.1 * error_of(everywhere, model, pictures)
    assert all(type(getattr(model, name)) is nn.Linear for name in LAYERS)  # as it was


def test_layers_by_name_come_on_top(pictures):
    """What is kept by name is not among those that are looked for."""
    model = Chain("last")
    model.eval()
    found = quantize_to_integers(model, shows_of(pictures), keep_float=["last"], most_sensitive=1)
    held = [name for name in LAYERS if isinstance(getattr(found, name), IntegerLayer)]
    assert len(held) == 1
    assert "last" not in held


@pytest.mark.parametrize("count", [3, 7, -1])
def test_a_number_that_leaves_no_layer_is_refused(count, pictures):
    model = Chain("first")
    model.eval()
    with raises_naming(InputError, "1", "2", "layers", str(count)):
        quantize_to_integers(model, shows_of(pictures), most_sensitive=count)


def test_outputs_that_change_their_size_are_refused(pictures):
    class Kept(Chain):
        """As a detector: what is above a limit."""

        def forward(self, x):
            (x,) = super().forward(x)
            return x[x > x.mean()]

    model = Kept("middle")
    model.eval()
    with pytest.raises(InputError, match="keep_float"):
        quantize_to_integers(model, shows_of(pictures), most_sensitive=1)


def test_a_number_that_leaves_no_layer_is_refused_before_the_work(pictures):
    model = Chain("middle")
    model.eval()

    def show(shown):
        raise AssertionError("no image was to be run")

    with raises_naming(InputError, "keep_float", "1", "2", "got", "3"):
        quantize_to_integers(model, [show], most_sensitive=3)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("midle", "middle?"), ("model.middle", "middle?"), ("zzz", "The 3 layers are: first, middle")],
)
def test_an_unknown_layer_gets_names_that_may_be_meant(pictures, name, meant):
    model = Chain("middle")
    model.eval()
    with pytest.raises(InputError) as caught:
        quantize_to_integers(model, shows_of(pictures), keep_float=[name])
    assert meant in str(caught.value)


class Scaled(nn.Layer):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return {"a": x, "b": [self.factor * x]}


def test_the_change_of_outputs_is_a_share_of_them(pictures):
    shows = shows_of(pictures)
    # Of two equal parts one is 1.5 times as large: sqrt(0.25 / 2).
    assert measure_change(Scaled(1), Scaled(1.5), shows) == pytest.approx(0.125**0.5)
    assert measure_change(Scaled(1), Scaled(1), shows) == 0
    assert measure_change(Scaled(1), Scaled(1), [lambda model: None]) is None
    other = [lambda model, k=k: paddle.ones([k + model.factor]) for k in (1, 2)]
    assert measure_change(Scaled(1), Scaled(2), other) is None  # boxes after NMS


@pytest.mark.parametrize(("change", "warns"), [(None, False), (0.02, False), (0.5, True)])
def test_a_large_change_is_a_warning(change, warns, caplog):
    _tell_change(change, 64)
    assert ("50%" in caplog.text and "keep_float" in caplog.text) == warns
