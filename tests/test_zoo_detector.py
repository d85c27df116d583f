"""A detector as weights of the zoo: `benchmark/zoo_weights.py`, then prediction by its name."""

import json

import cv2
import numpy as np
import paddle
import pytest

pytest.importorskip("ppdet", reason="pip install --no-deps paddledet==2.6.0")

import ppvision
from benchmark.zoo_weights import write_zoo_weights
from ppvision.tasks import open_job
from ppvision.zoo import cards
from tests.helpers.small_detectors import SIDE, WARNINGS, small_detector, write_detector
from tests.helpers.verbs import ppvision as run_verb

pytestmark = WARNINGS

NAME = "ppyoloe_pale_nano.random"
FACTS = {
    "model": "pale_nano",
    "architecture": "ppyoloe_pale_nano",
    "tag": "random",
    "parts": "a detector of random weights",
    "data": "none",
    "command": "none",
    "hours": None,
    "machine": "none",
    "score": "none",
}


@pytest.fixture(scope="module")
def written(scenes, tmp_path_factory):
    """The job, and the folder of the zoo."""
    work = tmp_path_factory.mktemp("zoo")
    content = small_detector(scenes, "YOLOv3")
    content["YOLOv3"]["backbone"] = "pale_nano"
    content["pale_nano"] = content.pop("two_blocks")
    config = write_detector(work / "job.yml", content)
    job = open_job(config)
    paddle.seed(0)
    random = np.random.default_rng(0)
    for name, value in job.float_model.state_dict().items():
        if "pred_" in name and name.endswith("weight"):  # which start as zeros
            value.set_value(random.normal(0, 0.3, value.shape).astype(np.float32))
    paddle.save(job.float_model.state_dict(), str(work / "random.pdparams"))
    folder = write_zoo_weights(
        config, work / "random.pdparams", FACTS, bits=[8, 6, 4], side=0, options=[], output=work
    )
    return job, folder


@pytest.fixture
def zoo(written, tmp_path, monkeypatch):
    job, folder = written
    monkeypatch.setenv("PPVISION_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cards, "WEIGHTS_FOLDER", folder.parent)
    monkeypatch.setitem(cards.ZOO_WEIGHTS, NAME, cards.read_card(folder / cards.CARD))
    return job, folder


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(2).integers(0, 256, (90, 120, 3), np.uint8)


def compare(found, expected) -> None:
    """The best objects of two predictions."""
    best = slice(0, 10)
    np.testing.assert_allclose(found.scores[best], expected.scores[best], atol=1e-4)
    np.testing.assert_array_equal(found.class_ids[best], expected.class_ids[best])
    np.testing.assert_allclose(found.boxes[best], expected.boxes[best], atol=0.1)
    assert len(expected.scores) > 10


@pytest.mark.parametrize("bits", [8, 4])
def test_predicts_by_its_name_at_every_width(zoo, picture, bits):
    job, folder = zoo
    expected = job.predict_image(open_job_at(job, folder, bits), picture)
    how = {} if bits == 8 else {"layered": folder, "bits": bits}
    predictor = ppvision.Predictor(NAME, **how)
    assert predictor.manifest.input_shape == [1, 3, SIDE, SIDE]
    compare(predictor(picture), expected)
    assert cards.ZOO_WEIGHTS[NAME].config.input_size == (3, SIDE, SIDE)


def open_job_at(job, folder, bits: int):
    """The eager model with the weights of one width, in float."""
    from ppvision.quant.store.model import load_layered

    model = job.float_model
    model.set_state_dict(load_layered(folder, bits).state_dict)
    return model


def test_the_command_line_needs_no_config(zoo, picture, tmp_path, capsys):
    cv2.imwrite("picture.png", picture[..., ::-1])
    words = ("--image_path", "picture.png", "--save_dir", "found")
    assert run_verb("predict", "--model_path", NAME, *words) == 0
    (entry,) = json.loads((tmp_path / "found" / "predictions.json").read_text()).values()
    found = ppvision.Predictor(NAME)(picture)
    assert [item["score"] for item in entry] == pytest.approx(found.scores.tolist(), abs=1e-5)
    assert entry[0]["class"] == found.names[0]
    assert run_verb("predict", "--model_path", "nowhere.pdparams", *words) == 1
    assert "--config" in capsys.readouterr().err


def test_the_backbone_is_weights_of_pale_nano(zoo):
    net = ppvision.create_model("pale_nano", pretrained="random", features_only=True)
    arrays = ppvision.zoo.weights.read_weights(NAME)
    name = "stages.0.0.attention.query.2.weight"
    np.testing.assert_array_equal(net.state_dict()[name].numpy(), arrays[f"backbone.net.{name}"])
