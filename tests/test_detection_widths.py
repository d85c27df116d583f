"""Pale + SDN + once-QAT in one detector: trained, packed, scored and exported at its widths."""

import numpy as np
import paddle
import pytest
from PIL import Image

pytest.importorskip("ppdet", reason="pip install --no-deps paddledet==2.6.0")

from ppvision.deploy import Predictor
from ppvision.deploy.run.manifest import read_manifest
from ppvision.engine.run_folder import read_metrics
from ppvision.quant import OnceQAT, load_layered
from ppvision.tasks import open_job
from tests.helpers.small_detectors import (
    ARCHITECTURES,
    SIDE,
    WARNINGS,
    best,
    small_detector,
    train,
    write_detector,
)
from tests.helpers.verbs import ppvision

pytestmark = WARNINGS

BITS = (8, 4, 2)
# An export's time goes by packed layers. By default one stage of the neck has them, as the backbone
# and the head have; by --all every layer.
FEWER = {"neck.*": {"float": True}, "neck.fpn_stages.0.*": {"max_bits": 8}}


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory, scenes):
    """Two steps of all three together: `(config, run folder)`."""
    folder = tmp_path_factory.mktemp("widths")
    content = small_detector(scenes, "YOLOv3", sdn=True)
    layers = {} if request.config.option.markexpr == "" else FEWER
    content["slim_config"] = {"bits": list(BITS), "layers": layers}
    config = write_detector(folder / "job.yml", content)
    assert train(config, folder / "run", "--iters", 2) == 0
    return config, folder / "run"


def test_scores_of_every_width(trained, capsys):
    config, run = trained
    tags = {tag for _, tag, _ in read_metrics(run / "metrics.csv")}
    assert {f"Evaluate/bbox_AP50_w{k}" for k in BITS} | {f"Train/loss_w{k}" for k in BITS} <= tags
    capsys.readouterr()
    assert ppvision("eval", "-c", config, "--model_path", best(run)) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    start = next(i for i, line in enumerate(lines) if line[:2] == ["bits", "bbox_AP"])
    assert [line[0] for line in lines[start + 1 :][:3]] == ["8", "4", "2"]
    assert ppvision("eval", "-c", config, "--model_path", best(run), "--bits", 4) == 0
    assert "bbox: AP" in capsys.readouterr().out


@pytest.fixture(scope="module")
def packed(trained):
    """The best model as layers."""
    config, run = trained
    folder = run.parent / "model.layered"
    arguments = ("-c", config, "--model_path", best(run), "--output", folder)
    assert ppvision("pack", *arguments) == 0
    return folder


@pytest.mark.all  # by default: widths of a segmentation network, and of the zoo's detector
@pytest.mark.parametrize("bits", [(2,), (8, 2)], ids=["2", "8 2"])
def test_packed_and_exported(trained, packed, tmp_path, capsys, bits):
    """`export` compares every width with eager mode itself."""
    config, layered = trained[0], packed
    loaded = load_layered(layered, 4)
    assert loaded.config["task"] == "detection"
    assert loaded.config["classes"] == [str(k) for k in range(10)]
    assert str(packed.parent) not in str(loaded.config)
    assert "proj_conv" in "".join(loaded.state_dict)

    folder = tmp_path / "widths"
    code = ppvision(
        *("export", "-c", config, "--model_path", layered, "--save_dir", folder),
        *("--bits", *bits, "--input_shape", 1, 3, SIDE, SIDE, "--skip_eval"),
    )
    assert code == 0
    assert "max_error" in capsys.readouterr().out
    sizes = {}
    picture = np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "x.png")
    job = open_job(config)
    for k in bits:
        manifest = read_manifest(folder / f"w{k}")
        assert (manifest.bits, manifest.task) == (k, "detection")
        sizes[k] = manifest.files["model.pdiparams"].bytes
        found = Predictor(folder / f"w{k}", threads=1)(picture)
        expected = job.predict_image(job.load(layered, k), tmp_path / "x.png")
        assert len(found) == len(expected)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    if 8 in bits:
        assert sizes[2] < 0.5 * sizes[8]


@pytest.mark.all
def test_the_graph_of_a_float_export_with_the_weights_of_a_width(trained, packed, tmp_path):
    config, layered = trained[0], packed
    where = ("-c", config, "--model_path", layered)
    shape = ("--input_shape", 1, 3, SIDE, SIDE)
    assert ppvision("export", *where, "--save_dir", tmp_path / "float", *shape) == 0
    picture = np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "x.png")
    job = open_job(config)
    composed = Predictor(tmp_path / "float", layered=layered, bits=4, threads=1)(picture)
    expected = job.predict_image(job.load(layered, 4), tmp_path / "x.png")
    np.testing.assert_allclose(composed.scores, expected.scores, atol=1e-4)


def test_pack_without_training(trained, scenes, tmp_path):
    """Float weights of a detector, with calibration pictures for the statistics."""
    config = write_detector(tmp_path / "job.yml", small_detector(scenes, "YOLOv3"))
    job = open_job(config)
    paddle.save(job.model.state_dict(), str(tmp_path / "float.pdparams"))
    code = ppvision(
        *("pack", "-c", config, "--model_path", tmp_path / "float.pdparams", "--ptq"),
        *("--calibration", scenes / "images" / "val", "--output", tmp_path / "layered"),
    )
    assert code == 0
    assert load_layered(tmp_path / "layered").bits == 8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ends_stay_at_eight_bits(scenes, tmp_path, architecture):
    content = small_detector(scenes, architecture)
    content["slim_config"] = {"bits": [4, 2]}
    job = open_job(write_detector(tmp_path / "job.yml", content))
    ends = job.ends
    assert isinstance(job.model, OnceQAT)
    layers = dict(job.model.model.named_sublayers())
    assert all(layers[name].weight_quanter.range.low == 8 for name in ends)
    results = len(ends) - 1  # of classes and boxes, by level, stage or kind
    expected = {"FasterRCNN": 4, "MaskRCNN": 5, "CascadeRCNN": 8, "RetinaNet": 2, "FCOS": 3}
    assert results == (expected | {"YOLOv3": 6})[architecture]


def test_distillation_is_refused(scenes, tmp_path, capsys):
    content = small_detector(scenes, "YOLOv3")
    content["slim_config"] = {"distillation": 0.5}
    config = write_detector(tmp_path / "job.yml", content)
    assert train(config, tmp_path / "run", "--iters", 1) == 1
    assert "a detector's losses are its own" in capsys.readouterr().err
