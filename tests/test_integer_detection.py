"""Detectors in integers, through the verbs."""

import csv

import numpy as np
import paddle
import pytest

pytest.importorskip("ppdet", reason="pip install --no-deps paddledet==2.6.0")

from ppvision.deploy import Predictor
from ppvision.deploy.run.engines import has_openvino
from ppvision.deploy.run.manifest import read_manifest
from ppvision.deploy.run.precision import find_integer_unit, find_usable_flags
from ppvision.deploy.verify.detection_parity import Bounds, scores_with_nothing
from ppvision.tasks import open_job
from tests.helpers.small_detectors import SIDE, WARNINGS, small_detector, write_detector
from tests.helpers.verbs import ppvision

pytestmark = WARNINGS

SHAPE = ("--input_shape", 1, 3, SIDE, SIDE)

needs_integers = pytest.mark.skipif(
    not has_openvino() or find_integer_unit(find_usable_flags()) is None,
    reason="no OpenVINO, or a processor without VNNI",
)


def write_weights(config, path):
    """Fresh weights, with scores of many sizes, some of them sure."""
    paddle.seed(0)
    model = open_job(config).float_model
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("pred_cls", "retina_cls", "fcos_head_cls")):
            parameter.set_value(paddle.randn(parameter.shape) * 0.5)
    paddle.save(model.state_dict(), str(path))
    return path


@pytest.fixture(scope="module")
def detector(tmp_path_factory, scenes):
    """`(config, weights)` of a small PP-YOLOE."""
    folder = tmp_path_factory.mktemp("detector")
    config = write_detector(folder / "job.yml", small_detector(scenes, "YOLOv3"))
    return config, write_weights(config, folder / "float.pdparams")


def check_predictions(folder, job, model, scenes):
    """The integers find what the same codes find in float, and roughly what the model finds."""
    paths = sorted((scenes / "images" / "val").iterdir())
    with Predictor(folder, precision="int8", threads=1) as predictor:
        assert (predictor.precision, predictor.engine) == ("int8", "openvino")
        integers = [predictor(path) for path in paths]
    with Predictor(folder, precision="float32", threads=1) as predictor:
        as_float = [predictor(path) for path in paths]
    for path, ours, theirs in zip(paths, integers, as_float, strict=True):
        assert len(ours) > 3
        np.testing.assert_allclose(ours.scores[:3], theirs.scores[:3], atol=0.02)
        eager = job.predict_image(model, path)
        np.testing.assert_allclose(ours.scores[:3], eager.scores[:3], atol=0.1)


@needs_integers
def test_exported_scored_and_run(detector, scenes, tmp_path, capsys):
    config, weights = detector
    folder = tmp_path / "int8"
    where = ("-c", config, "--model_path", weights, "--save_dir", folder)
    assert ppvision("export", *where, "--int8", *SHAPE) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in table if row and row[0] in ("float32", "int8")] == ["float32", "int8"]
    manifest = read_manifest(folder)
    assert (manifest.bits, manifest.activations, manifest.openvino) == (8, 8, True)
    assert manifest.keep_float == ["yolo_head.proj_conv"]  # the numbers 0 to 16
    assert manifest.calibration.pictures == 12
    assert manifest.nms.kept > 0
    assert manifest.int8.passed
    assert manifest.int8.equal_labels >= 0.995
    assert manifest.int8.metric == "bbox_AP"
    job = open_job(config)
    check_predictions(folder, job, job.load_float(weights), scenes)


@needs_integers
@pytest.mark.parametrize(
    ("widths", "layers"),
    [
        ((4,), {"neck.*": {"float": True}}),  # an export's time goes by layers
        ((8, 2), {}),
    ],
    ids=["4", "8 2"],
)
@pytest.mark.all
def test_codes_of_widths(widths, layers, detector, scenes, tmp_path):
    """Each width's integers run, and find what eager mode finds with its codes."""
    config, weights = detector
    layered, folder = tmp_path / "model.layered", tmp_path / "widths"
    slim = write_detector(tmp_path / "slim.yml", {"layers": layers})
    code = ppvision(
        *("pack", "-c", config, "--model_path", weights, "--ptq", "--activations", 8),
        *("--slim_config", slim, "--calibration", scenes / "images" / "val", "--output", layered),
    )
    assert code == 0
    where = ("-c", config, "--model_path", layered, "--save_dir", folder)
    assert ppvision("export", *where, "--bits", *widths, "--int8", *SHAPE) == 0
    with (folder / "widths.csv").open() as file:
        rows = [(row["bits"], row["arithmetic"]) for row in csv.DictReader(file)]
    assert rows == [(str(k), kind) for k in widths for kind in ("float32", "int8")]
    job, sizes = open_job(config), {}
    for k in widths:
        manifest = read_manifest(folder / f"w{k}")
        assert (manifest.bits, manifest.activations, manifest.openvino) == (k, 8, True)
        assert "yolo_head.proj_conv" in manifest.keep_float
        assert manifest.int8.passed
        assert manifest.int8.metric == "bbox_AP"
        sizes[k] = manifest.files["model.pdiparams"].bytes
        check_predictions(folder / f"w{k}", job, job.load(layered, k), scenes)
    if widths == (8, 2):
        assert sizes[2] < 0.5 * sizes[8]


@needs_integers
@pytest.mark.all
@pytest.mark.parametrize("architecture", ["RetinaNet", "FCOS"])
def test_other_detectors_of_one_stage(architecture, scenes, tmp_path):
    config = write_detector(tmp_path / "job.yml", small_detector(scenes, architecture))
    weights = write_weights(config, tmp_path / "float.pdparams")
    where = ("-c", config, "--model_path", weights, "--save_dir", tmp_path / "int8")
    assert ppvision("export", *where, "--int8", "--skip_eval", *SHAPE) == 0
    assert read_manifest(tmp_path / "int8").int8.passed


@pytest.mark.parametrize(
    ("architecture", "shape", "message"),
    [
        ("FasterRCNN", (1, 3, SIDE, SIDE), "expected a detector of one stage, got FasterRCNN"),
        ("YOLOv3", (2, 3, SIDE, SIDE), "expected input_shape with a batch of 1, got 2"),
        ("YOLOv3", (1, 3, None, None), "known height and width"),
    ],
)
def test_what_is_refused(architecture, shape, message, scenes, tmp_path, capsys):
    config = write_detector(tmp_path / "job.yml", small_detector(scenes, architecture))
    paddle.save(open_job(config).float_model.state_dict(), str(tmp_path / "float.pdparams"))
    where = ("-c", config, "--model_path", tmp_path / "float.pdparams")
    where += ("--save_dir", tmp_path / "m", "--skip_eval")
    assert ppvision("export", *where, "--int8", "--input_shape", *shape) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_nothing_is_a_class_of_its_own():
    scores = np.float32([[[0.5, 0.1], [0.2, 0.3]]])  # two classes, two places
    found = scores_with_nothing(scores, Bounds(score=0.4, overlap=0.7, count=-1))
    assert found.shape == (1, 3, 2)
    assert found.argmax(axis=1).tolist() == [[0, 2]]
