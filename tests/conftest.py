"""What several tests share: a small data set and a small job on it."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from ppvision.data.convert.digit_scenes import load_digits, write_digit_scenes
from ppvision.data.writing import write_picture
from tests.helpers.configs import classification_config, small_config

# Files that take longest, which begin first: with two processes that take one file after another,
# a long file at the end leaves one of them without work.
LONG_FILES = (
    *("layered_tasks", "detection", "stopping", "segmentation", "classification", "deploy_export"),
    *("detection_widths", "sdn_in_paddleseg", "export_faults", "openvino", "same_as_paddledet"),
    *("prediction", "zoo_predictor", "same_as_paddleseg", "engine", "console", "resnet"),
    *("efficientnet_lite", "dashboard", "pale_form", "doctor", "predictor_threads", "turns"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of `LONG_FILES` before the others; of each file in their own order."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


# Files whose exports get a graph for OpenVINO in the default run as well. It takes a third of an
# export's time; in the others it is made with `--all`, or for tests marked `openvino`.
OPENVINO_FILES = {"test_compat", "test_face", "test_integer_export", "test_integer_layers"}
OPENVINO_FILES |= {"test_integer_verbs"}
OPENVINO_FILES |= {"test_openvino", "test_openvino_networks", "test_predictor_threads"}
OPENVINO_FILES |= {"test_isolated", "test_zoo_predictor", "test_segmentation", "test_resnet"}
EXPORTERS = ("ppvision.deploy.write.export", "ppvision.deploy.write.detection_export")


@pytest.fixture(autouse=True, scope="module")
def no_openvino(request) -> Iterator[None]:
    """Exports of the other files have no graph for OpenVINO."""
    name = request.module.__name__.rpartition(".")[2]
    wanted = request.config.option.markexpr == "" or name in OPENVINO_FILES
    with pytest.MonkeyPatch.context() as patch:
        if not wanted:
            for exporter in EXPORTERS:
                patch.setattr(importlib.import_module(exporter), "has_openvino", lambda: False)
        yield


@pytest.fixture(autouse=True)
def openvino_where_asked_for(request, no_openvino, monkeypatch):
    """Tests marked `openvino` in those files have it."""
    if request.node.get_closest_marker("openvino"):
        from ppvision.deploy.run.engines import has_openvino

        for exporter in EXPORTERS:
            monkeypatch.setattr(importlib.import_module(exporter), "has_openvino", has_openvino)


@pytest.fixture(autouse=True)
def openvino_here(request, monkeypatch):
    """Exports compare OpenVINO in the test's own process: to start another takes seconds each
    time. Tests of that process are marked `openvino_process`."""
    if request.node.get_closest_marker("openvino_process"):
        return
    for name in ("ppvision.deploy.verify.comparison", "ppvision.deploy.write.detection_export"):
        if name in sys.modules:  # not loaded for tests without exports
            monkeypatch.setattr(sys.modules[name], "run_in_openvino", _run_in_openvino)


def _run_in_openvino(folders, inputs):
    from ppvision.deploy.verify.running import run_graphs

    return run_graphs(folders, "paddle", inputs, "openvino")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Iterator[Path]:
    """Digit-scenes of 56 x 56: 12 for training, 4 for validation."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_digit_scenes(folder, count=12, val_count=4, size=56, seed=3)
    yield from unchanged(folder)


def unchanged(folder: Path) -> Iterator[Path]:
    """A folder of the whole session; at its end nothing may have changed."""
    before = _list_files(folder)
    yield folder
    after = _list_files(folder)
    changed = sorted(name for name, _ in before.items() ^ after.items())
    assert not changed, f"a test changed {changed}, which others read: expected it to take a copy"


def _list_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of each file, by name."""
    files = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in files.items()}


@pytest.fixture
def copied_scenes(scenes, tmp_path) -> Path:
    """`scenes` for one test, which may change them."""
    return Path(shutil.copytree(scenes, tmp_path / "scenes"))


@pytest.fixture
def config_file(tmp_path, scenes):
    """Write a config: `config_file(change)`, where `change` edits the dictionary in place."""

    def write(change=lambda config: None) -> Path:
        config = small_config(scenes)
        change(config)
        path = tmp_path / "job.yml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    return write


@pytest.fixture(scope="session")
def crops(tmp_path_factory) -> Iterator[Path]:
    """Class folders of digits 0 to 2: 12 pictures each for training, 7 for validation, 28 x 28."""
    folder = tmp_path_factory.mktemp("data") / "crops"
    for split, count in (("train", 12), ("val", 7)):
        tiles, classes = load_digits(split)
        for digit in range(3):
            target = folder / split / f"digit {digit}"
            target.mkdir(parents=True)
            for number, tile in enumerate(tiles[classes == digit][:count]):
                write_picture(target / f"{number}.png", np.repeat(tile[..., None], 3, axis=2))
    yield from unchanged(folder)


@pytest.fixture
def classification_file(tmp_path, crops):
    """`config_file` for classification."""

    def write(change=lambda config: None) -> Path:
        config = classification_config(crops)
        change(config)
        path = tmp_path / "classes.yml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    return write
