"""What a type checker says of a user's code (`py.typed`), with Paddle's own types read as well."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).resolve().parents[1]

# A line with `# wrong` is an error, every other one is right.
USER = """
import numpy as np
import ppvision
from ppvision.deploy import Classification, Detections, Predictor

height, width = ppvision.Predictor("folder")("a.png").shape
names: list[str] = ["a.png", "b.png"]
ppvision.Predictor("folder")(names)[0].shape
ppvision.Predictor("folder").predikt("a.png")  # wrong

detector: Predictor[Detections] = Predictor("folder")
boxes: np.ndarray = detector("a.png").boxes
several: list[Detections] = detector(names)
one: Detections = detector(names)  # wrong
detector("a.png").bokses  # wrong
classifier: Predictor[Classification] = Predictor("folder", device="cpu")
share: np.ndarray | None = classifier(np.zeros((2, 2, 3), np.uint8)).probabilities
classifier(3)  # wrong

net = ppvision.create_model("pale_nano", num_classes=0)
net.reset_classifier(3)
net.reset_classifer(3)  # wrong
net.eval()
channels: list[int] = net.feat_channels
parameters = net.parameters()
ppvision.load_weights(net, "weights.safetensors")
ppvision.export_model(net, "folder", input_shape=[1, 3, 32, 32])
ppvision.export_model(net, "folder", input_shap=[1, 3, 32, 32])  # wrong
"""


@pytest.mark.all  # a minute: mypy reads all of Paddle
def test_a_users_code(tmp_path):
    (tmp_path / "user.py").write_text(USER, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "user.py"]
    run = subprocess.run(
        [*command, "--config-file", "/dev/null", "--cache-dir", str(tmp_path / "cache")],
        capture_output=True, text=True, check=False, timeout=900, cwd=tmp_path,
        env={"MYPYPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    found = {int(line) for line in re.findall(r"^user\.py:(\d+): error", run.stdout, re.MULTILINE)}
    lines = enumerate(USER.splitlines(), 1)
    assert found == {number for number, line in lines if line.endswith("# wrong")}, run.stdout
    assert run.returncode == 1, run.stderr
