"""OpenVINO's own package, in an environment of its own, on our exports, and `examples/cpp` on its
headers and library. (Paddle has an older OpenVINO inside, which `test_openvino.py` tests.)

    python3 -m venv ~/openvino && ~/openvino/bin/pip install openvino==2026.4.1 numpy
    PPVISION_OPENVINO_PYTHON=~/openvino/bin/python bash scripts/test.sh --all -k openvino_package

Without that variable the environment is made here. The example also needs CMake, a compiler,
OpenCV and yaml-cpp (`examples/cpp/README.md`).
"""

import subprocess

import numpy as np
import paddle
import pytest
from PIL import Image

import ppvision
from ppvision.deploy import Predictor, export_model
from tests.helpers.configs import ROOT
from tests.helpers.environments import environment
from tests.helpers.verbs import ppvision as run_verb

pytestmark = pytest.mark.all

CONFIG = ROOT / "configs" / "segmentation" / "segformer_pale_nano_digit_scenes.yml"
ZOO = "segformer_pale_nano.digit_scenes"
SIDE = 56
FORMS = {"fixed": (), "any-onnx": ("--format", "onnx"), "fixed-onnx": ("--format", "onnx")}


@pytest.fixture(scope="module")
def openvino_python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("environment") / "openvino"
    return environment("PPVISION_OPENVINO_PYTHON", ["openvino==2026.4.1", "numpy"], folder)


@pytest.fixture(scope="module")
def folders(scenes, tmp_path_factory):
    """A segmentation model (classes) and a classifier (scores), in each form."""
    root = tmp_path_factory.mktemp("exports")
    data = ("-o", f"val_dataset.dataset_root={scenes}", f"train_dataset.dataset_root={scenes}")
    paddle.seed(0)
    net = ppvision.create_model("pale_nano", num_classes=7, pale_size=4)
    net.head.weight.set_value(20 * net.head.weight)
    for form, flags in FORMS.items():
        known = form.startswith("fixed")
        shape = ("--input_shape", 1, 3, SIDE, SIDE) if known else ()
        where = ("--model_path", ZOO, "--save_dir", root / f"labels-{form}")
        assert run_verb("export", "-c", CONFIG, *where, *data, *shape, *flags) == 0
        export_model(
            net,
            root / f"scores-{form}",
            input_shape=[1, 3, SIDE, SIDE] if known else [None, 3, None, None],
            task="classification",
            output_op="softmax",
            transforms=[{"type": "Normalize"}],
            format="onnx" if flags else "paddle",
        )
    return {path.name: path for path in root.iterdir()}


def sizes_of(name: str) -> list[tuple[int, int]]:
    return [(SIDE, SIDE)] if "fixed" in name else [(SIDE, SIDE), (75, 61)]


def test_it_agrees(openvino_python, folders, tmp_path):
    random, given, expected = np.random.default_rng(0), {}, {}
    for name, folder in folders.items():
        with Predictor(folder, threads=1) as predictor:
            for number, (height, width) in enumerate(sizes_of(name)):
                coarse = random.normal(size=(1, 3, 8, 8)).repeat(10, 2).repeat(10, 3)
                x = coarse[:, :, :height, :width].astype(np.float32)
                given[f"{name}.{number}"] = x
                expected[f"{name}.{number}"] = predictor.run(x)[0]
    np.savez(tmp_path / "given.npz", **given)
    files = [
        f"{name}={folder / ('model.onnx' if 'onnx' in name else 'model.pdmodel')}"
        for name, folder in folders.items()
    ]
    command = [openvino_python, ROOT / "tests" / "helpers" / "run_openvino.py"]
    command += [tmp_path / "given.npz", tmp_path / "found.npz", *files]
    subprocess.run([str(word) for word in command], check=True, timeout=300)
    with np.load(tmp_path / "found.npz") as found:
        assert set(found.files) == set(expected)
        for key, right in expected.items():
            if key.startswith("labels"):
                assert len(np.unique(right)) > 1
                assert (found[key] == right).mean() > 0.999, key
            else:
                np.testing.assert_allclose(found[key], right, atol=1e-4, err_msg=key)


def run(*words: object) -> None:
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_example_in_cpp(openvino_python, folders, scenes, tmp_path):
    cmake = ["import openvino.utils; print(openvino.utils.get_cmake_path())"]
    found = subprocess.run(
        [str(openvino_python), "-c", *cmake], capture_output=True, text=True, check=True
    )
    build = tmp_path / "build"
    configured = subprocess.run(
        [
            "cmake",
            "-S",
            ROOT / "examples/cpp",
            "-B",
            build,
            f"-DOpenVINO_DIR={found.stdout.strip()}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if configured.returncode:
        pytest.skip(f"no OpenCV, yaml-cpp or compiler: {configured.stderr.strip()[:200]}")
    run("cmake", "--build", build)
    picture = scenes / "images" / "val" / "000000.jpg"
    for name in ("labels-fixed", "labels-any-onnx"):
        run(build / "segment_openvino", folders[name], picture, tmp_path / "labels.png")
        with Predictor(folders[name], threads=1) as predictor:
            expected = predictor(str(picture))
        labels = np.asarray(Image.open(tmp_path / "labels.png"))
        assert labels.shape == expected.shape
        assert (labels == expected).mean() > 0.999
