"""`examples/cpp`, compiled: its preparation of pictures against `Transforms`, and its program for
Paddle Inference with a stand-in for that library. It needs a compiler, OpenCV and yaml-cpp;
test_openvino_package.py has the program for OpenVINO."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ppvision.deploy.run.transforms import Transforms
from tests.helpers.configs import ROOT

EXAMPLE = ROOT / "examples" / "cpp"
PROGRAM = r"""
#include <fstream>
#include <iostream>
#include "picture.hpp"
int main(int, char** words) {
  const YAML::Node manifest = YAML::LoadFile(words[1]);
  const cv::Mat x = transform(read_picture(words[2]), manifest["transforms"]);
  std::vector<float> planes(3 * x.total());
  write_planes(x, planes.data());
  std::ofstream(words[3], std::ios::binary)
      .write(reinterpret_cast<char*>(planes.data()), planes.size() * sizeof(float));
}
"""
MODULES = ("core", "imgproc", "imgcodecs")
RESIZE = {"type": "Resize", "target_size": [24, 16]}
STEPS = {
    "defaults": [RESIZE, {"type": "Normalize"}],
    "mean alone": [{"type": "Normalize", "mean": [0.1, 0.2, 0.3]}],
    "both": [{"type": "Normalize", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}],
}


# As much of Paddle's header as the example uses. Every pixel is of class 3; oneDNN says 4.
PADDLE = r"""
#include <memory>
#include <string>
#include <vector>
namespace paddle_infer {
struct Config {
  int label = 3;
  void SetModel(const std::string&, const std::string&) {}
  void EnableMKLDNN() { label = 4; }
};
struct Tensor {
  std::vector<int>* sizes;
  int label;
  void Reshape(const std::vector<int>& given) { *sizes = {given[0], given[2], given[3]}; }
  void CopyFromCpu(const float*) {}
  std::vector<int> shape() { return *sizes; }
  void CopyToCpu(int* classes) {
    for (int i = 0; i < sizes->at(1) * sizes->at(2); ++i) classes[i] = label;
  }
};
struct Engine {
  std::vector<int> sizes;
  int label;
  std::vector<std::string> GetInputNames() { return {"x"}; }
  std::vector<std::string> GetOutputNames() { return {"y"}; }
  std::unique_ptr<Tensor> GetInputHandle(const std::string&) { return GetOutputHandle(""); }
  std::unique_ptr<Tensor> GetOutputHandle(const std::string&) {
    return std::unique_ptr<Tensor>(new Tensor{&sizes, label});
  }
  bool Run() { return true; }
};
inline std::unique_ptr<Engine> CreatePredictor(const Config& config) {
  return std::unique_ptr<Engine>(new Engine{{}, config.label});
}
}
"""


def build(folder: Path, source: Path) -> Path:
    """A program of a source and what lies beside it in `folder`."""
    made = folder / "program"
    command = ["g++", "-std=c++17", "-I/usr/include/opencv4", f"-I{EXAMPLE}", f"-I{folder}"]
    command += [str(source), "-o", str(made), "-lyaml-cpp"]
    command += [f"-lopencv_{module}" for module in MODULES]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except FileNotFoundError:
        pytest.skip("no g++")
    if re.search(r"(opencv2|yaml-cpp)\S* No such file|cannot find -l", done.stderr):
        pytest.skip(f"no OpenCV or yaml-cpp: {done.stderr.strip()[:200]}")
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "main.cpp").write_text(PROGRAM)
    return build(folder, folder / "main.cpp")


@pytest.fixture(scope="module")
def segment_paddle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paddle")
    (folder / "paddle_inference_api.h").write_text(PADDLE)
    return build(folder, EXAMPLE / "segment_paddle.cpp")


@pytest.mark.parametrize("steps", STEPS.values(), ids=list(STEPS))
def test_a_picture_is_prepared_as_by_python(program, tmp_path, steps):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    (tmp_path / "deploy.yaml").write_text(yaml.safe_dump({"transforms": steps}))
    names = ("deploy.yaml", "picture.png", "planes")
    subprocess.run([program, *(tmp_path / name for name in names)], check=True, timeout=60)
    expected = Transforms(steps)(pixels)[0]
    found = np.fromfile(tmp_path / "planes", np.float32).reshape(expected.shape)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(("onednn", "label"), [(None, 3), (False, 3), (True, 4)], ids=str)
def test_onednn_is_taken_where_the_export_says_so(segment_paddle, tmp_path, onednn, label):
    Image.fromarray(np.zeros([20, 30, 3], np.uint8)).save(tmp_path / "picture.png")
    said = {"format": "paddle", "task": "segmentation", "output_op": "argmax", "onednn": onednn}
    said |= {"program": "model.json", "weights": "model.pdiparams", "transforms": [RESIZE]}
    (tmp_path / "deploy.yaml").write_text(yaml.safe_dump(said))
    files = tmp_path / "picture.png", tmp_path / "labels.png"
    subprocess.run([segment_paddle, tmp_path, *files], check=True, timeout=60)
    np.testing.assert_array_equal(np.asarray(Image.open(files[1])), np.full([20, 30], label))
