"""Folders for the programs of PaddleSeg, PaddleDetection and PaddleX: what is written for them,
read with their keys. test_paddlex.py has PaddleX itself."""

import logging

import numpy as np
import paddle
import pytest
import yaml
from paddle import nn
from PIL import Image

from ppvision.deploy import Predictor, export_model
from ppvision.deploy.run.detection_transforms import DetectionTransforms
from ppvision.deploy.run.manifest import read_manifest
from ppvision.deploy.run.transforms import Transforms
from ppvision.deploy.write import clients, detection_export, paddlex
from ppvision.deploy.write.detection_export import export_detector
from ppvision.errors import EngineError, InputError
from ppvision.tasks import open_job
from tests.helpers.clients import (
    paddlex_detector_inputs,
    paddlex_input,
    run_paddleseg,
    run_paddlex,
)
from tests.helpers.messages import raises_naming
from tests.helpers.small_detectors import SIDE, small_detector, write_detector
from tests.helpers.verbs import ppvision

NORMALIZE = {"type": "Normalize", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
SHORT = {"type": "ResizeByShort", "short_size": 36}
CROP = {"type": "CenterCrop", "target_size": [40, 24]}
RESIZE = {"type": "Resize", "target_size": [40, 24]}


class Net(nn.Layer):
    """Logits `[B, 4, H, W]` of a picture."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2D(3, 8, 3, stride=2, padding=1)
        self.up = nn.Conv2D(8, 4, 1)

    def forward(self, x):
        y = self.up(nn.functional.relu(self.down(x)))
        return nn.functional.interpolate(y, x.shape[2:], mode="bilinear")


class Classifier(nn.Layer):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2D(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return 4 * self.head(nn.functional.relu(self.conv(x)).mean(axis=[2, 3]))


@pytest.fixture(autouse=True)
def seed():
    paddle.seed(7)


@pytest.fixture
def picture(tmp_path):
    """A file of 30 x 50 pixels."""
    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


# -- PaddleSeg -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [[None, 3, None, None], [1, 3, 30, 50]], ids=str)
def test_a_client_of_paddleseg_reads_an_export(tmp_path, picture, shape):
    pytest.importorskip("paddleseg", reason="pip install --no-deps paddleseg==2.8.0")
    folder = export_model(Net(), tmp_path / "net", input_shape=shape, transforms=[NORMALIZE])
    entry = yaml.safe_load((folder / "deploy.yaml").read_text())["Deploy"]
    assert entry == {
        "model": "model.pdmodel",
        "params": "model.pdiparams",
        "transforms": [NORMALIZE],
        "input_shape": shape,
        "output_op": "argmax",
        "output_dtype": "int32",
    }
    found = run_paddleseg(folder, picture)
    assert len(np.unique(found)) > 1
    np.testing.assert_array_equal(found[0], Predictor(folder, use_onednn=False)(str(picture)))


@pytest.mark.parametrize("output_op", ["softmax", "none"])
def test_exports_without_classes_have_no_entry_for_clients(tmp_path, output_op):
    folder = export_model(Net(), tmp_path / "net", input_shape=[1, 3, 24, 40], output_op=output_op)
    assert read_manifest(folder).Deploy is None


@pytest.mark.parametrize("fault", ["tracing", "classes"])
def test_a_program_that_clients_cannot_run_is_not_offered(tmp_path, monkeypatch, caplog, fault):
    def fail(*_: object) -> None:
        raise InputError("the weights of the two formats differ")

    def lie(program, weights, inputs):
        return [[np.zeros([len(x), *x.shape[2:]], np.int32)] for x in inputs]

    if fault == "tracing":
        monkeypatch.setattr(clients, "write_earlier_program", fail)
    else:
        monkeypatch.setattr(clients, "run_like_clients", lie)
    with caplog.at_level(logging.INFO, "ppvision"):
        folder = export_model(Net(), tmp_path / "net", input_shape=[1, 3, None, None])
    assert "PaddleSeg's own clients cannot run this export on a CPU" in caplog.text
    manifest = read_manifest(folder)
    assert (manifest.Deploy, manifest.earlier_format) == (None, False)
    assert not (folder / "model.pdmodel").exists()


class Aligned(Net):
    """Its resize gives other numbers in Paddle's oneDNN, which does not know `align_corners`."""

    def forward(self, x):
        y = self.up(nn.functional.relu(self.down(x)))
        return nn.functional.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)


@pytest.mark.parametrize("shape", [[None, 3, None, None], [1, 3, 30, 50]], ids=str)
def test_a_client_runs_what_onednn_does_not(tmp_path, picture, shape):
    """The clients do not ask for oneDNN."""
    pytest.importorskip("paddleseg", reason="pip install --no-deps paddleseg==2.8.0")
    model = Aligned()
    with pytest.warns(UserWarning, match="oneDNN"):
        folder = export_model(model, tmp_path / "net", input_shape=shape, transforms=[NORMALIZE])
    manifest = read_manifest(folder)
    assert (manifest.onednn, manifest.Deploy["model"]) == (False, "model.pdmodel")
    pixels = (np.asarray(Image.open(picture), np.float32) / 255 - NORMALIZE["mean"]) / (
        NORMALIZE["std"]
    )
    x = paddle.to_tensor(pixels.transpose(2, 0, 1)[None].astype(np.float32))
    np.testing.assert_array_equal(run_paddleseg(folder, picture), model(x).argmax(1).numpy())


def test_integers_are_not_for_clients(tmp_path, picture, caplog):
    how = {"input_shape": [1, 3, 30, 50], "transforms": [NORMALIZE]}
    with caplog.at_level(logging.INFO, "ppvision"):
        folder = export_model(Net(), tmp_path / "net", int8=True, calibration=[str(picture)], **how)
    assert read_manifest(folder).Deploy is None
    assert "own clients" not in caplog.text


# -- PaddleDetection -------------------------------------------------------------------------------

READER = [
    {"Decode": {}},
    {"Resize": {"target_size": 320, "keep_ratio": 1}},
    {"NormalizeImage": {"is_scale": True}},
    {"Permute": None},
    {"PadBatch": {"pad_to_stride": 32}},
]


def test_description_of_a_detector():
    content = clients.make_infer_config(
        "MaskRCNN", "COCO", READER, [1, 3, None, None], ["cell", "cup"], masks=True
    )
    assert content == {
        "mode": "paddle",
        "draw_threshold": 0.5,
        "metric": "COCO",
        "use_dynamic_shape": True,
        "arch": "RCNN",
        "min_subgraph_size": 40,
        "Preprocess": [
            {"type": "Resize", "target_size": [320, 320], "keep_ratio": True, "interp": 1},
            {
                "type": "NormalizeImage",
                "mean": [0.485, 0.456, 0.406],
                "std": [0.229, 0.224, 0.225],
                "is_scale": True,
                "norm_type": "mean_std",
            },
            {"type": "Permute"},
            {"type": "PadStride", "stride": 32},
        ],
        "label_list": ["cell", "cup"],
        "mask": True,
    }
    fixed = clients.make_infer_config("PPYOLOE", "VOC", READER, [1, 3, 64, 64], ["a"], masks=False)
    assert (fixed["arch"], fixed["min_subgraph_size"]) == ("PPYOLOE", 3)
    assert fixed["use_dynamic_shape"] is False
    assert "mask" not in fixed


@pytest.mark.parametrize(("stride", "side"), [(0, 36), (32, 64)], ids=str)
def test_a_detector_of_a_size_that_no_picture_gets_is_refused(tmp_path, stride, side):
    """Before anything is done with the model."""
    reader = [
        {"Resize": {"target_size": [36, 64], "keep_ratio": False}},
        {"Permute": None},
        {"PadBatch": {"pad_to_stride": stride}},
    ]
    given = DetectionTransforms(reader)(np.zeros([20, 30, 3], np.uint8))["image"].shape
    assert given == (3, side, 64)
    how = {"num_classes": 1, "transforms": reader}
    with raises_naming(InputError, "input_shape", "96", "128", str(side), "64", "target_size"):
        export_detector(nn.Layer(), tmp_path / "m", input_shape=[1, 3, 96, 128], **how)


@pytest.mark.parametrize(
    ("architecture", "arch"),
    [("YOLOv3", "YOLO"), ("CascadeRCNN", "RCNN"), ("RetinaNet", "RetinaNet"), ("FCOS", "FCOS")],
)
def test_architectures_that_clients_know(architecture, arch):
    """Names as in PaddleDetection's own table."""
    from ppdet.engine.export_utils import TRT_MIN_SUBGRAPH

    content = clients.make_infer_config(architecture, "COCO", READER, [1, 3, 64, 64], ["a"], False)
    assert content["arch"] == arch
    assert content["min_subgraph_size"] == TRT_MIN_SUBGRAPH[arch]


@pytest.mark.filterwarnings("ignore:The detector finds nothing")  # its weights are random
def test_a_client_runs_a_detector_that_onednn_does_not(scenes, tmp_path, monkeypatch):
    """The clients do not ask for oneDNN."""
    compare = detection_export._compare

    def lie(probes, folders, format, rule, engine):
        if engine == "onednn":
            raise EngineError("other numbers")
        return compare(probes, folders, format, rule, engine)

    monkeypatch.setattr(detection_export, "_compare", lie)
    job = open_job(write_detector(tmp_path / "job.yml", small_detector(scenes, "YOLOv3")))
    how = {"input_shape": [1, 3, SIDE, SIDE], "output_op": None, "model_format": "paddle"}
    with pytest.warns(UserWarning, match="oneDNN"):
        folder = job.export(job.float_model, tmp_path / "m", **how)
    manifest = read_manifest(folder)
    assert (manifest.onednn, manifest.earlier_format) == (False, True)


# -- PaddleX ---------------------------------------------------------------------------------------


def test_segmentation_for_paddlex(tmp_path, picture):
    folder = export_model(
        Net(),
        tmp_path / "net",
        input_shape=[1, 3, 24, 40],
        transforms=[RESIZE, NORMALIZE],
        paddlex_name="PP-LiteSeg-T",
    )
    names = {path.name for path in folder.iterdir()} - {"inference.pdmodel"}  # OpenVINO's
    assert names == {"deploy.yaml", "inference.json", "inference.pdiparams", "inference.yml"}
    content = yaml.safe_load((folder / "inference.yml").read_text())
    assert content["Global"] == {"model_name": "PP-LiteSeg-T"}
    manifest = read_manifest(folder)
    assert (manifest.program, manifest.weights) == ("inference.json", "inference.pdiparams")
    assert manifest.paddlex_name == "PP-LiteSeg-T"
    found, own = run_paddlex(folder, picture), Predictor(folder)(str(picture))
    assert len(np.unique(own)) > 1
    np.testing.assert_array_equal(found, own)


def test_without_a_transform_for_paddlex(tmp_path, picture):
    """PaddleX always normalises; here by nothing."""
    net = Net()
    net.down.weight.set_value(net.down.weight / 255)
    folder = export_model(
        net, tmp_path / "net", input_shape=[None, 3, None, None], paddlex_name="SegFormer-B0"
    )
    found, own = run_paddlex(folder, picture), Predictor(folder)(str(picture))
    assert len(np.unique(own)) > 1
    np.testing.assert_array_equal(found, own)


@pytest.mark.parametrize(
    "transforms",
    [
        [RESIZE, NORMALIZE],
        # To 60 x 36, then 25 x 13: of 35 columns and of 23 rows, 17 and 11 are cut off before,
        # where `paddle.vision` would cut 18 and 12.
        [
            {"type": "ResizeByShort", "short_size": 36},
            {"type": "CenterCrop", "target_size": [25, 13]},
        ],
        [{**RESIZE, "interp": "CUBIC"}],
    ],
    ids=["resize", "crop", "cubic"],
)
def test_classification_for_paddlex(tmp_path, picture, transforms):
    net = Classifier()
    if NORMALIZE not in transforms:
        net.conv.weight.set_value(net.conv.weight / 255)
    folder = export_model(
        net,
        tmp_path / "net",
        input_shape=[None, 3, None, None],
        transforms=transforms,
        task="classification",
        output_op="softmax",
        classes=list("abcde"),
        paddlex_name="ResNet18",
    )
    content = yaml.safe_load((folder / "inference.yml").read_text())
    assert content["PostProcess"] == {"Topk": {"topk": 5, "label_list": list("abcde")}}
    own = Predictor(folder)(str(picture)).probabilities
    assert np.ptp(own) > 0.05
    np.testing.assert_allclose(run_paddlex(folder, picture), own, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "transforms"),
    [
        ("segmentation", [RESIZE, NORMALIZE]),
        ("segmentation", [{**RESIZE, "keep_ratio": True, "size_divisor": 8}]),
        ("classification", [SHORT, {**CROP, "target_size": [25, 13]}, NORMALIZE]),
        ("classification", [{**RESIZE, "interp": "CUBIC"}]),
    ],
    ids=["resize", "ratio", "crop", "cubic"],
)
def test_pictures_are_prepared_as_by_paddlex(task, transforms):
    image = np.random.default_rng(1).integers(0, 255, (31, 50, 3), dtype=np.uint8)
    name = paddlex.choose_default_name(task, "")
    content = paddlex.make_paddlex_config(task, name, transforms, [1, 3, None, None], ["a"])
    expected = paddlex_input(content, image)[0]
    np.testing.assert_allclose(
        Transforms(transforms, as_paddlex=True)(image)[0], expected, atol=1e-5
    )
    # PaddleSeg and `paddle.vision` resize in float32, so that one does not stand for the other.
    as_trained, _ = Transforms(transforms)(image)
    assert as_trained.shape == expected.shape
    assert np.abs(as_trained - expected).max() > 1e-3


@pytest.mark.parametrize("interp", [1, 2])
def test_pictures_of_detectors_are_prepared_as_by_paddlex(interp):
    """101 x 203 in 96 x 160 with its ratio kept: 79.6 x 160, which becomes 80 x 160."""
    image = np.random.default_rng(1).integers(0, 255, (101, 203, 3), dtype=np.uint8)
    transforms = [
        {"Resize": {"target_size": [96, 160], "keep_ratio": True, "interp": interp}},
        {"NormalizeImage": {}},
        {"Permute": {}},
        {"PadBatch": {"pad_to_stride": 32}},
    ]
    name, how = "FasterRCNN-ResNet50", ([1, 3, None, None], ["a"], False)
    content = paddlex.make_paddlex_detector_config(name, "FasterRCNN", "COCO", transforms, *how)
    expected = paddlex_detector_inputs(content, image)
    assert expected["im_shape"].tolist() == [[80, 160]]
    found = DetectionTransforms(transforms, as_paddlex=True)(image)
    for key, array in expected.items():
        np.testing.assert_allclose(found[key], array[0], atol=1e-5)
    as_trained = DetectionTransforms(transforms)(image)
    assert abs(as_trained["scale_factor"][0] - found["scale_factor"][0]) > 1e-3


def test_another_export_takes_its_place(tmp_path):
    how = {"input_shape": [1, 3, None, None]}
    folder = export_model(Net(), tmp_path / "net", paddlex_name="SegFormer-B0", **how)
    export_model(Net(), folder, **how)
    assert {path.name for path in folder.iterdir()} == {
        *("deploy.yaml", "model.json", "model.pdiparams", "model.pdmodel")
    }


BAD = {
    "padding": (
        {"transforms": [{"type": "Padding", "target_size": [64, 64]}]},
        "Padding segmentation; Resize, Normalize",
    ),
    "order": ({"transforms": [NORMALIZE, RESIZE]}, "order Normalize, Resize"),
    "twice": ({"transforms": [RESIZE, RESIZE]}, "order Resize, once"),
    "name": ({"paddlex_name": "SegFormer-B9"}, "paddlex_name: 'SegFormer-B9' SegFormer-B5"),
    "another task's name": ({"paddlex_name": "ResNet18"}, "paddlex_name: segmentation, 'ResNet18'"),
    "a number": ({"paddlex_name": 3}, "paddlex_name: 3. PP-LiteSeg-T"),
    "scores": ({"output_op": "softmax"}, "output_op: 'argmax' 'softmax'"),
    "onnx": ({"format": "onnx"}, "paddlex_name: format 'paddle' 'onnx'"),
    "more than 8 bits": ({"max_value": 4095}, "max_value 8"),
    "features": ({"task": "features", "output_op": "none"}, "paddlex_name: features"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_paddlex_cannot_do_is_refused(tmp_path, case):
    options, tokens = BAD[case]
    how = {"input_shape": [1, 3, None, None], "paddlex_name": "SegFormer-B0", **options}
    with raises_naming(InputError, *tokens.split()):
        export_model(Net(), tmp_path / "net", **how)
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize(
    ("transforms", "shape", "token"),
    [
        ([], [1, 3, None, None], "ResizeByShort"),
        ([{**RESIZE, "keep_ratio": True}], [1, 3, None, None], "keep_ratio"),
        ([{**RESIZE, "size_divisor": 8}], [1, 3, None, None], "size_divisor"),
        ([{"type": "ResizeByShort", "short_size": 9, "max_size": 20}], [1, 3, 9, 9], "max_size"),
        ([{"type": "LimitLong"}, RESIZE], [1, 3, 24, 40], "LimitLong"),
    ],
)
def test_transforms_of_classifiers_that_paddlex_cannot_do(transforms, shape, token):
    with pytest.raises(InputError, match=token):
        paddlex.classification_transforms(transforms, shape)


def test_a_classifier_of_one_size_needs_no_resize():
    steps = paddlex.classification_transforms([NORMALIZE], [None, 3, 24, 40])
    assert steps[0] == {"ResizeImage": {"size": [40, 24]}}


def test_what_paddlex_would_run_is_compared(tmp_path, monkeypatch):
    from ppvision.deploy.verify import clients as verify

    def lie(folder, inputs, name):
        return [[np.zeros([len(x), *x.shape[2:]], np.int32)] for x in inputs]

    monkeypatch.setattr(verify, "run_like_paddlex", lie)
    with pytest.raises(EngineError, match="MaskFormer_small"):
        export_model(
            Net(), tmp_path / "net", input_shape=[1, 3, 24, 40], paddlex_name="SegFormer-B0"
        )
    assert not (tmp_path / "net").exists()


def test_names_by_architecture():
    for kind, names in paddlex._DEFAULTS.items():
        for architecture, name in names.items():
            assert paddlex.choose_default_name(kind, architecture) == name
            assert name in paddlex.NAMES[kind]
    assert paddlex.choose_default_name("segmentation", "UPerNet") == "SegFormer-B0"
    assert paddlex.choose_default_name("classification", "pale_nano") == "ResNet18"
    assert paddlex.choose_default_name("detection", "YOLOv3") == "PP-YOLOE_plus-S"


def test_detectors_for_paddlex():
    """`norm_type: none` there still subtracts the mean, so none is written as zeros and ones."""
    transforms = [{"NormalizeImage": {"norm_type": "none"}}, {"Permute": {}}]
    how = ("YOLOv3", "COCO", transforms, [1, 3, 64, 64], ["a"])
    content = paddlex.make_paddlex_detector_config("PP-YOLOE_plus-S", *how, False)
    assert content["Global"] == {"model_name": "PP-YOLOE_plus-S"}
    (norm, _) = content["Preprocess"]
    assert (norm["norm_type"], norm["mean"], norm["std"]) == ("mean_std", [0.0] * 3, [1.0] * 3)
    with pytest.raises(InputError, match="masks"):
        paddlex.make_paddlex_detector_config("PP-YOLOE_plus-S", *how, True)


@pytest.mark.parametrize(
    ("name", "shape", "other"),
    [("FasterRCNN-ResNet50", False, "PP-YOLOE"), ("FCOS-ResNet50", True, "FasterRCNN")],
)
def test_a_name_whose_inputs_do_not_fit(monkeypatch, name, shape, other):
    inputs = {"image": [1, 3, 64, 64], "scale_factor": [1, 2]}
    inputs |= {"im_shape": [1, 2]} if shape else {}
    monkeypatch.setattr(paddlex, "read_declared_inputs", lambda program: inputs)
    with pytest.raises(InputError, match=other):
        paddlex.check_inputs(name, None)


def test_a_detector_as_onnx_is_refused_for_paddlex(tmp_path):
    with pytest.raises(InputError, match="'onnx'"):
        export_detector(
            None,
            tmp_path / "m",
            input_shape=[1, 3, 64, 64],
            num_classes=1,
            format="onnx",
            transforms=[{"Permute": {}}],
            paddlex_name="PP-YOLOE_plus-S",
        )


def test_flags(config_file, tmp_path, capsys):
    where = ("-c", config_file(), "--model_path", "none.pdparams", "--save_dir", tmp_path / "m")
    assert ppvision("export", *where, "--paddlex_name", "SegFormer-B0") == 1
    assert "--for paddlex only" in capsys.readouterr().err
