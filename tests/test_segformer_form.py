"""SegFormer's head in `ppvision/forms/segformer.py`: in exports, in integers, and in training."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn

from benchmark.integer_latency import Network, make_state
from ppvision.data.writing import write_picture
from ppvision.deploy import Predictor, export_model
from ppvision.forms.cpu_training import cpu_training
from ppvision.forms.segformer import FoldedSegFormer, fold_head, head_form
from ppvision.quant.packed import pack_model
from tests.helpers.segformer import make_segformer

NORMALIZE = {"type": "Normalize", "mean": [0.5] * 3, "std": [0.5] * 3}
JOINED = 4 * 12  # channels of the tensor that the form saves
SIZE = (32, 48)


def make_model(*, training: bool = False) -> nn.Layer:
    """With weights and statistics that all differ from their first values."""
    paddle.seed(0)
    model = make_segformer()
    generator = np.random.default_rng(0)
    for name, tensor in model.state_dict().items():
        values = generator.normal(size=tensor.shape)
        positive = name.endswith("_variance")
        tensor.set_value((np.abs(values) + 0.5 if positive else 0.3 * values).astype("float32"))
    model.train() if training else model.eval()
    return model


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def eager(model: nn.Layer, x: np.ndarray) -> np.ndarray:
    with paddle.no_grad():
        return model(paddle.to_tensor(x))[0].numpy()


def channels_of(folder: Path) -> set[int]:
    """Channels of all maps of an exported graph."""
    found = set()

    def walk(node: object) -> None:
        if isinstance(node, dict):
            # A tensor's type in PIR: its element type, shape, layout, ...
            shape = node["D"][1] if node.get("#") == "0.t_dtensor" else []
            if len(shape) == 4 and shape[2:] != [1, 1]:  # not of 1x1 kernels
                found.add(shape[1])
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(json.loads((folder / "model.json").read_text(encoding="utf-8")))
    return found


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(3):
        picture = np.random.default_rng(k).integers(0, 256, (*SIZE, 3), np.uint8)
        write_picture(folder / f"{k}.png", picture)
    return folder


@pytest.mark.parametrize(
    ("size", "format"), [(SIZE, "paddle"), ((None, None), "paddle"), (SIZE, "onnx")], ids=str
)
def test_exports_have_the_form(tmp_path, size, format):
    if format == "onnx":
        pytest.importorskip("paddle2onnx")
        pytest.importorskip("onnxruntime")
    model = make_model()
    x = noise(1, 3, *SIZE)
    expected = eager(model, x)
    for name in ("first", "again"):  # an export leaves nothing behind in the model
        folder = export_model(
            model,
            tmp_path / name,
            input_shape=[1, 3, *size],
            output_op="none",
            format=format,
        )
        if format == "paddle":
            assert channels_of(folder)
            assert JOINED not in channels_of(folder)
        (found,) = Predictor(folder).run(x)
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
        assert "forward" not in vars(model)
    np.testing.assert_array_equal(eager(model, x), expected)


def test_another_head_is_exported_as_it_is(tmp_path):
    model = make_model()
    model.linear_fuse.register_forward_post_hook(lambda layer, inputs, outputs: outputs + 1)
    folder = export_model(model, tmp_path / "m", input_shape=[1, 3, *SIZE], output_op="none")
    assert JOINED in channels_of(folder)


def test_hooks_of_the_whole_model_run(tmp_path):
    """Such as the one that adds the logits of SDN's guidance."""
    model = make_model()
    model.register_forward_post_hook(lambda layer, inputs, outputs: [2 * outputs[0]])
    x = noise(1, 3, *SIZE)
    expected = eager(model, x)
    assert np.abs(eager(fold_head(model), x) - expected).max() <= 2e-5 * np.abs(expected).max()
    folder = export_model(model, tmp_path / "m", input_shape=[1, 3, *SIZE], output_op="none")
    assert JOINED not in channels_of(folder)
    (found,) = Predictor(folder).run(x)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_folded_head_has_the_same_numbers():
    model = make_model()
    x = noise(2, 3, 31, 47)
    expected = eager(model, x)
    folded = fold_head(model)
    assert isinstance(folded, FoldedSegFormer)
    assert np.abs(eager(folded, x) - expected).max() <= 2e-5 * np.abs(expected).max()
    assert not any("linear_fuse" in name for name in folded.state_dict())
    assert isinstance(fold_head(nn.Conv2D(3, 4, 1)), nn.Conv2D)


def test_integers_for_onnx_have_a_folded_head(tmp_path, pictures):
    pytest.importorskip("paddle2onnx")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = make_model()
    how = {"input_shape": [1, 3, *SIZE], "output_op": "none", "transforms": [NORMALIZE]}
    how |= {"int8": True, "calibration": pictures, "format": "onnx"}
    folder = export_model(model, tmp_path / "m", **how)
    kinds = [node.op_type for node in onnx.load(folder / "model.onnx").graph.node]
    assert "MatMul" not in kinds  # the Linear layers are in the convolutions
    assert "QuantizeLinear" in kinds
    x = np.random.default_rng(3).uniform(-1, 1, (1, 3, *SIZE)).astype(np.float32)
    expected = eager(model, x)
    (found,) = Predictor(folder, precision="int8").run(x)
    assert np.abs(found - expected).max() <= 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("named", ["linear_fuse._conv", "linear_c2.proj"])
def test_integers_have_a_folded_head_unless_its_layers_are_named(tmp_path, pictures, named):
    model = make_model()
    how = {"input_shape": [1, 3, *SIZE], "output_op": "none", "transforms": [NORMALIZE]}
    how |= {"int8": True, "calibration": pictures}
    folded = export_model(model, tmp_path / "folded", **how)
    kept = export_model(model, tmp_path / "kept", keep_float=[named], **how)
    assert JOINED not in channels_of(folded)
    assert JOINED in channels_of(kept)
    assert Predictor(kept).manifest.keep_float == [named]
    x = np.random.default_rng(3).uniform(-1, 1, (1, 3, *SIZE)).astype(np.float32)
    expected = eager(model, x)
    for folder in (folded, kept):
        (found,) = Predictor(folder, precision="int8").run(x)
        assert np.abs(found - expected).max() <= 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("integers", [True, False], ids=["integers", "rounded"])
def test_layered_models_that_round_keep_their_head(tmp_path, integers):
    network = Network(make_model, SIZE, "segmentation")
    state = make_state(network, make_model())
    packed = pack_model(make_model(), state, 4, integers=integers)
    how = {"input_shape": [1, 3, *SIZE], "output_op": "none", "bits": 4, "int8": integers}
    folder = export_model(packed, tmp_path / "m", **how)
    assert JOINED in channels_of(folder)
    assert Predictor(folder).manifest.openvino
    x = np.random.default_rng(3).uniform(-1, 1, (1, 3, *SIZE)).astype(np.float32)
    expected = eager(packed, x)
    (found,) = Predictor(folder, precision="int8" if integers else "float32").run(x)
    assert np.abs(found - expected).max() <= 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("frozen", [False, True], ids=["statistics of the batch", "frozen"])
def test_training_gives_the_same_gradients_and_statistics(frozen):
    """Against PaddleSeg's own forward."""
    models = []
    for quick in (False, True):
        model = make_model(training=True)
        model.dropout.p = 0.5  # the same draws
        if frozen:
            model.linear_fuse._batch_norm.eval()
        x = paddle.to_tensor(noise(3, 3, 16, 24), stop_gradient=False)
        with head_form(model) if quick else nullcontext():
            assert ("forward" in vars(model)) == quick
            paddle.seed(5)
            (y,) = model(x)
            (y * paddle.to_tensor(noise(*y.shape))).sum().backward()
        assert "forward" not in vars(model)
        models.append((model, y.numpy(), x.grad.numpy()))
    (own, *expected), (model, *found) = models
    last_digit = 1e-6 * max(
        np.abs(p.grad.numpy()).max() for p in own.parameters() if p.grad is not None
    )
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= 5e-5 * np.abs(b).max()
    for (name, a), b in zip(model.named_parameters(), own.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if b.grad is None:
            continue
        error = np.abs(a.grad.numpy() - b.grad.numpy()).max()
        assert error <= 5e-5 * np.abs(b.grad.numpy()).max() + last_digit, name
    for name in ("_mean", "_variance"):
        a, b = (getattr(m.linear_fuse._batch_norm, name).numpy() for m in (model, own))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_cpu_training_uses_it():
    model = make_model(training=True)
    with cpu_training(model):
        assert "forward" in vars(model)
    assert "forward" not in vars(model)
