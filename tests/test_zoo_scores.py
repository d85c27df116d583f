"""The scores on the cards of the zoo's weights, through `ppvision eval`; PPVISION_DATA has the real
sets.

PPVISION_DATA=FOLDER python -m pytest tests/test_zoo_scores.py -m ""
"""

import json
import os
import re
from pathlib import Path

import pytest

from ppvision.data.convert import CONVERTERS
from ppvision.zoo.cards import ZOO_WEIGHTS
from tests.helpers.verbs import ppvision as run_verb

REAL = os.environ.get("PPVISION_DATA")
ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"

pytestmark = pytest.mark.all


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """`data` of a working directory, where configs look for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def source(name: str) -> Path:
    if not REAL:
        pytest.skip("PPVISION_DATA does not name a folder with the real sets")
    path = Path(REAL) / name
    if not path.exists():
        pytest.skip(f"PPVISION_DATA holds no {name}")
    return path


@pytest.fixture
def scored(data, capsys):
    """What `ppvision eval --json` says of weights of the zoo."""

    def scored(config: str, name: str) -> dict:
        capsys.readouterr()  # what was printed before
        run_verb("eval", "--config", CONFIGS / config, "--model_path", name, "--json")
        (result,) = json.loads(capsys.readouterr().out)["results"]
        return result["scores"]

    return scored


def on_card(name: str, what: str) -> float:
    """The number on a card: at 8 bits, as what is evaluated."""
    text = ZOO_WEIGHTS[name].short_score
    return float(re.fullmatch(rf"{what} (0\.\d+)", text)[1])


def test_tiny_imagenet(data, scored):
    (data / "tiny-imagenet-100").symlink_to(source("tiny-imagenet-100"))
    name = "pale_nano.tiny_imagenet_100"
    found = scored("classification/pale_nano_tiny_imagenet_100.yml", name)["top1"]
    assert found == pytest.approx(on_card(name, "top-1"), abs=0.005)


def test_blood_cells(data, scored):
    CONVERTERS["bccd"](source("bccd"), data / "bccd")
    name = "ppyoloe_pale_nano.blood_cells"
    found = scored("detection/ppyoloe_pale_nano_bccd.yml", name)["bbox_AP50"]
    assert found == pytest.approx(on_card(name, "AP50"), abs=0.005)


def test_nuclei(data, scored):
    CONVERTERS["dsb2018"](source("dsb2018"), data / "nuclei", border=2)
    name = "segformer_pale_nano_sdn.nuclei"
    found = scored("segmentation/segformer_pale_nano_sdn_nuclei.yml", name)
    assert found["BoundaryIoU"] == pytest.approx(on_card(name, "Boundary IoU"), abs=0.005)


def test_digit_scenes(data, scored):
    run_verb("data", "digit-scenes", "--output", data / "digit_scenes")
    name = "segformer_pale_nano.digit_scenes"
    found = scored("segmentation/segformer_pale_nano_digit_scenes.yml", name)["mIoU"]
    assert found == pytest.approx(on_card(name, "mIoU"), abs=0.005)
