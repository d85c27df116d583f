"""Every form: the same numbers as the layers that it stands for, which are back afterwards."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import paddle
import pytest
from paddle import nn

from ppvision.forms.cpu_training import cpu_training
from ppvision.forms.differences import difference_form
from ppvision.forms.pale import GraphPaleAttention, pale_form
from ppvision.forms.segformer import head_form
from ppvision.forms.tokens import token_form
from ppvision.models.pale_transformer import PaleBlock
from ppvision.nn import ChannelLayerNorm, PaleAttention, SemanticDifferenceConv2D
from tests.helpers.segformer import make_segformer

SIZES = [(7, 7), (14, 21), (9, 16), (3, 5), (1, 1)]


@contextmanager
def any_size_form(model: nn.Layer) -> Iterator[None]:
    """What `pale_form` traces where height and width are free, on sizes that are known."""
    with pale_form(model):
        for layer in model.sublayers():
            if isinstance(layer, GraphPaleAttention):
                layer.forward = layer._attend_at_any_size
        yield


class Guided(nn.Layer):
    """A semantic difference convolution whose guidance is the input."""

    def __init__(self, similarity: str) -> None:
        super().__init__()
        self.inner = SemanticDifferenceConv2D(8, 6, similarity=similarity)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.inner(x, x.flip(1))


class Segmenter(nn.Layer):
    """SegFormer with a head of 12 channels."""

    def __init__(self, align_corners: bool) -> None:
        super().__init__()
        self.inner = make_segformer(align_corners, in_channels=8)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.inner(x)[0]


@dataclass(frozen=True)
class Case:
    """A form, and layers that it changes.

    Attributes:
        make: the layers, for maps of 8 channels.
        form: of a model.
        tolerance: of `max|a - b| / max(1, max|a|)`, float32.
        training: the form is for training, so that gradients count too.
    """

    make: Callable[[], nn.Layer]
    form: Callable[[nn.Layer], AbstractContextManager[None]]
    tolerance: float = 2e-5
    training: bool = False


CASES = {
    "pale": Case(lambda: PaleAttention(8, 2), pale_form),
    "pale, rows and columns of their own": Case(lambda: PaleAttention(8, 2, (3, 4)), pale_form),
    "pale, any size": Case(lambda: PaleAttention(8, 2), any_size_form, 5e-5),
    "tokens": Case(lambda: PaleBlock(8, 2, 7, 4, 0.0, True, None), token_form, 3e-5),
    "differences": Case(lambda: Guided("charbonnier"), difference_form),
    "differences, gaussian": Case(lambda: Guided("gaussian"), difference_form),
    "SegFormer's head": Case(lambda: Segmenter(False), head_form),
    "SegFormer's head, corners aligned": Case(lambda: Segmenter(True), head_form),
    "CPU training, convolutions": Case(
        lambda: nn.Sequential(
            nn.Conv2D(8, 12, 1), nn.Conv2D(12, 12, 3, padding=1, groups=12), nn.Conv2D(12, 4, 1)
        ),
        cpu_training,
        training=True,
    ),
    "CPU training, SegFormer's head": Case(
        lambda: Segmenter(False), cpu_training, 5e-5, training=True
    ),
    "CPU training, norm": Case(lambda: ChannelLayerNorm(8), cpu_training, training=True),
    "CPU training, pale": Case(lambda: PaleAttention(8, 2), cpu_training, 5e-5, training=True),
}


def make_model(case: Case) -> nn.Layer:
    """In evaluation mode, with weights and statistics that all differ from their first values."""
    paddle.seed(0)
    model = nn.Sequential(case.make())
    generator = np.random.default_rng(0)
    for name, tensor in model.state_dict().items():
        values = generator.normal(size=tensor.shape)
        positive = name.endswith("_variance")
        tensor.set_value((np.abs(values) + 0.5 if positive else values).astype("float32"))
    model.eval()
    return model


def outcome(model: nn.Layer, x: np.ndarray, training: bool) -> list[np.ndarray]:
    """The output; in training also the gradients of input and parameters."""
    x = paddle.to_tensor(x, stop_gradient=not training)
    if not training:
        with paddle.no_grad():
            return [model(x).numpy()]
    model.clear_gradients()
    y = model(x)
    (y * y).mean().backward()
    trained = [p for p in model.parameters() if not p.stop_gradient]
    return [y.numpy(), x.grad.numpy(), *(p.grad.numpy() for p in trained)]


def layers_of(model: nn.Layer) -> list[tuple]:
    return [
        (name, id(layer), type(layer), vars(layer).get("forward"))
        for name, layer in model.named_sublayers()
    ]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_form_gives_the_numbers_of_the_layers(name, size):
    case = CASES[name]
    model = make_model(case)
    before, weights = layers_of(model), {n: t.numpy() for n, t in model.state_dict().items()}
    x = np.random.default_rng(1).normal(size=(2, 8, *size)).astype(np.float32)
    expected = outcome(model, x, case.training)
    with case.form(model):
        assert layers_of(model) != before
        found = outcome(model, x, case.training)
    assert len(found) == len(expected)
    # The gradient of a key's bias is 0, a sum of terms as large as the others that cancel out.
    last_digit = np.finfo(np.float32).eps * max(np.abs(b).max() for b in expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= case.tolerance * max(1, np.abs(b).max()) + last_digit
    assert layers_of(model) == before
    for key, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), weights[key], err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_as_before_even_after_an_error(name):
    model = make_model(CASES[name])
    before = layers_of(model)

    def fail() -> None:
        with CASES[name].form(model):
            assert layers_of(model) != before
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert layers_of(model) == before
