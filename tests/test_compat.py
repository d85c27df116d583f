"""Files that users have: what earlier versions exported, packed and trained is still read.

Other tests read what the same code has just written, so a change to both sides of a format passes
them and breaks every older file. Here the files are committed (`tests/compat/VERSION`), written by
`tests/compat/write_artefacts.py` at that version; the expected numbers are those of its models in
eager mode. A failure means that users lose files: keep reading the older format, and never write
the artefacts again.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest

from ppvision.cli import run
from ppvision.deploy import Predictor
from ppvision.deploy.run.engines import has_openvino
from ppvision.engine.run_folder import read_metrics
from ppvision.quant import load_layered
from ppvision.quant.packed import pack_model
from ppvision.tasks import open_job
from ppvision.zoo import create_model, load_weights
from ppvision.zoo.weights import read_weights
from tests.compat.frozen import CLASSES, SmallNet, make_batch, make_picture

COMPAT = Path(__file__).parent / "compat"
VERSIONS = sorted(path.parent.name for path in COMPAT.glob("*/expected.npz"))

STEPS = 6  # of the run, which stopped after its checkpoint of step 3


@pytest.fixture(params=VERSIONS)
def version(request) -> Path:
    return COMPAT / request.param


@pytest.fixture
def expected(version) -> dict[str, np.ndarray]:
    with np.load(version / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def artefact(version, tmp_path):
    """`artefact(name)`: a copy of a file or folder, so that no test can change what is stored."""

    def copy(name: str) -> Path:
        source, target = version / name, tmp_path / name
        return Path((shutil.copytree if source.is_dir() else shutil.copy)(source, target))

    return copy


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for rounding, which differs by engine and processor: to 1e-4 of the largest."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@paddle.no_grad()
def run_eager(model: paddle.nn.Layer, x: np.ndarray) -> np.ndarray:
    """The (first) output in evaluation mode."""
    model.eval()
    out = model(paddle.to_tensor(x))
    return (out[0] if isinstance(out, list) else out).numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def test_there_are_artefacts():
    assert "0.1.0" in VERSIONS


# -- exports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_onednn", [None, True, False])
def test_segmentation_export(artefact, expected, use_onednn):
    """Pale at a known size: `model.json` and, for OpenVINO, `model.pdmodel`."""
    predictor = Predictor(artefact("segmentation"), use_onednn=use_onednn)
    quickest = "openvino" if has_openvino() else "onednn"
    assert predictor.engine == {None: quickest, True: "onednn", False: "native"}[use_onednn]
    (logits,) = predictor.run(make_batch(1, 3, 64, 64))
    assert_close(logits[..., ::5, ::5], expected["segmentation.logits"])
    labels = predictor(make_picture(64, 64))
    # Where two classes are equally likely, rounding chooses.
    assert (labels != expected["segmentation.labels"]).mean() < 0.01


def test_classification_export(artefact, expected):
    predictor = Predictor(artefact("classification"))
    (shares,) = predictor.run(make_batch(2, 3, 40, 40))
    assert_close(shares, softmax(expected["layered.logits_w8"]))
    found = predictor(make_picture(33, 47))
    wanted = softmax(expected["classification.logits"])[0]
    assert_close(found.probabilities, wanted)
    assert found.name == CLASSES[wanted.argmax()]


def test_packed_export(artefact, expected):
    predictor = Predictor(artefact("packed"))
    assert predictor.bits == 4
    (logits,) = predictor.run(make_batch(2, 3, 40, 40))
    assert_close(logits, expected["layered.logits_w4"])


def test_onnx_export(artefact, expected):
    pytest.importorskip("onnxruntime", reason="runs ONNX exports: pip install onnxruntime")
    (logits,) = Predictor(artefact("onnx")).run(make_batch(2, 3, 40, 40))
    assert_close(logits, expected["weights.logits"])


def test_detector_export(artefact, expected):
    found = Predictor(artefact("detector"))(make_picture(50, 70))
    np.testing.assert_array_equal(found.class_ids, expected["detector.class_ids"])
    assert_close(found.scores, expected["detector.scores"])
    assert_close(found.boxes, expected["detector.boxes"])


# -- weights and layered models --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pdparams"])
def test_weights(artefact, expected, name):
    net = SmallNet()
    load_weights(net, artefact(name))
    found = run_eager(net, make_batch(2, 3, 40, 40))
    assert_close(found, expected["weights.logits"])


def test_layered_model(artefact, expected):
    folder = artefact("layered")
    for bits in (8, 4, 2):
        loaded = load_layered(folder, bits)
        assert loaded.config["classes"] == CLASSES
        net = pack_model(SmallNet(), loaded.state, bits)
        found = run_eager(net, make_batch(2, 3, 40, 40))
        assert_close(found, expected[f"layered.logits_w{bits}"])


def test_layered_model_in_a_float_export(artefact, expected):
    predictor = Predictor(artefact("classification"), layered=artefact("layered"), bits=2)
    for bits in (2, 4, 8):
        predictor.set_bits(bits)
        (shares,) = predictor.run(make_batch(2, 3, 40, 40))
        assert_close(shares, softmax(expected[f"layered.logits_w{bits}"]))


def test_layered_model_of_the_zoo(artefact, expected):
    """Its layers keep their names, and `create_model` takes the options that it names."""
    folder = artefact("layered_resnet20")
    for bits in (3, 2):
        loaded = load_layered(folder, bits)
        options = dict(loaded.config["model"])
        net = pack_model(create_model(options.pop("type"), **options), loaded.state, bits)
        found = run_eager(net, make_batch(2, 3, 32, 32))
        assert_close(found, expected[f"layered_resnet20.logits_w{bits}"])


# -- a run folder ----------------------------------------------------------------------------------


@pytest.fixture
def run_folder(artefact, tmp_path, monkeypatch) -> Path:
    """The run and its data, in the working directory: the config's paths are relative."""
    artefact("scenes")
    folder = artefact("run")
    monkeypatch.chdir(tmp_path)
    return folder


def test_best_model_of_a_run(run_folder, expected):
    """The run's own config builds the model that its `.pdparams` fits."""
    job = open_job(run_folder / "config.yml")
    model = job.load(run_folder / "best_model" / "model.pdparams")
    logits = run_eager(model, make_batch(1, 3, 64, 64))[..., ::5, ::5]
    assert_close(logits, expected["run.logits"])
    picture = Path("scenes", Path("scenes/val.txt").read_text().split()[0])
    assert (job.predict_image(model, picture) != expected["run.labels"]).mean() < 0.01


def test_a_run_goes_on(run_folder, version):
    """From the checkpoint to the last step, where the weights are those of a run without a stop."""
    before = read_metrics(run_folder / "metrics.csv")
    code = run(
        [
            *("train", "--config", "run/config.yml", "--save_dir", "run", "--resume", "auto"),
            *("--do_eval", "--use_ema", "--log_iters", "1", "--save_interval", "3"),
        ]
    )
    assert code == 0
    rows = read_metrics(run_folder / "metrics.csv")
    losses = {step: value for step, tag, value in rows if tag == "Train/loss"}
    assert list(losses) == list(range(1, STEPS + 1))
    assert all(math.isfinite(loss) for loss in losses.values())
    kept = [row for row in before if row[0] <= 3]
    assert rows[: len(kept)] == kept

    statistics = json.loads((version / "expected.json").read_text())
    last = run_folder / "checkpoints" / f"step_{STEPS}"
    for part in ("model", "ema"):
        arrays = read_weights(last / f"{part}.safetensors")
        wanted = statistics[f"run.{part}"]
        assert arrays.keys() == wanted.keys()
        for name, array in arrays.items():
            flat = array.astype(np.float64).reshape(-1)
            found = [flat.mean(), flat.std(), *flat[:3]]
            np.testing.assert_allclose(found, wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)
