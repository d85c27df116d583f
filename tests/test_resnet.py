"""The ResNets of the zoo."""

import numpy as np
import paddle
import pytest
from paddle import nn

import ppvision
from benchmark.sdn_boundary import multiply_adds, trained_size
from ppvision.deploy import Predictor, export_model
from ppvision.models.resnet import BasicBlock
from ppvision.plugins.paddleslim import end_layers
from tests.helpers.messages import raises_naming

ZOO = ppvision.list_models("resnet*")


@pytest.mark.parametrize("name", ZOO)
def test_cards_tell_the_sizes(name):
    model, card = ppvision.create_model(name), ppvision.model_card(name)
    assert trained_size(model) == card.parameters
    assert round(multiply_adds(model, 224) / 1e9, 3) == card.gflops


def test_resnet20_has_the_papers_size_and_depth():
    model = ppvision.create_model("resnet20", num_classes=10)
    assert trained_size(model) == 269_722  # 0.27M, table 6
    assert sum(isinstance(x, (nn.Conv2D, nn.Linear)) for x in model.sublayers()) == 20


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_weights_and_numbers_are_those_of_paddles_own(name):
    """Names and shapes too, so that what Paddle publishes fits."""
    paddle.seed(0)
    theirs = getattr(paddle.vision.models, name)(num_classes=7)
    ours = ppvision.create_model(name, num_classes=7)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.set_state_dict(theirs.state_dict())
    ours.eval(), theirs.eval()
    x = paddle.randn([2, 3, 65, 50])
    expected = theirs(x).numpy()
    np.testing.assert_allclose(ours(x).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_a_shortcut_is_every_second_pixel_and_zeros():
    block, x = BasicBlock(4, 8, stride=2), paddle.randn([2, 4, 7, 6])
    out = block.shortcut(x).numpy()
    np.testing.assert_array_equal(out[:, :4], x.numpy()[:, :, ::2, ::2])
    assert out.shape == (2, 8, 4, 3)
    assert not out[:, 4:].any()


def test_other_channels_and_wrong_options():
    model = ppvision.create_model("resnet20", num_classes=2, in_channels=1)
    assert model(paddle.randn([2, 1, 8, 8])).shape == [2, 2]
    for name, options in (
        ("resnet20", dict(num_classes=-1)),
        ("resnet20", dict(in_channels=True)),
        ("resnet18", dict(num_classes="ten")),
    ):
        with raises_naming(ValueError, next(iter(options)) + ":"):
            ppvision.create_model(name, **options)


@pytest.mark.parametrize("name", ZOO)
def test_the_first_and_the_last_layer_are_found(name):
    model = ppvision.create_model(name, num_classes=10)
    ends = ("stem", "head") if name == "resnet20" else ("conv1", "fc")
    assert end_layers(model, paddle.randn([1, 3, 32, 32])) == ends


@pytest.mark.parametrize("format", ["paddle", "onnx"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name != "resnet50" else pytest.mark.all) for name in ZOO],
)
def test_exports_give_the_same(name, format, tmp_path):
    paddle.seed(0)
    model = ppvision.create_model(name, num_classes=10)
    folder = export_model(  # which compares them
        model,
        tmp_path / name,
        input_shape=[None, 3, 32, 32],
        output_op="none",
        task="classification",
        format=format,
    )
    if format == "paddle":
        x = np.random.default_rng(0).normal(size=[1, 3, 32, 32]).astype(np.float32)
        model.eval()
        expected = model(paddle.to_tensor(x)).numpy()
        (out,) = Predictor(folder).run(x)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-3)
