"""What several tests share: a small data set and a small job on it."""

import gc
import importlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from ppvision.data.convert.digit_scenes import load_digits, write_digit_scenes
from ppvision.data.writing import write_picture
from tests.helpers.configs import classification_config, small_config
from tests.helpers.folders import check_unchanged

# Files that take longest, which begin first: with two processes that take one file after another,
# a long file at the end leaves one of them without work.
LONG_FILES = (
    *("detection", "openvino", "layered_tasks", "classification", "deploy_export"),
    *("sdn_in_paddleseg", "detection_widths", "hostile_files", "deploy_predictor", "segmentation"),
    *("doctor", "console", "prediction", "annotations", "export_faults", "stopping"),
    *("precision_verbs", "integer_export", "pale_form", "distillation", "zoo_predictor"),
    *("resnet", "engine", "predictor_threads", "fuzz_annotations", "face"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of `LONG_FILES` before the others; of each file in their own order."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish() -> None:
    """Let the garbage collector look at what tests make, and seldom: what the modules hold, it
    looked at all the time, which took a twentieth of the whole run."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


# Files whose exports get a graph for OpenVINO in the default run as well. It takes a third of an
# export's time; in the others it is made with `--all`, or for tests marked `openvino`.
OPENVINO_FILES = {"test_compat", "test_face", "test_integer_export", "test_integer_layers"}
OPENVINO_FILES |= {"test_integer_verbs", "test_precision_verbs", "test_openvino"}
OPENVINO_FILES |= {"test_openvino_networks", "test_predictor_threads", "test_integer_detection"}
OPENVINO_FILES |= {"test_isolated", "test_zoo_predictor", "test_segmentation", "test_resnet"}
OPENVINO_FILES |= {"test_integer_latency", "test_segformer_form", "test_integer_differences"}
# Files whose exports get a graph for the clients of PaddleSeg and PaddleDetection by default; it
# takes as long.
CLIENT_FILES = {"test_clients", "test_compat", "test_face"}
# Files in which Paddle's own kernels compute constant parts of a graph when it is opened, by
# default; it takes half of the time of opening. In the others they compute them at each run.
# (oneDNN gives other numbers without that pass where a convolution's weights are computed.)
FOLDING_FILES = {"test_compat", "test_deploy_export", "test_deploy_predictor", "test_face"}
FOLDING_FILES |= {"test_integer_export", "test_isolated", "test_openvino", "test_pale_form"}
FOLDING_FILES |= {"test_openvino_networks", "test_predictor_threads", "test_zoo_predictor"}
FOLDING_FILES |= {"test_segformer_form", "test_integer_differences"}
EXPORTERS = ("ppvision.deploy.write.export", "ppvision.deploy.write.detection_export")
CLIENT_WRITERS = ("write_client_program", "write_client_detector")


@pytest.fixture(autouse=True, scope="session")
def traced_quickly(request) -> Iterator[None]:
    """By --all Paddle traces as for users."""
    if request.config.option.markexpr == "":
        yield
        return
    from tests.helpers.tracing import quick_tracing

    with quick_tracing():
        yield


@pytest.fixture(autouse=True, scope="module")
def no_openvino(request) -> Iterator[None]:
    """Exports of the other files have no graph for OpenVINO, and none for clients."""
    name = request.module.__name__.rpartition(".")[2]
    every = request.config.option.markexpr == ""
    with pytest.MonkeyPatch.context() as patch:
        exporters = [importlib.import_module(exporter) for exporter in EXPORTERS]
        if not every and name not in OPENVINO_FILES:
            for exporter in exporters:
                patch.setattr(exporter, "has_openvino", lambda: False)
        if not every and name not in CLIENT_FILES:
            for exporter, writer in zip(exporters, CLIENT_WRITERS, strict=True):
                patch.setattr(exporter, writer, lambda *_: False)
        yield


@pytest.fixture(autouse=True, scope="module")
def quick_opening(request) -> Iterator[Callable]:
    """In the other files Paddle's own kernels do not compute constant parts when a graph opens."""
    from paddle import inference

    name = request.module.__name__.rpartition(".")[2]
    create = inference.create_predictor

    def create_quickly(config: inference.Config) -> inference.Predictor:
        if not config.onednn_enabled() and not config.openvino_engine_enabled():
            config.delete_pass("constant_folding_pass")
        return create(config)

    with pytest.MonkeyPatch.context() as patch:
        if request.config.option.markexpr != "" and name not in FOLDING_FILES:
            patch.setattr(inference, "create_predictor", create_quickly)
        yield create


@pytest.fixture(autouse=True)
def openvino_where_asked_for(request, no_openvino, quick_opening, monkeypatch):
    """Tests marked `openvino` in those files have it, and open graphs as users do."""
    if request.node.get_closest_marker("openvino"):
        from paddle import inference

        from ppvision.deploy.run.engines import has_openvino

        monkeypatch.setattr(inference, "create_predictor", quick_opening)
        for exporter in EXPORTERS:
            monkeypatch.setattr(importlib.import_module(exporter), "has_openvino", has_openvino)


@pytest.fixture(autouse=True, scope="session")
def openvino_here() -> Iterator[Callable]:
    """Exports compare OpenVINO in the tests' own process: to start another takes seconds each
    time. Tests of that process are marked `openvino_process`."""
    from ppvision.deploy.verify import running
    from ppvision.errors import EngineError

    def ask_here(folders, question, limit):
        packed = running.answer_parent(running._pack(question), [str(f) for f in folders])
        answer = running._unpack(packed)
        if "error" in answer:
            raise EngineError(str(answer["error"]))
        return answer

    ask = running._ask_child
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "_ask_child", ask_here)
        yield ask


@pytest.fixture(autouse=True)
def openvino_process(request, openvino_here, monkeypatch):
    """Tests marked so have it."""
    if request.node.get_closest_marker("openvino_process"):
        from ppvision.deploy.verify import running

        monkeypatch.setattr(running, "_ask_child", openvino_here)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Iterator[Path]:
    """Digit-scenes of 56 x 56: 12 for training, 2 for validation."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_digit_scenes(folder, count=12, val_count=2, size=56, seed=3)
    yield from check_unchanged(folder)


@pytest.fixture
def copied_scenes(scenes, tmp_path) -> Path:
    """`scenes` for one test, which may change them."""
    return Path(shutil.copytree(scenes, tmp_path / "scenes"))


@pytest.fixture(scope="session")
def converter() -> Callable:
    from tests.helpers.converter import Converter

    return Converter()


@pytest.fixture(autouse=True, scope="module")
def quick_converter(request, converter) -> Iterator[None]:
    """Conversions to ONNX are forked from one process, but by --all, and where that process is
    what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        whole = request.config.option.markexpr == ""
        if not whole and request.module.__name__ != "tests.test_export_faults":
            patch.setattr(
                importlib.import_module("ppvision.deploy.write.onnx"), "_run_child", converter
            )
        yield


@pytest.fixture
def plain_weights(monkeypatch) -> None:
    """Models begin with one number in place of random ones, which take most of the time that a
    large model takes to be built."""
    from paddle.nn import initializer
    from paddle.nn.initializer.constant import ConstantInitializer

    constant = ConstantInitializer(0.01)

    def fill(self, var, block=None):
        return constant.forward(var, block)

    for name in ("Normal", "TruncatedNormal", "Uniform", "XavierNormal", "KaimingNormal"):
        # The class that holds the method, of which the public one is a subclass.
        kind = getattr(initializer, name).__mro__[1]
        monkeypatch.setattr(kind, "forward", fill)


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
    yield from check_unchanged(folder)


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
