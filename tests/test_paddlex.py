"""PaddleX itself, in an environment of its own, on folders of `export --for paddlex`.

    python3 -m venv ~/paddlex
    ~/paddlex/bin/pip install "paddlex[cv,serving]==3.7.2" "paddlepaddle==3.2.2"
    PPVISION_PADDLEX_PYTHON=~/paddlex/bin/python bash scripts/test.sh --all -k test_paddlex

Without that variable the environment is made here.
"""

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import paddle
import pytest
from paddle import nn
from PIL import Image

import ppvision
from ppvision.deploy import Predictor, export_model
from ppvision.tasks import open_job
from tests.helpers.configs import ROOT
from tests.helpers.environments import environment
from tests.helpers.small_detectors import WARNINGS, small_detector, write_detector
from tests.helpers.verbs import ppvision as run_verb

pytestmark = [pytest.mark.all, *WARNINGS]

REQUIREMENTS = ["paddlex[cv,serving]==3.7.2", "paddlepaddle==3.2.2"]
CONFIG = ROOT / "configs" / "segmentation" / "segformer_pale_nano_digit_scenes.yml"
ZOO = "segformer_pale_nano.digit_scenes"
RESIZE = "[{type: Resize, target_size: [128, 96]}, {type: Normalize}]"
CLEAR = 1e-3  # distance of the two highest scores from which labels must be equal
SIDE = 64


@pytest.fixture(scope="module")
def paddlex_python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("environment") / "paddlex"
    return environment("PPVISION_PADDLEX_PYTHON", REQUIREMENTS, folder)


@pytest.fixture(scope="module")
def pictures(scenes, tmp_path_factory):
    """A scene as it is, and one of another size and shape."""
    source = scenes / "images" / "val"
    target = tmp_path_factory.mktemp("pictures")
    shutil.copy(source / "000000.jpg", target / "0.jpg")
    with Image.open(source / "000001.jpg") as image:
        image.resize((131, 97), Image.Resampling.BICUBIC).save(target / "1.png")
    return sorted(target.iterdir())


@pytest.fixture(scope="module")
def folders(scenes, pictures, tmp_path_factory):
    """Exports by name."""
    root = tmp_path_factory.mktemp("for-paddlex")
    data = ("-o", f"val_dataset.dataset_root={scenes}", f"train_dataset.dataset_root={scenes}")
    for name, options in {
        "any": (),
        "resized": ("-o", f"val_dataset.transforms={RESIZE}"),
        "fixed": (
            *("-o", f"val_dataset.transforms={RESIZE}"),
            *("--input_shape", "1", "3", "96", "128"),
        ),
    }.items():
        where = ("--model_path", ZOO, "--save_dir", root / name, "--for", "paddlex")
        assert run_verb("export", "-c", CONFIG, *where, *data, *options) == 0
    paddle.seed(0)
    net = ppvision.create_model("pale_nano", num_classes=7)
    net.head.weight.set_value(20 * net.head.weight)
    for name, sizes in {
        "classes": [{"type": "Resize", "target_size": [SIDE, SIDE]}],
        # The shorter side becomes 75, so that an odd number of rows or columns is cut off.
        "cropped": [
            {"type": "ResizeByShort", "short_size": SIDE + 11},
            {"type": "CenterCrop", "target_size": [SIDE, SIDE]},
        ],
    }.items():
        export_model(
            net,
            root / name,
            input_shape=[None, 3, SIDE, SIDE],
            task="classification",
            output_op="softmax",
            classes=list("abcdefg"),
            transforms=[*sizes, {"type": "Normalize"}],
            paddlex_name="ResNet18",
        )
    small = nn.Sequential(
        *(nn.Conv2D(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2D(16, 16, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(16, 7)),
    )
    small[-1].weight.set_value(8 * small[-1].weight)
    export_model(
        small,
        root / "integers",
        input_shape=[1, 3, SIDE, SIDE],
        task="classification",
        output_op="softmax",
        classes=list("abcdefg"),
        transforms=[{"type": "Resize", "target_size": [SIDE, SIDE]}, {"type": "Normalize"}],
        paddlex_name="ResNet18",
        int8=True,
        calibration=[str(picture) for picture in pictures],
    )
    for name, architecture, shape, ratio in (
        ("boxes", "YOLOv3", [1, 3, SIDE, SIDE], False),
        ("masks", "MaskRCNN", [1, 3, None, None], False),
        ("ratio", "FasterRCNN", [1, 3, None, None], True),
    ):
        config = small_detector(scenes, architecture)
        for reader in ("EvalReader", "TestReader"):
            resize = config[reader]["sample_transforms"][1]["Resize"]
            config[reader]["sample_transforms"][1] = {"Resize": {**resize, "keep_ratio": ratio}}
            config[reader]["batch_transforms"] = [{"PadBatch": {"pad_to_stride": 32 * ratio}}]
        job = open_job(write_detector(root / f"{name}.yml", config))
        model = job.float_model
        for path, parameter in model.named_parameters():
            if "pred_cls" in path or "bbox_score" in path:  # scores of many sizes
                parameter.set_value(paddle.randn(parameter.shape) * 0.5)
        model.eval()
        job.export(
            model,
            root / name,
            input_shape=shape,
            output_op=None,
            model_format="paddle",
            paddlex_name=job.paddlex_name,
        )
    return {path.name: path for path in root.iterdir() if path.is_dir()}


@pytest.fixture(scope="module")
def found(paddlex_python, folders, pictures, tmp_path_factory):
    """What PaddleX predicts: `folder.picture.part` -> array."""
    target = tmp_path_factory.mktemp("found") / "results.npz"
    command = [paddlex_python, ROOT / "tests" / "helpers" / "run_paddlex.py", target, *pictures]
    run = subprocess.run(
        [str(part) for part in (*command, "--", *folders.values())],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    with np.load(target) as arrays:
        return dict(arrays)


def test_labels_without_a_resize(found, folders, pictures):
    """In every pixel."""
    predictor = Predictor(folders["any"])
    for number, picture in enumerate(pictures):
        own = predictor(str(picture))
        assert len(np.unique(own)) > 1
        np.testing.assert_array_equal(found[f"any.{number}.classes"], own)


@pytest.fixture(scope="module")
def scores():
    """Of the model in eager mode, on a picture that is resized as the folders say: `[K, h, w]`."""
    model = open_job(CONFIG).load(ZOO)
    model.eval()

    def compute(picture: Path) -> np.ndarray:
        bytes_ = cv2.resize(cv2.cvtColor(cv2.imread(str(picture)), cv2.COLOR_BGR2RGB), (128, 96))
        x = (bytes_.astype(np.float32) / 255 - 0.5) / 0.5
        with paddle.no_grad():
            (logits,) = model(paddle.to_tensor(x.transpose(2, 0, 1)[None]))
        return logits[0].numpy()

    return compute


@pytest.mark.parametrize("name", ["resized", "fixed"])
def test_labels_with_a_resize(found, folders, pictures, scores, name):
    """Where the two highest scores are further apart than 1e-3."""
    predictor = Predictor(folders[name])
    for number, picture in enumerate(pictures):
        own, other = predictor(str(picture)), found[f"{name}.{number}.classes"]
        ordered = np.sort(scores(picture), axis=0)
        distance = ordered[-1] - ordered[-2]  # [96, 128]
        distance = cv2.resize(distance, own.shape[::-1], interpolation=cv2.INTER_NEAREST)
        clear = distance > CLEAR
        assert clear.mean() > 0.99
        assert len(np.unique(own[clear])) > 1
        np.testing.assert_array_equal(other[clear], own[clear])


@pytest.mark.parametrize("name", ["classes", "cropped", "integers"])
def test_classes(found, folders, pictures, name):
    """PaddleX rounds scores to five places. Of integers it computes the codes in float, where an
    activation between two codes may become the other one."""
    bound = 1e-3 if name == "integers" else 2e-5
    predictor = Predictor(folders[name])
    for number, picture in enumerate(pictures):
        own = predictor(str(picture))
        ids, scores = (found[f"{name}.{number}.{part}"] for part in ("class_ids", "scores"))
        assert len(ids) == 5
        np.testing.assert_allclose(scores, own.probabilities[ids], rtol=0, atol=bound)
        assert found[f"{name}.{number}.names"][0] == own.name


@pytest.mark.parametrize("name", ["boxes", "masks", "ratio"])
def test_boxes(found, folders, pictures, name):
    """Within 1e-3 pixels; PaddleX cuts boxes at the picture's borders."""
    predictor = Predictor(folders[name])
    for number, picture in enumerate(pictures):
        own, rows = predictor(str(picture)), found[f"{name}.{number}.rows"]
        with Image.open(picture) as image:
            ends = np.array([*image.size, *image.size])
        boxes = own.boxes.clip(0, ends)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        boxes, scores = boxes[kept], own.scores[kept]
        assert len(rows) == len(boxes) > 5
        rows = rows[np.argsort(-rows[:, 1], kind="stable")]
        np.testing.assert_allclose(rows[:, 1], scores, atol=1e-5)
        near = np.abs(rows[:, None, 2:] - boxes[None]).max(axis=2).min(axis=1)
        assert near.max() < 1e-3


def test_masks(found, folders, pictures):
    """PaddleX gives the part inside of the box, whose sides it rounds."""
    own = Predictor(folders["masks"])(str(pictures[0]))
    with Image.open(pictures[0]) as image:
        ends = np.array([*image.size, *image.size])
    boxes = own.boxes.clip(0, ends)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    expected = [
        mask[round(top) : round(bottom), round(left) : round(right)]
        for (left, top, right, bottom), mask in zip(boxes[kept], own.masks[kept], strict=True)
    ]
    theirs = [found[f"masks.0.mask{number}"] for number in range(len(expected))]
    assert sum(int(mask.sum()) for mask in expected) > 100
    assert sum(int(mask.sum()) for mask in theirs) == sum(int(mask.sum()) for mask in expected)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_a_pipeline_that_serves(paddlex_python, folders, pictures, tmp_path):
    """`paddlex --serve` answers over HTTP on this machine with the labels of `Predictor`."""
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(
        "pipeline_name: semantic_segmentation\n"
        "SubModules:\n"
        "  SemanticSegmentation:\n"
        "    module_name: semantic_segmentation\n"
        "    model_name: SegFormer-B0\n"
        f"    model_dir: {folders['any']}\n"
        "    batch_size: 1\n"
        "    target_size: null\n"
    )
    port = _free_port()
    command = [paddlex_python.parent / "paddlex", "--serve", "--pipeline", pipeline]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", port]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [str(part) for part in command],
            stdout=log,
            stderr=log,
            env={**os.environ, "PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK": "True"},
        )
        try:
            answer = _ask(server, port, pictures[1], tmp_path / "log")
        finally:
            server.kill()
            server.wait()
    labels = np.array(answer["labelMap"]).reshape(answer["size"])
    np.testing.assert_array_equal(labels, Predictor(folders["any"])(str(pictures[1])))


def _ask(server: subprocess.Popen, port: int, picture: Path, log: Path) -> dict:
    body = {"image": base64.b64encode(picture.read_bytes()).decode(), "visualize": False}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/semantic-segmentation",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(300):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            with opener.open(request, timeout=120) as response:
                return json.load(response)["result"]
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:  # not up yet
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])
