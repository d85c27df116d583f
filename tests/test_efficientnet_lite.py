"""EfficientNet-Lite against its definition in NumPy."""

import numpy as np
import paddle
import pytest

import ppvision
from ppvision.deploy import Predictor, export_model
from ppvision.models.efficientnet_lite import VARIANTS, EfficientNetLite, LiteConfig
from tests.helpers.reference_efficientnet import efficientnet_lite


def randomised(model) -> dict[str, np.ndarray]:
    """Values that matter for every parameter and statistic; returns them in float64."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, tensor in model.state_dict().items():
        values = rng.normal(size=tensor.shape).astype(np.float32)
        if name.endswith("_variance"):
            values = np.abs(values) + 0.5
        elif name.endswith("norm.bias"):
            values = values + 1  # most of ReLU6's inputs between its corners
        elif tensor.ndim > 1:
            values /= np.sqrt(np.prod(tensor.shape[1:]) if tensor.ndim == 4 else tensor.shape[0])
        tensor.set_value(values)
        arrays[name] = values.astype(np.float64)
    model.eval()
    return arrays


@pytest.mark.parametrize(("height", "width"), [(32, 64), (45, 33)])
@pytest.mark.parametrize("depth", [1.0, 1.2])
def test_equals_the_definition(height, width, depth):
    model = EfficientNetLite(LiteConfig(0.25, depth, 0.2), num_classes=5)
    arrays = randomised(model)
    x = np.random.default_rng(1).normal(size=(3, height, width))
    expected = efficientnet_lite(x, arrays, depth)
    found = model(paddle.to_tensor(x[None].astype(np.float32))).numpy()[0]
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_published_shapes():
    """Blocks and channels of the authors' code, by hand: Lite2 is 1.1 as wide and 1.2 as deep."""
    stages = {0: [16, 24, 40, 80, 112, 192, 320], 2: [16, 24, 48, 88, 120, 208, 352]}
    counts = {0: [1, 2, 2, 3, 3, 4, 1], 2: [1, 3, 3, 4, 4, 5, 1]}
    for number, channels in stages.items():
        blocks = VARIANTS[f"efficientnet_lite{number}"].blocks
        for stage in range(7):
            own = [block for block in blocks if block[0] == stage]
            assert len(own) == counts[number][stage]
            assert {block[4] for block in own} == {channels[stage]}


def test_dropout_and_stochastic_depth_are_of_training_only():
    model = ppvision.create_model("efficientnet_lite0", drop_rate=0.5, drop_path_rate=0.5)
    assert model.blocks[0].drop_path.drop_prob == 0
    assert model.blocks[-1].drop_path.drop_prob == pytest.approx(0.5 * 15 / 16)
    x = paddle.rand([2, 3, 32, 32])
    model.eval()
    np.testing.assert_array_equal(model(x).numpy(), model(x).numpy())
    model.train()
    assert np.abs((model(x) - model(x)).numpy()).max() > 0


@pytest.mark.parametrize("format", ["paddle", pytest.param("onnx", marks=pytest.mark.all)])
def test_exports_of_any_size_give_the_same(format, tmp_path):
    model = EfficientNetLite(LiteConfig(0.25, 1.0, 0.2), num_classes=5)
    randomised(model)
    folder = export_model(  # which compares them
        model,
        tmp_path / "lite",
        input_shape=[None, 3, None, None],
        output_op="none",
        task="classification",
        format=format,
    )
    for size in ((64, 64), (45, 33)):
        x = np.random.default_rng(0).normal(size=[1, 3, *size]).astype(np.float32)
        (out,) = Predictor(folder).run(x)
        expected = model(paddle.to_tensor(x)).numpy()
        np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)
