"""`examples/cpp/picture.hpp`, compiled, against `Transforms`. It needs a compiler, OpenCV and
yaml-cpp; test_openvino_package.py has the whole example."""

import subprocess

import numpy as np
import pytest
import yaml
from PIL import Image

from ppvision.deploy.run.transforms import Transforms
from tests.helpers.configs import ROOT

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


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "main.cpp").write_text(PROGRAM)
    command = ["g++", "-std=c++17", "-I/usr/include/opencv4", f"-I{ROOT / 'examples' / 'cpp'}"]
    command += [str(folder / "main.cpp"), "-o", str(folder / "main"), "-lyaml-cpp"]
    command += [f"-lopencv_{module}" for module in MODULES]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except FileNotFoundError:
        pytest.skip("no g++")
    if "fatal error" in done.stderr or "cannot find -l" in done.stderr:
        pytest.skip(f"no OpenCV or yaml-cpp: {done.stderr.strip()[:200]}")
    assert done.returncode == 0, done.stderr
    return folder / "main"


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
