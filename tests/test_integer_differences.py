"""SDN in 8-bit integers: central differences are an integer convolution, guided ones stay float."""

import numpy as np
import paddle
import pytest
from paddle import nn

from ppvision.data.writing import write_picture
from ppvision.deploy import export_model
from ppvision.deploy.run.manifest import read_manifest
from ppvision.deploy.write import openvino
from ppvision.forms.differences import CentralDifference, central_form
from ppvision.nn import SemanticDifferenceConv2D, SemanticDiffusion
from ppvision.quant.packed import PackedLayer
from ppvision.quant.ptq.integers import quantize_to_integers
from tests.helpers import reference_sdn as reference

SIDE, CHANNELS = 40, 8


class Net(nn.Layer):
    """A convolution, SDN that does something, and a head."""

    def __init__(self, similarity: str, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2D(3, CHANNELS, 3, stride=2, padding=1)
        self.sdn = SemanticDiffusion(CHANNELS, similarity=similarity, groups=groups)
        weight = self.sdn.fuse.weight
        weight.set_value(0.3 * paddle.randn(weight.shape))
        self.head = nn.Conv2D(CHANNELS, 5, 1)
        self.eval()

    def forward(self, x):
        return self.head(self.sdn(nn.functional.relu(self.stem(x))))


def make(similarity: str, groups: int = 1) -> Net:
    paddle.seed(4)
    return Net(similarity, groups)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(4):
        pixels = generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        write_picture(folder / f"{number}.png", pixels)
    return folder


@pytest.mark.parametrize("groups", [1, 2, CHANNELS])
def test_central_differences_are_one_convolution(groups):
    model = make("none", groups)
    layer = model.sdn.difference
    u = paddle.randn([2, CHANNELS, 7, 9])
    expected = reference.semantic_difference(
        u.numpy(), u.numpy(), layer.weight.numpy(), "none", groups
    )
    with central_form(model):
        found = model.sdn.difference
        assert type(found) is CentralDifference
        np.testing.assert_allclose(found(u).numpy(), expected, atol=1e-5)
    assert model.sdn.difference is layer
    with central_form(model, ["sdn.difference"]):
        assert model.sdn.difference is layer


def quantised(similarity: str) -> tuple[nn.Layer, nn.Layer, paddle.Tensor]:
    model, x = make(similarity), paddle.randn([1, 3, SIDE, SIDE])
    with central_form(model):
        return model, quantize_to_integers(model, [lambda shown: shown(x)]), x


def test_central_differences_multiply_integers():
    """Against differences in float64 with the rounded kernel, on the rounded input."""
    model, integers, x = quantised("none")
    layer = integers.sdn.difference.conv
    assert isinstance(layer, PackedLayer)
    u = nn.functional.relu(integers.stem(x))
    rounded, kernel = layer.activation(u).numpy(), layer.unpacked.numpy().astype(np.float64)
    padded = np.pad(rounded, [(0, 0), (0, 0), (1, 1), (1, 1)], mode="edge").astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    expected = np.einsum("bchwij,ocij->bohw", windows, kernel)
    np.testing.assert_allclose(layer(u).numpy(), expected, atol=1e-4)
    exact = model(x).numpy()
    assert np.abs(integers(x).numpy() - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("similarity", ["gaussian", "cosine"])
def test_products_of_guided_differences_stay_in_float(similarity, caplog):
    with caplog.at_level("INFO", "ppvision"):
        _, integers, _ = quantised(similarity)
    difference = integers.sdn.difference
    assert isinstance(difference, PackedLayer)
    assert difference.kind is SemanticDifferenceConv2D
    assert difference.activation is None
    assert difference.codes.dtype == paddle.int8
    assert isinstance(integers.sdn.guide[0], PackedLayer)
    assert isinstance(integers.sdn.fuse, PackedLayer)
    assert "differences" in caplog.text
    assert "sdn.difference" in caplog.text


@pytest.mark.openvino
@pytest.mark.parametrize("similarity", ["none", "gaussian"])
def test_exports_run_in_integers(similarity, pictures, tmp_path, monkeypatch):
    """With the checks of every export: single products, and labels against eager mode."""
    seen = []
    monkeypatch.setattr(
        openvino,
        "integer_form",
        lambda model, form=openvino.integer_form: (
            seen.append([type(layer).__name__ for layer in model.sublayers()]) or form(model)
        ),
    )
    folder = export_model(
        make(similarity),
        tmp_path / "net",
        input_shape=[1, 3, SIDE, SIDE],
        task="segmentation",
        output_op="argmax",
        transforms=[{"type": "Normalize"}],
        int8=True,
        calibration=pictures,
    )
    manifest = read_manifest(folder)
    assert manifest.openvino
    assert manifest.int8.passed
    assert manifest.keep_float == ([] if similarity == "none" else ["sdn.difference"])
    formed = any("GraphSemanticDifference" in names for names in seen)  # not in that of products
    assert formed == (similarity != "none")
