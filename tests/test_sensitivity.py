"""Which layers stay in float: a network in which one is built to lose most."""

import numpy as np
import paddle
import pytest
from paddle import nn

from ppvision.errors import InputError
from ppvision.quant.packed import IntegerLayer
from ppvision.quant.ptq.integers import quantize_to_integers
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
