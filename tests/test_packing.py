"""Calibration by pictures: steps of activations, BatchNorm's statistics, what is refused."""

from types import SimpleNamespace

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
import yaml
from paddle import nn

from ppvision.plugins.paddleslim import LayeredQAT, slim_quant_config
from ppvision.quant import OnceQAT
from ppvision.quant.store.state import extract_state
from ppvision.quant.train.quanters import find_rounding_step
from ppvision.tasks import open_job
from ppvision.tasks.multibit import packing
from ppvision.tasks.multibit.packing import pack_checkpoint
from tests.helpers.configs import classification_config
from tests.helpers.messages import raises_naming

BITS = (8, 4, 2)
EPSILON = 1e-5


def pictures(count: int = 6) -> list[np.ndarray]:
    """float64 `[3, 5, 7]` each, of different means, so that one alone tells little of all."""
    rng = np.random.default_rng(0)
    return [rng.normal(rng.normal(0, 2, (3, 1, 1)), 1, (3, 5, 7)) for _ in range(count)]


def shown_to(model: nn.Layer, images: list[np.ndarray]) -> None:
    model.eval()
    with paddle.no_grad():
        for image in images:
            model(paddle.to_tensor(image[None], "float32"))


@pytest.fixture
def calibrated(tmp_path, monkeypatch):
    """A small model at three widths with rounded activations, calibrated; and its pictures."""
    paddle.seed(1)
    net = nn.Sequential(nn.Conv2D(3, 4, 3), nn.Conv2D(4, 5, 1), nn.BatchNorm2D(5))
    rules = {"0": {"activations": False}}
    config = slim_quant_config(net, bits=BITS, activations=True, layers=rules)
    once = OnceQAT(LayeredQAT(config).quantize(net), BITS)
    images = {}
    for number, image in enumerate(pictures()):
        path = tmp_path / f"{number}.png"
        path.touch()
        images[path] = image
    monkeypatch.setattr(packing, "read_sample", lambda path, max_value: images[path])

    def predict(model: nn.Layer, image: np.ndarray) -> None:
        shown_to(model, [image])

    job = SimpleNamespace(predict_image=predict, max_value=None)
    packing._calibrate(job, once, tmp_path)
    return once, list(images.values())


def hidden(once: OnceQAT, images: list[np.ndarray], bits: int) -> list[np.ndarray]:
    """What the second layer reads while the weights are at a width."""
    arrays = extract_state(once.model, BITS).state_dict(bits)
    weight, bias = (paddle.to_tensor(arrays[f"0.{name}"]) for name in ("weight", "bias"))
    return [F.conv2d(paddle.to_tensor(x[None], "float32"), weight, bias).numpy() for x in images]


def test_steps_of_activations_are_the_best_at_each_width(calibrated):
    """For what the layer reads while the weights are at the highest."""
    once, images = calibrated
    values = np.concatenate([x.ravel() for x in hidden(once, images, 8)])
    quanter = once.model[1].activation_quanter
    expected = [find_rounding_step(values, bits, signed=True) for bits in BITS]
    np.testing.assert_allclose(quanter.steps(), expected, rtol=1e-5)


def test_statistics_are_those_of_their_width(calibrated):
    once, images = calibrated
    found = extract_state(once.model, BITS)
    for bits in BITS[1:]:  # the highest keeps those of the float model
        once.set_bits(bits)
        once.eval()
        with paddle.no_grad():
            seen = [
                once.model[1](once.model[0](paddle.to_tensor(x[None], "float32"))).numpy()
                for x in images
            ]
        x = np.concatenate(seen)
        arrays = found.statistics[bits]
        np.testing.assert_allclose(arrays["2._mean"], x.mean((0, 2, 3)), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(arrays["2._variance"], x.var((0, 2, 3)), rtol=1e-3)


def test_the_folder_and_the_pictures_are_named(tmp_path, crops, weights_of_resnet, capsys):
    job, weights = weights_of_resnet
    (tmp_path / "empty").mkdir()
    for folder, tokens in (
        (tmp_path / "empty", "--calibration: images, empty"),
        (tmp_path / "missing", "--calibration: file folder, missing"),
    ):
        with raises_naming((ValueError, FileNotFoundError), *tokens.split()):
            pack_checkpoint(job(), weights, tmp_path / "out", ptq=True, calibration=folder)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png"):
        pack_checkpoint(job(), weights, tmp_path / "out", ptq=True, calibration=broken)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").touch()
    with raises_naming(FileExistsError, "earlier", "layered"):
        pack_checkpoint(job(), weights, other, ptq=True, calibration=broken)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def weights_of_resnet(tmp_path, crops):
    content = classification_config(crops)
    content["model"] = {"type": "resnet20", "num_classes": 3}
    content["slim_config"] = {"bits": [8, 4], "activations": True}
    config = tmp_path / "job.yml"
    config.write_text(yaml.safe_dump(content))
    weights = tmp_path / "float.pdparams"
    paddle.save(open_job(config).float_model.state_dict(), str(weights))
    return lambda: open_job(config), weights
