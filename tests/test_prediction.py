"""`predict` under faults: one picture never costs the others, and the report is always complete."""

import errno
import gc
import json
import logging
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import paddle
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

from ppvision.cli import run
from ppvision.data import pictures as reader
from ppvision.deploy import Classification, Predictor, export_model
from ppvision.deploy.run.detections import collect_detections
from ppvision.errors import EngineError, FolderInUseError, InputError, StorageError
from ppvision.files import lock_folder
from ppvision.tasks import open_job, prediction
from ppvision.tasks.prediction import classify_to_folder, detect_to_folder, predict_to_folder
from tests.helpers.configs import ROOT
from tests.helpers.messages import raises_naming

# What PaddleSeg's and PaddleDetection's imports call.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:\s*Non compatible API"),
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
]

HALF = {"type": "Normalize", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
KINDS = ("overlay", "labels")


def two_classes(path: Path, image: np.ndarray) -> np.ndarray:
    """Class 1 where red is bright."""
    return (image[..., 0] > 127).astype(np.uint8)


def write_pictures(folder: Path, names: list[str], size: tuple[int, int] = (12, 16)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, format="PNG")
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    return write_pictures(tmp_path / "pictures", [f"{n}.png" for n in range(6)])


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A convolution of 2 classes, of any size."""
    paddle.seed(0)
    model = paddle.nn.Conv2D(3, 2, 3, padding=1)
    shape = [None, 3, None, None]
    return export_model(
        model, tmp_path_factory.mktemp("exported") / "m", input_shape=shape, transforms=[HALF]
    )


def read_report(folder: Path) -> dict:
    return json.loads((folder / "predictions.json").read_text(encoding="ascii"))


def check_consistent(out: Path, kinds: tuple[str, ...] = KINDS) -> dict[str, object]:
    """Every named result is complete, every complete result is named, nothing else is there.

    Returns:
        The report.
    """
    report = read_report(out)
    named = {Path(path).stem for path, entry in report.items() if "error" not in entry}
    for kind in kinds:
        found = (
            {path.stem for path in (out / kind).glob("*.png")} if (out / kind).exists() else set()
        )
        assert found == named
        for name in named:
            Image.open(out / kind / f"{name}.png").load()
    others = [p for p in out.rglob("*") if p.is_file() and p.suffix != ".png"]
    assert others == [out / "predictions.json"]
    return report


# -- one decode ------------------------------------------------------------------------------------


class _Seen(paddle.nn.Layer):
    """Keeps its input; gives logits of two classes, or boxes."""

    def forward(self, x):
        self.seen = x
        if isinstance(x, dict):
            return {"bbox": paddle.zeros([0, 6]), "bbox_num": paddle.zeros([1], "int32")}
        return [paddle.concat([x[:, :1], -x[:, :1]], axis=1)]


@pytest.fixture(params=["png", "jpg", "grey png", "alpha png"])
def one_picture(request, tmp_path) -> Path:
    pixels = np.random.default_rng(3).integers(0, 255, (37, 53, 4), dtype=np.uint8)
    channels = {"png": pixels[..., :3], "jpg": pixels[..., :3]}
    channels |= {"grey png": pixels[..., 0], "alpha png": pixels}
    path = tmp_path / f"x.{request.param.split()[-1]}"
    Image.fromarray(channels[request.param]).save(path)
    return path


def test_pixels_are_transformed_as_paddleseg_does_from_the_path(config_file, one_picture):
    from paddleseg.transforms import Compose

    steps = [{"type": "Resize", "target_size": [40, 24]}, HALF]
    job = open_job(config_file(lambda config: config["val_dataset"].update(transforms=steps)))
    expected = Compose(job.builder.val_transforms)({"img": str(one_picture)})["img"]
    models = _Seen(), _Seen()
    results = [
        job.predict_image(model, picture)
        for model, picture in zip(
            models, (one_picture, prediction.read_picture(one_picture)), strict=True
        )
    ]
    for model in models:
        np.testing.assert_array_equal(model.seen.numpy()[0], expected)
    np.testing.assert_array_equal(*results)
    assert results[0].shape == (37, 53)


def test_grey_pixels_are_transformed_as_paddleseg_does(config_file, tmp_path):
    from paddleseg.transforms import Compose

    def change(config):
        grey = {"type": "Normalize", "mean": [0.5], "std": [0.5]}
        config["val_dataset"].update(img_channels=1, transforms=[grey])

    Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20)).save(tmp_path / "x.png")
    job, model = open_job(config_file(change)), _Seen()
    job.predict_image(model, prediction.read_picture(tmp_path / "x.png"))
    compose = Compose(job.builder.val_transforms, img_channels=1)
    np.testing.assert_array_equal(
        model.seen.numpy()[0], compose({"img": str(tmp_path / "x.png")})["img"]
    )


def test_pixels_are_transformed_as_paddledetection_does_from_the_path(
    scenes, one_picture, tmp_path
):
    pytest.importorskip("ppdet", reason="pip install --no-deps paddledet==2.6.0")
    from ppdet.data.reader import BatchCompose, Compose

    from tests.helpers.small_detectors import small_detector, write_detector

    job = open_job(write_detector(tmp_path / "fcos.yml", small_detector(scenes, "FCOS")))
    reader = job.content["TestReader"]
    assert {"Decode": {}} in reader["sample_transforms"]
    sample = {"im_id": np.array([0]), "curr_iter": 0, "im_file": str(one_picture)}
    batch = reader.get("batch_transforms", [])
    expected = BatchCompose(batch)([Compose(reader["sample_transforms"])(sample)])
    for picture in (one_picture, prediction.read_picture(one_picture)):
        model = _Seen()
        assert len(job.predict_image(model, picture)) == 0
        assert set(model.seen) == {"image", "im_shape", "scale_factor"}
        for name, value in model.seen.items():
            np.testing.assert_array_equal(value.numpy(), np.asarray(expected[name]))


def test_pixels_that_begin_like_a_file_are_pixels(scenes, tmp_path):
    """PaddleDetection's Decode would look for a BMP in pixels that begin with its two letters."""
    pytest.importorskip("ppdet", reason="pip install --no-deps paddledet==2.6.0")
    from tests.helpers.small_detectors import SIDE, small_detector, write_detector

    inner = cv2.imencode(".bmp", np.full((4, 4, 3), 7, np.uint8))[1].ravel()
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image.reshape(-1)[: inner.size] = inner
    job = open_job(write_detector(tmp_path / "fcos.yml", small_detector(scenes, "FCOS")))
    model = _Seen()
    job.predict_image(model, image)
    scaled = image.transpose(2, 0, 1) / 255.0
    np.testing.assert_allclose(model.seen["image"].numpy()[0], (scaled - 0.5) / 0.5, atol=1e-6)


def _count_decodes(monkeypatch) -> list[str]:
    """The name of every picture that is decoded; all readers decode by one function."""
    decoded: list[str] = []
    real = reader._decode

    def decode(content: bytes, flags: int, name: str, header: object) -> np.ndarray:
        decoded.append(name)
        return real(content, flags, name, header)

    monkeypatch.setattr(reader, "_decode", decode)
    for decoder in ("imread", "imdecode"):
        monkeypatch.setattr(cv2, decoder, _refuse_others(getattr(cv2, decoder)))
    return decoded


def _refuse_others(decoder: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def decode(*arguments: object) -> np.ndarray:
        assert sys._getframe(1).f_code.co_filename == reader.__file__
        return decoder(*arguments)

    return decode


def test_an_exported_model_decodes_each_picture_once(exported, pictures, tmp_path, monkeypatch):
    decoded = _count_decodes(monkeypatch)
    where = ("--image_path", str(pictures), "--save_dir", str(tmp_path / "out"))
    assert run(["predict", "--model_dir", str(exported), *where]) == 0
    assert sorted(decoded) == sorted(map(str, pictures.iterdir()))
    assert len(check_consistent(tmp_path / "out")) == 6


@pytest.mark.parametrize("task", ["segmentation", "classification", "detection"])
def test_an_eager_model_decodes_each_picture_once(
    task, pictures, tmp_path, monkeypatch, config_file, classification_file, scenes
):
    if task == "segmentation":
        path = config_file()
    elif task == "classification":
        path = classification_file()
    else:
        pytest.importorskip("ppdet", reason="pip install --no-deps paddledet==2.6.0")
        from tests.helpers.small_detectors import small_detector, write_detector

        path = write_detector(tmp_path / "fcos.yml", small_detector(scenes, "FCOS"))
    weights = tmp_path / "weights.pdparams"
    paddle.save(open_job(path).float_model.state_dict(), str(weights))
    example = open_job(path).example  # a classifier's reads a picture of the set
    assert example is not None
    decoded = _count_decodes(monkeypatch)
    arguments = ("predict", "-c", path, "--model_path", weights)
    where = ("--image_path", pictures, "--save_dir", tmp_path / "out")
    assert run([str(a) for a in (*arguments, *where)]) == 0
    assert sorted(decoded) == sorted(map(str, pictures.iterdir()))
    kinds = KINDS if task == "segmentation" else ("overlay",)
    assert len(check_consistent(tmp_path / "out", kinds)) == 6


# -- failures --------------------------------------------------------------------------------------


def test_a_picture_that_fails_is_an_entry_and_a_line(pictures, tmp_path):
    (pictures / "2.png").write_bytes(b"no picture")
    (pictures / "4.png").write_bytes((pictures / "4.png").read_bytes()[:200])
    failures = predict_to_folder(two_classes, pictures, tmp_path / "out", ["dark", "bright"])
    report = check_consistent(tmp_path / "out")
    assert list(report) == [str(pictures / f"{n}.png") for n in range(6)]
    failed = {path: entry for path, entry in report.items() if "error" in entry}
    assert list(failed) == [str(pictures / "2.png"), str(pictures / "4.png")]
    assert [entry["error"] for entry in failed.values()] == failures
    for path, line in zip(failed, failures, strict=True):
        assert path in line
    assert set(report[str(pictures / "0.png")]) == {"dark", "bright"}


@pytest.mark.parametrize(
    "error", [RuntimeError("k"), MemoryError(), IndexError("k"), Exception("k")]
)
@pytest.mark.parametrize("failing", [0, 3, 5])
def test_an_engine_that_fails_on_one_picture(error, failing, pictures, tmp_path):
    def predict(path, image):
        if path.name == f"{failing}.png":
            raise error
        return two_classes(path, image)

    (line,) = predict_to_folder(predict, pictures, tmp_path / "out", [])
    assert f"{failing}.png" in line
    assert "memory" in line if isinstance(error, MemoryError) else "k" in line
    report = check_consistent(tmp_path / "out")
    assert len(report) == 6
    assert report[str(pictures / f"{failing}.png")] == {"error": line}


def test_an_engine_that_always_fails_is_an_error_after_the_report(pictures, tmp_path):
    def predict(path, image):
        raise RuntimeError(f"the engine is gone\n{'x' * 10_000}")

    with raises_naming(EngineError, "none", "6", "predictions.json", "RuntimeError:") as caught:
        predict_to_folder(predict, pictures, tmp_path / "out", [])
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)
    report = check_consistent(tmp_path / "out")
    assert len(report) == 6
    assert all("the engine is gone" in entry["error"] for entry in report.values())


def test_a_fault_of_ours_keeps_its_traceback(pictures, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ppvision"), "propagate", True)

    def faulty_function(path, image):
        return image.no_such_thing

    with pytest.raises(EngineError) as caught:
        predict_to_folder(faulty_function, pictures, tmp_path / "out", [])
    assert isinstance(caught.value.__cause__, AttributeError)
    (record,) = {record for record in caplog.records if record.exc_info}  # two handlers keep it
    assert record.exc_info[0] is AttributeError
    assert "in faulty_function" in caplog.text
    assert len(check_consistent(tmp_path / "out")) == 6


def test_pictures_that_all_fail_are_no_fault_of_the_engine(pictures, tmp_path):
    for path in pictures.iterdir():
        path.write_bytes(b"no picture")
    assert len(predict_to_folder(two_classes, pictures, tmp_path / "out", [])) == 6
    assert len(check_consistent(tmp_path / "out")) == 6


def test_every_task_names_failures_alike(pictures, tmp_path):
    (pictures / "2.png").write_bytes(b"no picture")
    boxes = np.array([[1, 0.9, 1, 2, 8, 9]], np.float32)
    masks = np.ones((1, 12, 16), np.uint8)
    classify_to_folder(
        lambda *_: Classification(1, "b", np.array([0.2, 0.8])),
        pictures,
        tmp_path / "c",
        ["a", "b"],
    )
    detect_to_folder(lambda *_: collect_detections(boxes, masks, []), pictures, tmp_path / "d")
    reports = {kind: check_consistent(tmp_path / kind, ("overlay",)) for kind in "cd"}
    for report in reports.values():
        assert [Path(path).name for path, entry in report.items() if "error" in entry] == ["2.png"]
        assert list(report[str(pictures / "2.png")]) == ["error"]
    good = str(pictures / "0.png")
    top5 = {"b": 0.8, "a": 0.2}
    expected = {"class": "b", "class_id": 1, "probability": 0.8, "top5": top5}
    assert reports["c"][good] == expected
    (entry,) = reports["d"][good]
    assert (entry["class_id"], entry["box"]) == (1, [1, 2, 8, 9])
    mask = mask_utils.decode({**entry["mask"], "counts": entry["mask"]["counts"].encode()})
    assert mask.all()


def test_scores_that_are_no_numbers(pictures, tmp_path):
    """The report stays JSON."""

    def classify(path, image):
        share = np.nan if path.name == "3.png" else 0.25
        return Classification(0, None, np.array([1 - share, share]))

    (line,) = classify_to_folder(classify, pictures, tmp_path / "out", [])
    assert "3.png" in line
    assert "finite" in line
    report = check_consistent(tmp_path / "out", ("overlay",))
    assert [Path(p).name for p, entry in report.items() if "error" in entry] == ["3.png"]


def test_the_report_is_what_json_writes(pictures, tmp_path):
    predict_to_folder(two_classes, pictures, tmp_path / "out", [])
    text = (tmp_path / "out" / "predictions.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2) + "\n"


def test_ctrl_c_in_python_leaves_a_complete_report(pictures, tmp_path):
    def predict(path, image):
        if path.name == "3.png":
            raise KeyboardInterrupt
        return two_classes(path, image)

    with pytest.raises(KeyboardInterrupt):
        predict_to_folder(predict, pictures, tmp_path / "out", [])
    report = check_consistent(tmp_path / "out")
    assert [Path(path).name for path in report] == ["0.png", "1.png", "2.png"]


def test_a_pipe_or_a_folder_called_like_a_picture(pictures, tmp_path):
    os.mkfifo(pictures / "pipe.png")
    (pictures / "folder.png").mkdir()
    lines = predict_to_folder(two_classes, pictures, tmp_path / "out", [])
    names = [re.search(r"(\w+\.png)", line)[1] for line in lines]
    assert set(names) <= {"pipe.png", "folder.png"}
    assert len([e for e in check_consistent(tmp_path / "out").values() if "error" not in e]) == 6


# -- disks -----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(bytes)`: a file system of that size."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.getuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk, tmp_path):
    """Noise of 40 x 40, about 5 kB a picture in `overlay/` and some in `labels/`."""
    source = write_pictures(tmp_path / "many", [f"{n:03d}.png" for n in range(60)], (40, 40))
    out = small_disk(200 << 10) / "out"
    with raises_naming(StorageError, "predict:", *os.strerror(errno.ENOSPC).split()) as caught:
        predict_to_folder(two_classes, source, out, [])
    report = check_consistent(out)
    done = [path for path, entry in report.items() if "error" not in entry]
    assert 5 < len(done) < 50
    assert f"{len(done)} of 60" in str(caught.value)
    assert len(report) < 60  # the rest was not tried


def test_a_disk_full_of_small_files_names_all_of_them(small_disk, tmp_path):
    """Results that each fit into the last room must not leave the report without any."""
    source = write_pictures(tmp_path / "many", [f"{n:03d}.png" for n in range(300)], (4, 4))
    out = small_disk(700 << 10) / "out"
    with raises_naming(StorageError, "predict:", *os.strerror(errno.ENOSPC).split()):
        predict_to_folder(two_classes, source, out, [])
    report = check_consistent(out)
    assert sum("error" not in entry for entry in report.values()) > 20
    assert not [path for path in out.iterdir() if "reserve" in path.name]


def test_a_disk_that_is_full_at_the_start(small_disk, pictures):
    disk = small_disk(16 << 10)
    with raises_naming(OSError, "space", "left"):
        (disk / "fill").write_bytes(bytes(1 << 20))
    called = []
    with raises_naming(StorageError, "save_dir:", "space", "left"):
        predict_to_folder(lambda *_: called.append(1), pictures, disk / "out", [])
    assert not called


def test_full_disk_while_a_result_or_the_report_is_written(pictures, tmp_path, monkeypatch):
    """The same without the right to mount: the system's error at the k-th file that is replaced."""
    real = Path.replace
    calls = []
    rules = [lambda target: target.suffix == ".png" and len(calls) >= 5]  # the second's class map

    def replace(self, target):
        calls.append(target)
        if rules[-1](target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)

    with raises_naming(StorageError, "1", "6", "predictions.json"):
        predict_to_folder(two_classes, pictures, tmp_path / "a", [])
    report = check_consistent(tmp_path / "a")
    failed = ["error" in entry for entry in report.values()]
    assert failed[:2] == [False, True]
    assert all(failed[2:])
    calls.clear()
    rules.append(lambda target: target.suffix == ".json" and len(calls) > 1)  # the last report
    with pytest.raises(StorageError, match=r"predictions\.json") as caught:
        predict_to_folder(two_classes, pictures, tmp_path / "b", [])
    assert "6 of 6" in str(caught.value)
    assert len(list((tmp_path / "b" / "overlay").iterdir())) == 6
    assert read_report(tmp_path / "b") == {}


def test_a_name_that_is_too_long_for_its_result(tmp_path):
    """A file's name may have 255 bytes: `.jpg` becomes `.png`, and `_jpg.png` is too long."""
    name = "\u7167" * 83  # 249 bytes
    source = write_pictures(tmp_path / "long", [f"{name}.png", "z.png"])
    assert predict_to_folder(two_classes, source, tmp_path / "a", []) == []
    assert len(check_consistent(tmp_path / "a")) == 2
    shutil.copy(source / f"{name}.png", source / f"{name}.bmp")
    lines = predict_to_folder(two_classes, source, tmp_path / "b", [])
    assert len(lines) == 2
    assert all("too long" in line for line in lines)
    assert len(check_consistent(tmp_path / "b")) == 3


@pytest.mark.parametrize(
    "kind", ["file", "below a file", "report is a folder", "overlay is a file"]
)
def test_a_folder_that_cannot_be_written(kind, pictures, tmp_path):
    out = tmp_path / "out"
    if kind == "report is a folder":
        (out / "predictions.json").mkdir(parents=True)
    elif kind == "overlay is a file":
        out.mkdir()
        (out / "overlay").write_bytes(b"")
    else:
        out.write_bytes(b"")
        out = out / "deep" if kind == "below a file" else out
    called = []
    with pytest.raises(StorageError, match="save_dir"):
        predict_to_folder(lambda *_: called.append(1), pictures, out, [])
    assert not called


def test_a_folder_that_is_read_only(small_disk, pictures):
    disk = small_disk(1 << 20)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for out in (disk, disk / "deep" / "out"):
        with pytest.raises(StorageError, match="Read-only"):
            predict_to_folder(two_classes, pictures, out, [])


# -- folders of earlier predictions ----------------------------------------------------------------


def test_results_of_an_earlier_run_do_not_pass_for_new_ones(
    pictures, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("ppvision"), "propagate", True)
    out = tmp_path / "out"
    assert predict_to_folder(two_classes, pictures, out, []) == []
    partial = out / "overlay" / "0.png.123-7f.partial"  # of a run that was killed
    partial.write_bytes(b"")
    own = out / "overlay" / "notes.partial"
    own.write_bytes(b"")
    (pictures / "2.png").write_bytes(b"no picture")
    (pictures / "5.png").unlink()
    assert len(predict_to_folder(two_classes, pictures, out, [])) == 1
    assert "2 files of earlier predictions" in caplog.text
    report = read_report(out)
    assert len(report) == 5
    for kind in KINDS:
        assert not (out / kind / "2.png").exists()  # it failed now
        assert (out / kind / "5.png").exists()  # no picture of this run
    assert not partial.exists()
    assert own.exists()


def test_an_earlier_report_is_gone_before_results_change(pictures, tmp_path):
    out = tmp_path / "out"
    predict_to_folder(two_classes, pictures, out, [])
    seen = []

    def predict(path, image):
        seen.append(((out / "overlay" / path.name).exists(), read_report(out)))
        return two_classes(path, image)

    predict_to_folder(predict, pictures, out, [])
    assert seen == [(False, {})] * 6


def test_files_that_are_not_from_a_prediction_are_not_replaced(pictures, tmp_path):
    """A data set's own label maps, in `labels/`, beside its pictures."""
    truth = tmp_path / "labels" / "0.png"
    truth.parent.mkdir()
    truth.write_bytes(b"hours of work")
    with pytest.raises(FolderInUseError, match=r"labels/0\.png"):
        predict_to_folder(two_classes, pictures, tmp_path, [])
    assert truth.read_bytes() == b"hours of work"
    assert not (tmp_path / "predictions.json").exists()


def test_no_result_lists_its_folder(pictures, tmp_path, monkeypatch):
    """Looking for leftovers before each file would take longer with every file that is there."""
    listed = []
    real = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, *how: listed.append(self) or real(self, *how))
    predict_to_folder(two_classes, pictures, tmp_path / "out", [])
    assert set(listed) <= {tmp_path / "out"}


def test_results_do_not_replace_their_pictures(pictures, tmp_path):
    out = tmp_path / "out"
    predict_to_folder(two_classes, pictures, out, [])
    before = {p: p.read_bytes() for p in out.rglob("*.png")}
    (tmp_path / "link").symlink_to(out / "overlay")
    for source in (out / "overlay", tmp_path / "link"):
        with raises_naming(InputError, "save_dir:", "overlay/0.png", "replace"):
            predict_to_folder(two_classes, source, out, [])
    assert {p: p.read_bytes() for p in out.rglob("*.png")} == before
    assert len(read_report(out)) == 6


def test_two_predictions_into_one_folder(pictures, tmp_path):
    with lock_folder(tmp_path / "out", "busy"), pytest.raises(FolderInUseError, match="another"):
        predict_to_folder(two_classes, pictures, tmp_path / "out", [])
    assert predict_to_folder(two_classes, pictures, tmp_path / "out", []) == []


def test_a_long_run_reports_on_its_way(pictures, tmp_path, monkeypatch):
    """For a process that is killed, by lack of memory or within the engine."""
    monkeypatch.setattr(prediction, "REPORT_SECONDS", 0.0)
    lengths = []

    def predict(path, image):
        lengths.append(len(read_report(tmp_path / "out")))
        return two_classes(path, image)

    monkeypatch.setattr(prediction, "AHEAD", 0)  # the writer has finished before
    monkeypatch.setattr(prediction, "REPORT_SHARE", 1e9)
    predict_to_folder(predict, pictures, tmp_path / "out", [])
    assert lengths == sorted(lengths)
    assert lengths[-1] >= 3


# -- memory ----------------------------------------------------------------------------------------


def test_what_waits_is_bounded_in_bytes(pictures, tmp_path, monkeypatch):
    """Slow models and slow disks: never more than the limit and one picture wait."""
    size = 12 * 16 * 3 + 12 * 16
    alive, most, lock = 0, 0, threading.Lock()
    real_read, real_save = prediction.read_picture, prediction.save_prediction

    def change(by):
        nonlocal alive, most
        with lock:
            alive += by
            most = max(most, alive)

    def read(path, **how):
        change(1)
        return real_read(path, **how)

    def save(*arguments):
        real_save(*arguments)
        time.sleep(0.02)
        change(-1)

    monkeypatch.setattr(prediction, "read_picture", read)
    monkeypatch.setattr(prediction, "save_prediction", save)
    for limit, allowed in ((1, 1), (size, 2), (1 << 30, 10)):
        monkeypatch.setattr(prediction, "AHEAD_BYTES", limit)
        alive = most = 0
        assert predict_to_folder(two_classes, pictures, tmp_path / str(limit), []) == []
        assert len(check_consistent(tmp_path / str(limit))) == 6
        # What the writer has given back to the count is still in its last line here.
        assert 1 <= most <= allowed + 1
    assert most > 2  # without a limit the next are read ahead


def test_an_error_that_is_kept_does_not_keep_its_picture(pictures, tmp_path):
    seen, alive = [], []

    def predict(path, image):
        gc.collect()
        alive.extend(reference() is not None for reference in seen)
        seen.append(weakref.ref(image))
        try:
            image.sum().no_such_thing  # noqa: B018
        except AttributeError as error:
            raise RuntimeError("k") from error

    with pytest.raises(EngineError) as caught:
        predict_to_folder(predict, pictures, tmp_path / "out", [])
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert alive == [False] * 15


def test_pictures_that_fail_give_their_memory_back(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, "AHEAD_BYTES", 1)

    def predict(path, image):
        raise RuntimeError("k")

    with pytest.raises(EngineError):
        predict_to_folder(predict, pictures, tmp_path / "out", [])
    assert len(read_report(tmp_path / "out")) == 6


# -- names -----------------------------------------------------------------------------------------


def test_names_that_are_bytes(exported, tmp_path):
    """A name in GBK, as an archive from Chinese Windows leaves it; terminals of all encodings."""
    source = tmp_path / "gbk"
    names = [b"a.png", "\u7167\u7247".encode("gbk") + b".png", b"bad\xff.png", b"bad\n\x1b.png"]
    write_pictures(source, [os.fsdecode(name) for name in names])
    for name in names[2:]:
        (source / os.fsdecode(name)).write_bytes(b"no picture")
    for encoding in ("utf-8", "ascii", "utf-8:strict", "gbk:strict"):
        out = tmp_path / os.fsdecode(b"out\xff-" + encoding.replace(":", "_").encode())
        done = subprocess.run(
            [
                *(sys.executable, "-m", "ppvision", "predict", "--model_dir", exported),
                *("--image_path", source, "--save_dir", out),
            ],
            env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == 1, done.stderr
        assert b"Traceback" not in done.stderr
        assert b"not predicted" in done.stderr
        assert rb"out\udcff-" in done.stdout
        assert done.stderr.count(rb"bad\xff.png") == 1  # as the reader's message has it
        assert rb"not predicted: " + os.fsencode(source) + rb"/bad\n\x1b.png" in done.stderr
        report = check_consistent(out)
        assert {os.fsencode(path) for path in report} == {
            os.path.join(os.fsencode(source), name) for name in names
        }
        assert sum("error" in entry for entry in report.values()) == 2
        assert {p.name for p in os.scandir(os.fsencode(out / "overlay"))} == set(names[:2])


def test_without_a_terminal_at_all(exported, pictures, tmp_path):
    """Output streams that were closed by whoever started us."""
    command = f"exec {sys.executable} -m ppvision predict --model_dir {exported} "
    command += f"--image_path {pictures} --save_dir {tmp_path}/out >&- 2>&-"
    done = subprocess.run(
        ["bash", "-c", command], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300
    )
    assert done.returncode == 0
    report = check_consistent(tmp_path / "out")
    assert len(report) == 6
    assert not any("error" in entry for entry in report.values())


# -- signals ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sixty(tmp_path_factory) -> Path:
    """60 pictures, of which the small model and its writer predict about 20 to 100 a second."""
    names = [f"{n:02d}.png" for n in range(60)]
    return write_pictures(tmp_path_factory.mktemp("sixty"), names, (200, 200))


def start(exported: Path, source: Path, out: Path, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "ppvision", "predict", "--model_dir", exported),
            *("--threads", "1", "--image_path", source, "--save_dir", out),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options},
    )


def wait_for_results(process: subprocess.Popen, out: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (out / "overlay").is_dir() and len(list((out / "overlay").glob("*.png"))) >= count:
            return
        time.sleep(0.0005)


def killed(exported, source, out, number, after) -> dict[str, object]:
    with start(exported, source, out) as process:
        wait_for_results(process, out, after)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    if process.returncode == 0:  # it had ended
        assert len(read_report(out)) == 60
    else:
        assert process.returncode == 128 + number, said
        assert number.name.encode() in said
    assert b"Traceback" not in said
    return check_consistent(out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_with_a_complete_report(number, exported, sixty, tmp_path):
    for attempt in range(5):  # on a busy machine a signal may come after the last picture
        report = killed(exported, sixty, tmp_path / f"out{attempt}", number, after=5)
        if len(report) < 60:
            break
    assert 5 <= len(report) < 60


@pytest.mark.all
@pytest.mark.parametrize("seed", range(20))
def test_signals_at_random_moments(seed, exported, sixty, tmp_path):
    draw = random.Random(seed)
    number = draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    killed(exported, sixty, tmp_path / "out", number, draw.randrange(58))


def test_a_killed_run_leaves_nothing_that_blocks_or_misleads(exported, sixty, tmp_path):
    out = tmp_path / "out"
    with start(exported, sixty, out) as process:
        wait_for_results(process, out, 5)
        process.kill()
        process.communicate(timeout=60)
    assert read_report(out) == {}
    Predictor(exported)
    assert predict_to_folder(two_classes, sixty, out, []) == []
    assert len(check_consistent(out)) == 60


def test_a_terminal_that_is_closed(exported, sixty, tmp_path):
    """SIGHUP, and then every write to the terminal fails."""
    for attempt in range(5):  # on a busy machine the signal may come after the last picture
        out = tmp_path / f"out{attempt}"
        code = _hang_up(exported, sixty, out)
        if len(check_consistent(out)) < 60:
            break
    assert code == 128 + signal.SIGHUP
    assert 5 <= len(check_consistent(out)) < 60


def _hang_up(exported, pictures, out) -> int:
    """Close the terminal of a prediction after five pictures; its exit status."""
    leader, terminal = pty.openpty()
    how = {"stdin": terminal, "stdout": terminal, "stderr": terminal, "start_new_session": True}
    with start(exported, pictures, out, **how) as process:
        os.close(terminal)
        reader = threading.Thread(target=_read_all, args=(leader,), daemon=True)
        reader.start()
        wait_for_results(process, out, 5)
        process.send_signal(signal.SIGHUP)
        os.close(leader)
        process.wait(timeout=60)
    return process.returncode


def _read_all(descriptor: int) -> None:
    try:
        while os.read(descriptor, 1 << 16):
            pass
    except OSError:  # closed
        pass
