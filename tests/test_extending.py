"""docs/extending.md: its files are written into an empty folder, its commands run there. And what
it shows of `register_transform`."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.messages import raises_naming

pytest.importorskip("paddleseg", reason="pip install --no-deps paddleseg==2.8.0")
pytest.importorskip("ppdet", reason="pip install --no-deps paddledet==2.6.0")
pytest.importorskip("paddleslim", reason="pip install --no-deps paddleslim==2.6.0")

from paddleseg.cvlibs import manager
from ppdet.core import workspace

import ppvision
import ppvision.plugins.paddledet as detection
import ppvision.plugins.paddleseg as segmentation
from benchmark.sdn_boundary import trained_size
from ppvision.cli import run
from ppvision.data.check.coco import check_coco
from ppvision.data.pictures import read_picture
from ppvision.data.writing import write_picture
from ppvision.deploy import Predictor, register_transform
from ppvision.deploy.run import transforms as deployed
from ppvision.deploy.run.manifest import read_manifest
from ppvision.errors import InputError, InputTypeError, ManifestError
from ppvision.tasks import open_job
from ppvision.tasks.classification.config import _check_model, build_transform
from ppvision.zoo import registry
from tests.helpers.configs import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
MOST_LINES = 30  # of code in a block


@pytest.fixture
def forget():
    """Take what a test registers out of all registers again."""
    transforms, models, modules = set(deployed.KNOWN), set(registry._MODELS), set(sys.modules)
    yield
    for name in set(deployed.KNOWN) - transforms:
        deployed.KNOWN.pop(name)
        deployed._registered.pop(name)
        manager.TRANSFORMS.components_dict.pop(name, None)
    for name in set(registry._MODELS) - models:
        registry._MODELS.pop(name)
        manager.BACKBONES.components_dict.pop(name, None)
        workspace.global_config.pop(name, None)
        for module in (segmentation, detection):
            vars(module).pop(name, None)
    for name in set(sys.modules) - modules:
        if name.startswith(("my_", "test_my_")):
            sys.modules.pop(name)


# -- the page --------------------------------------------------------------------------------------


def write_cells(folder: Path) -> None:
    """The source of the page's converter: dark pictures of 64 x 48 with two bright cells each."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in ("images", "objects"):
            (folder / split / name).mkdir(parents=True)
        for number in range(count):
            objects = np.zeros((48, 64), np.uint8)
            objects[4 + number : 20, 6:24], objects[24:40, 30 + number : 52] = 1, 2
            noise = rng.integers(0, 60, (48, 64, 3))
            picture = (noise + 90 * (objects[..., None] > 0)).astype(np.uint8)
            write_picture(folder / split / "images" / f"{number}.png", picture)
            write_picture(folder / split / "objects" / f"{number}.png", objects)


def write_files(folder: Path) -> list[tuple[str, str]]:
    """Write the blocks that begin with a file's name; returns the others, in their order."""
    others = []
    for kind, text in BLOCKS:
        name = re.match(r"# (\w+\.\w+)\n", text)
        if name:
            (folder / name[1]).write_text(text, encoding="utf-8")
        else:
            others.append((kind, text))
    return others


def run_line(line: str) -> None:
    program, flag, what, *arguments = shlex.split(line, comments=True)
    assert program == "python"
    if flag == "-c":
        exec(what, {})
    else:
        assert (flag, what) == ("-m", "ppvision")
        assert run(arguments) == 0, line


def test_the_page_runs(tmp_path, monkeypatch, capsys, forget):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PPVISION_CACHE", str(tmp_path / "cache"))
    write_cells(tmp_path / "cells")
    found: dict[str, object] = {}
    for kind, text in write_files(tmp_path):
        if kind == "bash":
            for line in text.replace("\\\n", "").splitlines():
                run_line(line)
        if kind == "python":
            exec(compile(text, "docs/extending.md", "exec"), found)
    for part, count in (("train", 4), ("val", 2)):
        cells = tmp_path / "data" / "cells"
        annotations = cells / "annotations" / f"instances_{part}.json"
        found_objects = check_coco(part, annotations, cells / "images", 1, masks=True)
        assert (found_objects.counts, found_objects.names) == ([2 * count], ["cell"])
    assert "background" in capsys.readouterr().out  # of `check`: the pixels of each class
    assert found["model"].bits == 5
    assert read_manifest(tmp_path / "inference" / "mine-bits" / "w5").bits == 5
    assert found["labels"].shape == (48, 64)

    import test_my_net

    test_my_net.test_my_net()
    _check_model({"type": "my_net", "num_classes": 5})  # of a classification config
    card = ppvision.model_card("my_net")
    assert trained_size(ppvision.create_model("my_net")) == card.parameters

    # The export does with a picture what validation does.
    job = open_job(tmp_path / "mine.yml")
    model = job.load(tmp_path / "output" / "mine" / "best_model" / "model.pdparams", None)
    picture = read_picture(tmp_path / "data" / "cells" / "images" / "val" / "0.png")
    exported = tmp_path / "inference" / "mine"
    expected = job.predict_image(model, picture)
    np.testing.assert_array_equal(Predictor(exported)(picture), expected)
    specs = read_manifest(exported).transforms
    assert specs == [{"type": "Gamma", "gamma": 0.7}, {"type": "Normalize"}]
    forms = deployed.Transforms(specs), deployed.Transforms([{"type": "Normalize"}])
    with_gamma, without = (form(picture)[0] for form in forms)
    assert with_gamma.mean() > without.mean() + 0.1

    deployed.KNOWN.pop("Gamma")
    with raises_naming(ManifestError, "Gamma", "import"):
        Predictor(exported)
    deployed._registered.pop("Gamma")
    manager.TRANSFORMS.components_dict.pop("Gamma")


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_blocks_are_short(number):
    lines = [line for line in BLOCKS[number][1].splitlines() if line.strip()]
    assert len(lines) <= MOST_LINES


# -- register_transform ----------------------------------------------------------------------------


def register_halving() -> type:
    class Halving:
        def __init__(self, times: int = 1) -> None:
            self.factor = 0.5**times

        def __call__(self, image: np.ndarray) -> np.ndarray:
            return image.astype(np.float64) * self.factor

    return register_transform(Halving)


def test_a_transform_is_the_same_everywhere(forget):
    register_halving()
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.float32)
    spec = {"type": "Halving", "times": 2}
    x, steps = deployed.Transforms([spec])(picture)
    assert (x.dtype, steps) == (np.float32, [])
    np.testing.assert_array_equal(x, (picture / 4).transpose(2, 0, 1))
    of_paddleseg = manager.TRANSFORMS["Halving"](times=2)
    label = np.ones((5, 7), np.uint8)
    data = of_paddleseg({"img": picture, "label": label, "gt_fields": ["label"]})
    np.testing.assert_array_equal(data["img"], picture / 4)
    assert data["label"] is label
    np.testing.assert_array_equal(build_transform(spec)(picture), picture / 4)
    with raises_naming(InputError, "Halving", "times", "time"):
        deployed.Transforms([{"type": "Halving", "time": 2}])


def test_registering_twice(forget):
    register_halving()
    register_halving()  # as when a module is reloaded
    with raises_naming(InputError, "'Resize'", "ppvision.deploy"):
        register_transform(type("Resize", (), {}))
    with raises_naming(InputTypeError, "register_transform:", "class,", "<built-in"):
        register_transform(len)


def test_a_name_of_paddleseg(forget):
    before = manager.TRANSFORMS["RandomDistort"]
    with raises_naming(InputError, "PaddleSeg", "'RandomDistort'"):
        register_transform(type("RandomDistort", (), {}))
    assert manager.TRANSFORMS["RandomDistort"] is before
    assert "RandomDistort" not in deployed.KNOWN


@pytest.mark.parametrize(
    ("give", "got"), [(lambda x: x[:2], "[2, 7, 3]"), (lambda x: None, "NoneType")]
)
def test_a_transform_keeps_the_size(forget, give, got):
    register_transform(type("Odd", (), {"__call__": lambda self, image: give(image)}))
    transforms = deployed.Transforms([{"type": "Odd"}])
    with raises_naming(InputError, "Odd", "[5,", "7,", "3]", *got.split()):
        transforms(np.zeros((5, 7, 3), np.uint8))
