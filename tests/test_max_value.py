"""Pictures of 12 bits give what their originals of 8 bits give, from check to exported model."""

import random
import re
import shutil

import cv2
import numpy as np
import paddle
import pytest
import yaml
from paddle import nn
from PIL import Image
from ppdet.data.transform.operators import Decode

from ppvision.deploy import Predictor, export_model
from ppvision.errors import ConfigError, DataError, InputError
from ppvision.plugins.paddledet import load_yaml
from ppvision.tasks import open_job
from ppvision.tasks.classification import job as classification
from ppvision.tasks.detection import job as detection
from ppvision.tasks.segmentation import job as segmentation
from tests.helpers.configs import classification_config, small_config
from tests.helpers.small_detectors import small_detector, write_detector

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:\s*Non compatible API"),
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
]

WHITE = 4095
PARTS = ("train_dataset", "val_dataset")


def pictures_of(folder):
    found = (path for kind in ("png", "jpg") for path in folder.rglob(f"*.{kind}"))
    return sorted(path for path in found if "labels" not in path.relative_to(folder).parts)


def deepen(folder, source):
    """A copy of a data set with PNGs of 12 bits in 16 (whatever their names end with): value v of
    8 bits as `v WHITE / 255`, rounded, which is scaled back to v."""
    shutil.copytree(source, folder)
    for path in pictures_of(folder):
        pixels = cv2.imread(str(path), cv2.IMREAD_COLOR)
        assert pixels.dtype == np.uint8
        deep = np.rint(pixels.astype(np.float64) * WHITE / 255).astype(np.uint16)
        path.write_bytes(cv2.imencode(".png", deep)[1].tobytes())
    assert len(pictures_of(folder)) >= 16
    return folder


def _segmentation(folder, change):
    config = small_config(folder)
    for part in PARTS:
        config[part]["dataset_root"] = str(folder)
        config[part] |= change
    return config


def _classification(folder, change):
    config = classification_config(folder)
    for part in PARTS:
        config[part] |= change
    return config


def _detection(folder, change):
    config = small_detector(folder, "YOLOv3")
    for part in ("TrainDataset", "EvalDataset"):
        config[part]["!COCODataSet"] |= change
    return config


TASKS = {
    "segmentation": (segmentation, _segmentation, "export_model"),
    "classification": (classification, _classification, "export_model"),
    "detection": (detection, _detection, "export_detector"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, scenes, crops):
    """By task: the data set of 8 bits and that of 12."""
    deep = tmp_path_factory.mktemp("deep")
    sets = {
        "segmentation": (scenes, deepen(deep / "scenes", scenes)),
        "classification": (crops, deepen(deep / "crops", crops)),
    }
    return sets | {"detection": sets["segmentation"]}


@pytest.fixture
def open_task(tmp_path, folders, monkeypatch):
    monkeypatch.setenv("PPVISION_CACHE", str(tmp_path / "cache"))

    def open_it(task, deep, **change):
        config = TASKS[task][1](folders[task][deep], change)
        path = tmp_path / f"job{deep}.yml"
        if task == "detection":
            return open_job(write_detector(path, config))
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return open_job(path)

    return open_it


def arrays(sample):
    """The numbers of a sample, by name."""
    items = sample.items() if isinstance(sample, dict) else enumerate(sample)
    return {key: value for key, value in items if isinstance(value, (np.ndarray, np.generic))}


@pytest.mark.parametrize("task", TASKS)
def test_check_training_and_prediction(task, open_task):
    # PaddleDetection keeps one configuration for the process: what it gives is taken at once.
    def look(job):
        job.check_data(*PARTS)
        samples = []
        for index in range(len(job.train_dataset)):
            random.seed(index)
            np.random.seed(index)
            samples.append(arrays(job.train_dataset[index]))
        paddle.seed(0)
        model = job.float_model
        if task == "detection":
            picture = job._dataset("EvalDataset")
            picture.parse_dataset()
            path = picture.roidbs[0]["im_file"]
        elif task == "segmentation":
            path = job.builder.val_dataset.file_list[0][0]
        else:
            path = job.val_dataset.samples[0][0]
        seen = []

        def keep(_, inputs):
            picture = inputs[0]["image"] if task == "detection" else inputs[0]
            seen.append(picture.numpy())

        model.register_forward_pre_hook(keep)
        job.predict_image(model, path)
        return samples, seen, job.pictures(model)

    expected, found = look(open_task(task, 0)), look(open_task(task, 1, max_value=WHITE))
    assert len(expected[0]) == len(found[0]) >= 12
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            np.testing.assert_array_equal(ours[key], value)
    assert len(expected[1]) == len(found[1]) >= 1
    assert np.ptp(expected[1][0]) > 0
    for ours, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert found[2].keys() == expected[2].keys()
    for name, panel in expected[2].items():
        np.testing.assert_array_equal(found[2][name], panel)


@pytest.mark.parametrize("task", TASKS)
def test_refused_by_name_without_it(task, open_task, folders):
    job = open_task(task, 1)
    with pytest.raises(DataError, match="max_value") as caught:
        job.check_data("train_dataset")
    assert "16 bits" in str(caught.value)
    assert str(folders[task][1]) in str(caught.value)
    with pytest.raises(DataError, match="max_value") as caught:
        job.train_dataset[0]
    assert re.search(r"\.(png|jpg)\b", str(caught.value))


@pytest.mark.parametrize("task", TASKS)
def test_the_config_takes_whole_numbers_alone(task, open_task):
    for wrong in (0, -4095, 1.5, "white", True):
        with pytest.raises(ConfigError, match="max_value"):
            open_task(task, 1, max_value=wrong)
    with pytest.raises(ConfigError, match="max_value"):
        open_task(task, 1, max_valu=4095)


@pytest.mark.parametrize("task", TASKS)
def test_an_export_is_told(task, open_task, monkeypatch, tmp_path):
    module, _, function = TASKS[task]
    told = {}
    monkeypatch.setattr(module, function, lambda *args, **options: told.update(options))
    job = open_task(task, 1, max_value=WHITE)
    options = {"input_shape": [1, 3, 64, 64], "output_op": None, "model_format": "paddle"}
    job.export(job.float_model, tmp_path / "out", **options)
    assert told["max_value"] == WHITE


def test_exported_model_scales_files_and_arrays(tmp_path, folders):
    paddle.seed(1)
    model = nn.Conv2D(3, 5, 3, padding=1)
    options = {"input_shape": [None, 3, None, None], "transforms": [{"type": "Normalize"}]}
    shallow = Predictor(export_model(model, tmp_path / "shallow", **options))
    deep = Predictor(export_model(model, tmp_path / "deep", **options, max_value=WHITE))
    manifests = [
        yaml.safe_load((tmp_path / name / "deploy.yaml").read_text()).get("max_value")
        for name in ("shallow", "deep")
    ]
    assert manifests == [None, WHITE]
    first, second = folders["segmentation"]
    names = [path.relative_to(first) for path in pictures_of(first)[:3]]
    assert len(names) == 3
    for name in names:
        original, path = first / name, second / name
        expected = shallow(original)
        np.testing.assert_array_equal(deep(path), expected)
        values = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[:, :, ::-1]
        assert values.dtype == np.uint16
        np.testing.assert_array_equal(deep(values), expected)
        np.testing.assert_array_equal(deep(original), expected)  # 8 bits stay as they are
        with pytest.raises(DataError, match="max_value"):
            shallow(path)
        with pytest.raises(InputError, match="uint16"):
            shallow(values)
        with pytest.raises(DataError, match="4096"):
            deep(np.full_like(values, WHITE + 1))
    with pytest.raises(InputError, match="max_value"):
        export_model(model, tmp_path / "wrong", **options, max_value=0)
    text = (tmp_path / "deep" / "deploy.yaml").read_text()
    (tmp_path / "deep" / "deploy.yaml").write_text(text.replace("max_value: 4095", "max_value: -1"))
    with pytest.raises(ValueError, match="max_value"):
        Predictor(tmp_path / "deep")


@pytest.mark.parametrize("task", TASKS)
def test_one_decode_per_picture(task, open_task, folders, monkeypatch):
    job = open_task(task, 1, max_value=WHITE)
    decoded = []
    decode = cv2.imdecode
    monkeypatch.setattr(cv2, "imdecode", lambda *args: decoded.append(1) or decode(*args))
    monkeypatch.setattr(cv2, "imread", None)
    monkeypatch.setattr(Image, "open", None)
    job.check_data("train_dataset")
    count = len(job.train_dataset)
    labels = 2 if task == "segmentation" else 1
    assert len(decoded) == count * labels
    decoded.clear()
    job.train_dataset[0]
    assert len(decoded) == labels
    decoded.clear()
    path = pictures_of(folders[task][1])[-1]
    job.predict_image(job.float_model, path)
    assert len(decoded) == 1


def test_voc_says_it_too(tmp_path):
    values = np.arange(6 * 8 * 3, dtype=np.uint16).reshape(6, 8, 3) * 28
    (tmp_path / "a.png").write_bytes(cv2.imencode(".png", values)[1].tobytes())
    (tmp_path / "a.xml").write_text(
        "<annotation><size><width>8</width><height>6</height></size><object><name>cat</name>"
        "<difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>4</ymax>"
        "</bndbox></object></annotation>"
    )
    (tmp_path / "train.txt").write_text("a.png a.xml\n")
    (tmp_path / "labels.txt").write_text("cat\n")
    dataset = load_yaml(
        f"!VOCDataSet {{dataset_dir: {tmp_path}, image_dir: '', anno_path: train.txt, "
        "label_list: labels.txt, data_fields: [image, gt_bbox, gt_class, difficult], "
        f"max_value: {WHITE}}}"
    )
    dataset.parse_dataset()
    sample = Decode()(dict(dataset.roidbs[0]))
    assert "max_value" not in sample
    expected = np.rint(values[:, :, ::-1].astype(np.float64) * 255 / WHITE)
    np.testing.assert_array_equal(sample["image"], expected)
