"""Detection through the verbs: every architecture over Pale, trained, scored, exported."""

import csv
import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import paddle
import pytest
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.helpers.messages import raises_naming

pytest.importorskip("ppdet", reason="pip install --no-deps paddledet==2.6.0")

from ppdet.data.reader import BatchCompose, Compose

from ppvision.data.coco_reading import expand_run_lengths
from ppvision.data.pictures import read_picture
from ppvision.deploy import Predictor
from ppvision.deploy.run.detection_transforms import DetectionTransforms
from ppvision.deploy.run.engines import has_openvino
from ppvision.engine.checkpoint import list_checkpoints
from ppvision.engine.run_folder import RunFolder, read_metrics
from ppvision.errors import DataError
from ppvision.tasks import open_job
from ppvision.tasks.detection import job as detection
from ppvision.zoo.weights import read_weights
from tests.helpers.clients import run_paddledetection
from tests.helpers.configs import ROOT
from tests.helpers.small_detectors import (
    ARCHITECTURES,
    SIDE,
    WARNINGS,
    best,
    small_detector,
    train,
    write_detector,
)
from tests.helpers.verbs import ppvision, shell

pytestmark = WARNINGS

FREE = ("--input_shape", "None", "3", "None", "None")
FIXED = ("--input_shape", "1", "3", str(SIDE), str(SIDE))
SIZES_FREE = ("MaskRCNN", "YOLOv3")  # exported so without SDN


@pytest.fixture(scope="module")
def runs(tmp_path_factory, scenes):
    """`run(architecture, sdn) -> (config, run folder)`, two steps of each, made once."""
    folder = tmp_path_factory.mktemp("detectors")
    made = {}

    def run(architecture: str, sdn: bool = False) -> tuple[Path, Path]:
        name = f"{architecture}{'_sdn' if sdn else ''}"
        if name not in made:
            content = small_detector(scenes, architecture, sdn=sdn)
            config = write_detector(folder / f"{name}.yml", content)
            assert train(config, folder / name, "--iters", 2) == 0
            made[name] = config, folder / name
        return made[name]

    return run


# By --all: two whose parts MaskRCNN has as well, and those with SDN, at free sizes where they are
# fixed without (test_detection_widths.py has SDN in PP-YOLOE by default).
CASES = [
    pytest.param(
        name, False, id=name, marks=pytest.mark.all if name in ("CascadeRCNN", "FasterRCNN") else ()
    )
    for name in ARCHITECTURES
]
CASES += [
    pytest.param(name, True, id=f"{name}-sdn", marks=pytest.mark.all) for name in ARCHITECTURES
]


@pytest.mark.parametrize(("architecture", "sdn"), CASES)
def test_train_evaluate_export(runs, scenes, architecture, sdn, tmp_path, capsys):
    """`export` compares boxes itself; here that the export scores as the model does."""
    config, run = runs(architecture, sdn)
    kinds = {"bbox", "mask"} if architecture == "MaskRCNN" else {"bbox"}
    tags = {tag for _, tag, _ in read_metrics(run / "metrics.csv")}
    assert {f"Evaluate/{kind}_AP50" for kind in kinds} <= tags
    weights = read_weights(best(run))
    assert any(".diffusion." in name for name in weights) == sdn

    shape = FREE if (architecture in SIZES_FREE) is not sdn else FIXED
    folder = tmp_path / "model"
    code = ppvision(
        *("export", "-c", config, "--model_path", best(run), "--save_dir", folder, *shape)
    )
    assert code == 0
    capsys.readouterr()
    assert ppvision("eval", "-c", config, "--model_path", best(run)) == 0
    eager = capsys.readouterr().out.splitlines()
    assert ppvision("eval", "-c", config, "--model_dir", folder) == 0
    exported = capsys.readouterr().out.splitlines()

    def scores(lines: list[str]) -> list[float]:
        shown = [line for line in lines if line.split(":")[0] in kinds]
        return [float(word) for line in shown for word in line.split()[2::2]]

    assert len(scores(eager)) >= 3 * len(kinds)
    np.testing.assert_allclose(scores(exported), scores(eager), atol=2e-3)
    check_client(folder, scenes / "images" / "val" / "000000.jpg")


def check_client(folder: Path, picture: Path) -> None:
    """`infer_cfg.yml`, read as PaddleDetection's clients read it, gives what `Predictor` finds."""
    rows, counts, *masks = run_paddledetection(folder, picture)
    assert counts.sum() == len(rows)
    rows = rows[rows[:, 1] > 0]  # two stages end with a box of score 0
    rows = rows[np.argsort(-rows[:, 1], kind="stable")]
    found = Predictor(folder, use_onednn=False)(str(picture))
    assert len(found) == len(rows) > 0
    assert bool(masks) == (found.masks is not None)
    np.testing.assert_allclose(rows[:, 1], found.scores, atol=1e-5)
    near = np.abs(rows[:, None, 2:] - found.boxes[None]).max(axis=2).min(axis=1)
    assert near.max() < 1e-2  # equal scores may change places


def test_classes_of_an_evaluation(runs, capsys):
    config, run = runs("FCOS")
    capsys.readouterr()
    assert ppvision("eval", "-c", config, "--model_path", best(run)) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split() == ["class", "bbox"])
    assert [line.split()[0] for line in lines[start + 1 :][:10]] == [str(k) for k in range(10)]


def test_scores_are_those_of_coco(runs, scenes):
    """By class and in the mean: predictions of our own put into pycocotools."""
    config, run = runs("MaskRCNN")
    job = open_job(config)
    model = job.load(best(run))
    truth = COCO(str(scenes / "annotations" / "instances_val.json"))
    found = []
    for image in truth.loadImgs(truth.getImgIds()):
        result = job.predict_image(model, scenes / "images" / image["file_name"])
        for k, score, box, mask in zip(
            result.class_ids, result.scores, result.boxes, result.masks, strict=True
        ):
            corner, end = box[:2].tolist(), box[2:].tolist()
            size = [b - a for a, b in zip(corner, end, strict=True)]
            entry = {"image_id": image["id"], "category_id": sorted(truth.getCatIds())[k]}
            run_lengths = mask_utils.encode(np.asfortranarray(mask, np.uint8))
            found.append(
                entry | {"bbox": corner + size, "score": float(score), "segmentation": run_lengths}
            )
    scores = job.evaluate(model)
    for kind, name in (("bbox", "bbox"), ("segm", "mask")):
        expected = COCOeval(truth, truth.loadRes([dict(f) for f in found]), kind)
        expected.evaluate()
        expected.accumulate()
        expected.summarize()
        assert scores.means[name]["AP"] == pytest.approx(expected.stats[0], abs=1e-3)
        assert scores.means[name]["AP50"] == pytest.approx(expected.stats[1], abs=1e-3)


def test_predict_draws_and_lists(runs, scenes, tmp_path, capsys):
    config, run = runs("MaskRCNN")
    source = tmp_path / "pictures"
    source.mkdir()
    picture = np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8)
    Image.fromarray(picture).save(source / "wide.png")
    (source / "broken.png").write_bytes(b"no picture")
    arguments = ("predict", "-c", config, "--model_path", best(run), "--image_path", source)
    assert ppvision(*arguments, "--save_dir", tmp_path / "out") == 1  # one does not read
    assert "broken.png" in capsys.readouterr().err
    drawn = np.asarray(Image.open(tmp_path / "out" / "overlay" / "wide.png"))
    assert drawn.shape == picture.shape
    report = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert list(report) == [str(source / "broken.png"), str(source / "wide.png")]
    assert "broken.png" in report[str(source / "broken.png")]["error"]
    entries = report[str(source / "wide.png")]
    job = open_job(config)
    found = job.predict_image(job.load(best(run)), source / "wide.png")
    assert len(entries) == len(found) > 0
    assert [e["score"] for e in entries] == sorted((e["score"] for e in entries), reverse=True)
    first = entries[0]
    np.testing.assert_allclose(first["box"], found.boxes[0], atol=0.006)
    mask = mask_utils.decode({**first["mask"], "counts": first["mask"]["counts"].encode()})
    np.testing.assert_array_equal(mask, found.masks[0])


def test_a_picture_too_narrow_for_its_ratio_is_named(runs, tmp_path):
    config, run = runs("FCOS")
    Image.fromarray(np.zeros((1, 400, 3), np.uint8)).save(tmp_path / "line.png")
    job = open_job(config, ["TestReader.sample_transforms.1.Resize.keep_ratio=true"])
    model = job.load(best(run))
    with raises_naming(DataError, "line.png", "TestReader"):
        job.predict_image(model, tmp_path / "line.png")


class _FindsNothing(paddle.nn.Layer):
    def forward(self, batch):
        counts = np.zeros(len(batch["im_id"]), np.int32)
        return {"bbox": np.zeros((0, 6), np.float32), "bbox_num": counts}


def test_a_class_without_objects_has_no_score_where_nothing_is_found(runs, scenes):
    config, _ = runs("FCOS")
    job = open_job(config)
    truth = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    there = {entry["category_id"] for entry in truth["annotations"]}
    kinds = [entry["id"] for entry in truth["categories"]]
    scores = job.evaluate(_FindsNothing())
    assert scores.means["bbox"]["AP"] == 0.0
    np.testing.assert_array_equal(
        scores.by_class["bbox"], [0.0 if kind in there else np.nan for kind in kinds]
    )
    assert len(there) < len(kinds)


def test_exported_boxes_are_in_pixels_of_the_picture(runs, tmp_path):
    """The export's own reading, resizing and scaling against those of eager mode, on a picture
    that is resized unequally; lists of pictures, and batches."""
    for architecture in ("MaskRCNN", "YOLOv3"):
        config, run = runs(architecture)
        job = open_job(config)
        model = job.load(best(run))
        folder = job.export(
            model,
            tmp_path / architecture,
            input_shape=[None, 3, SIDE, SIDE],
            output_op=None,
            model_format="paddle",
        )
        predictor = Predictor(folder, threads=1)
        manifest = predictor.manifest
        batch = 1 if architecture == "MaskRCNN" else None
        assert manifest.input_shape == [batch, 3, SIDE, SIDE]
        assert (manifest.task, manifest.output_op) == ("detection", "nms")
        assert manifest.classes == [str(k) for k in range(10)]
        assert predictor.run(np.zeros((1, 3, SIDE, SIDE), np.float32))[0].shape[1] == 6
        sizes = {}  # width, height
        for number, (height, width) in enumerate(((70, 150), (33, 31), (64, 64))):
            picture = np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)
            sizes[tmp_path / f"{architecture}{number}.png"] = width, height
            Image.fromarray(picture).save(tmp_path / f"{architecture}{number}.png")
        results = predictor([str(path) for path in sizes], batch_size=2)
        for path, result in zip(sizes, results, strict=True):
            expected = job.predict_image(model, path)
            width, height = sizes[path]
            assert len(result) == len(expected) > 0
            np.testing.assert_allclose(result.scores, expected.scores, atol=1e-4)
            same = np.abs(result.boxes - expected.boxes).max(axis=1) < 0.1
            assert same.mean() > 0.95  # others share a score with a neighbour
            assert result.boxes.min() >= -width
            if architecture == "MaskRCNN":
                assert result.masks.shape[1:] == (height, width)
                assert (result.masks == expected.masks)[same].mean() > 0.995


@pytest.mark.parametrize("keep_ratio", [False, True])
@pytest.mark.parametrize("interp", [0, 1, 2, 3])
def test_transforms_are_those_of_paddledetection(keep_ratio, interp, tmp_path):
    specs = [
        {"Decode": {}},
        {"Resize": {"target_size": [50, 91], "keep_ratio": keep_ratio, "interp": interp}},
        {"NormalizeImage": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}},
        {"Permute": {}},
    ]
    pad = [{"PadBatch": {"pad_to_stride": 32}}]
    picture = np.random.default_rng(1).integers(0, 255, (37, 53, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "x.png"), picture[:, :, ::-1])
    sample = {"im_id": np.array([0]), "curr_iter": 0, "im_file": str(tmp_path / "x.png")}
    expected = BatchCompose(pad)([Compose(specs)(sample)])
    found = DetectionTransforms([*specs, *pad])(picture)
    assert set(found) == {"image", "im_shape", "scale_factor"}
    for name, value in found.items():
        np.testing.assert_array_equal(value, np.asarray(expected[name])[0])


@pytest.mark.parametrize(
    ("specs", "tokens"),
    [
        ([{"RandomFlip": {}}, {"Permute": {}}], "RandomFlip Permute"),
        ([{"Resize": {"target_size": 8}}, {"Permute": {}}], "Resize target_size 'keep_ratio'"),
        (
            [{"Resize": {"target_size": [8, 0], "keep_ratio": True}}, {"Permute": {}}],
            "Resize: target_size 0",
        ),
        ([{"NormalizeImage": {"std": [1, 0, 1]}}, {"Permute": {}}], "NormalizeImage: std 1e-06"),
        ([{"Decode": {}}], "transforms: Permute 0"),
    ],
)
def test_transforms_that_deployment_refuses(specs, tokens):
    with raises_naming(ValueError, *tokens.split()):
        DetectionTransforms(specs)


def test_resume_goes_on_as_if_nothing_had_happened(runs, scenes, tmp_path):
    """Four steps at once, or two and then two: the same weights to the bit."""
    config = write_detector(tmp_path / "job.yml", small_detector(scenes, "YOLOv3"))
    common = ("--iters", 4, "--save_interval", 2, "--use_ema")
    assert train(config, tmp_path / "whole", *common) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    run = RunFolder(tmp_path / "parts")
    _, last = list_checkpoints(run.checkpoints)
    shutil.rmtree(last)
    assert train(run.config, tmp_path / "parts", *common, "-r", "auto") == 0
    whole, parts = (
        read_weights(
            list_checkpoints(RunFolder(tmp_path / n).checkpoints)[-1] / "model.safetensors"
        )
        for n in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(parts[name], value)


def test_an_export_that_finds_other_boxes_is_refused(runs, tmp_path, monkeypatch):
    """One weight is changed between the run in eager mode and the graph."""
    from ppvision.deploy.verify.parity import ParityError
    from ppvision.deploy.write import detection_export

    config, run = runs("FCOS")
    job = open_job(config)
    model = job.load(best(run))
    trace = detection_export.trace_detector

    def tampered(layer: paddle.nn.Layer, shape: list) -> paddle.nn.Layer:
        bias = model.fcos_head.fcos_head_reg.bias
        bias.set_value(bias + 0.05)
        return trace(layer, shape)

    monkeypatch.setattr(detection_export, "trace_detector", tampered)
    with raises_naming(ParityError, "NMS", "boxes"):
        job.export(
            model,
            tmp_path / "m",
            input_shape=[1, 3, SIDE, SIDE],
            output_op=None,
            model_format="paddle",
        )
    assert not (tmp_path / "m").exists()


def test_flags_that_are_not_for_detectors(runs, tmp_path, capsys):
    config, run = runs("FCOS")
    where = ("-c", config, "--model_path", best(run))
    assert ppvision("eval", *where, "--aug_eval") == 1
    assert "--aug_eval: segmentation only" in capsys.readouterr().err
    assert ppvision("export", *where, "--save_dir", tmp_path / "m", "--output_op", "softmax") == 1
    assert "a detector's graph ends in NMS" in capsys.readouterr().err
    config, run = runs("FasterRCNN")
    where = ("-c", config, "--model_path", best(run))
    assert ppvision("export", *where, "--save_dir", tmp_path / "m", "--format", "onnx") == 1
    assert "expected a detector of one stage, got FasterRCNN" in capsys.readouterr().err
    shape = ("--input_shape", 2, 3, SIDE, SIDE)
    assert ppvision("export", *where, "--save_dir", tmp_path / "m", *shape) == 1
    assert "expected a batch of 1, got 2" in capsys.readouterr().err
    assert ppvision("eval", *where, "-o", "pretrain_weights=some.pdparams") == 1
    assert "pretrain_weights: is not read here" in capsys.readouterr().err


def test_epochs_with_accumulation(scenes, tmp_path):
    """12 pictures in batches of 4, 3 of them a step: one step an epoch."""
    content = small_detector(scenes, "YOLOv3") | {"accumulate": 3}
    job = open_job(write_detector(tmp_path / "job.yml", content))
    assert (job.steps_per_epoch, job.iters) == (1, 2)


def _one_class(content: dict) -> None:
    content["categories"] = content["categories"][:1]
    for annotation in content["annotations"]:
        annotation["category_id"] = content["categories"][0]["id"]


def test_onnx(scenes, tmp_path):
    """PP-YOLOE of one class in ONNX Runtime, compared by the export itself."""
    copy = _change(scenes, tmp_path, _one_class, ("train", "val"))
    content = small_detector(copy, "YOLOv3") | {"num_classes": 1}
    job = open_job(write_detector(tmp_path / "job.yml", content))
    paddle.seed(0)
    model = job.float_model
    for head in model.yolo_head.pred_cls:
        head.weight.set_value(paddle.randn(head.weight.shape) * 0.5)  # scores of many sizes
    model.eval()
    folder = job.export(
        model,
        tmp_path / "m",
        input_shape=[None, 3, SIDE, SIDE],
        output_op=None,
        model_format="onnx",
    )
    picture = np.random.default_rng(5).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "x.png")
    found, expected = Predictor(folder)(picture), job.predict_image(model, tmp_path / "x.png")
    assert len(found) > 3
    assert np.ptp(found.scores) > 0.01
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-2)


@pytest.mark.openvino
@pytest.mark.openvino_process
@pytest.mark.skipif(not has_openvino(), reason="this build of Paddle has no OpenVINO")
@pytest.mark.parametrize(
    "architecture",
    ["YOLOv3", *(pytest.param(name, marks=pytest.mark.all) for name in ("RetinaNet", "FCOS"))],
)
def test_exported_for_openvino_with_nms_outside(scenes, tmp_path, architecture):
    job = open_job(write_detector(tmp_path / "job.yml", small_detector(scenes, architecture)))
    paddle.seed(0)
    model = job.float_model
    for name, parameter in model.named_parameters():
        # Scores of many sizes, some of them sure.
        if any(part in name for part in ("pred_cls", "retina_cls", "fcos_head_cls")):
            parameter.set_value(paddle.randn(parameter.shape) * 0.5)
    model.eval()
    folder = job.export(
        model,
        tmp_path / "m",
        input_shape=[1, 3, SIDE, SIDE],
        output_op=None,
        model_format="paddle",
    )
    picture = np.random.default_rng(5).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    predictor, other = Predictor(folder), Predictor(folder, use_onednn=False)
    assert (predictor.engine, other.engine) == ("openvino", "native")
    # With NMS for other programs, and up to it for OpenVINO.
    assert {"model.pdmodel", "model.raw.pdmodel"} <= predictor.manifest.files.keys()
    manifest = predictor.manifest
    assert manifest.earlier_format
    assert manifest.nms.kept == other.manifest.nms.kept > 0
    found, expected = predictor(picture), other(picture)
    assert len(found) == len(expected) > 3
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-2)


def test_onnx_of_several_classes_is_refused(runs, tmp_path, capsys):
    config, run = runs("YOLOv3")
    where = "-c", config, "--model_path", best(run), "--save_dir", tmp_path / "m"
    assert ppvision("export", *where, "--format", "onnx") == 1
    assert "expected a detector of one class, got 10" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_panels_of_the_dashboard(runs, scenes):
    """Objects to the left, what was found to the right."""
    config, run = runs("MaskRCNN")
    job = open_job(config)
    panels = job.pictures(job.load(best(run)))
    assert len(panels) == 2
    root = scenes / "images"
    pictures = {
        str(path.relative_to(root).with_suffix("")): path for path in (root / "val").iterdir()
    }
    for name, panel in panels.items():
        assert panel.shape == (56, 2 * 56 + 4, 3)
        assert (panel[:, :56] != read_picture(pictures[name])).any()  # boxes are drawn


# -- bad data --------------------------------------------------------------------------------------


def _change(scenes: Path, folder: Path, change, splits=("train",)) -> Path:
    """The scenes with another annotation file for training, or for these splits."""
    copy = folder / "scenes"
    (copy / "annotations").mkdir(parents=True)
    (copy / "images").symlink_to(scenes / "images")
    for split in ("train", "val"):
        name = f"instances_{split}.json"
        content = json.loads((scenes / "annotations" / name).read_text())
        if split in splits:
            content = change(content) or content
        text = content if isinstance(content, str) else json.dumps(content)
        (copy / "annotations" / name).write_text(text)
    return copy


def _cut(content: dict) -> str:
    return json.dumps(content)[:-200]


def _missing(content: dict) -> None:
    content["images"][0]["file_name"] = "train/nowhere.png"


def _nowhere(content: dict) -> None:
    content["annotations"][0]["image_id"] = 10**6


def _unknown(content: dict) -> None:
    content["annotations"][0]["category_id"] = 99


def _sizes(content: dict) -> None:
    content["images"][0]["width"] += 5


def _few(content: dict) -> None:
    content["categories"].pop()


def _no_box(content: dict) -> None:
    del content["annotations"][0]["bbox"]


def _order(content: dict) -> None:
    content["categories"].reverse()


def _other_names(content: dict) -> None:
    content["categories"][0]["name"] = "nought"


def _wrong_box(content: dict) -> None:
    content["annotations"][0]["bbox"] = [0, 0, "wide", 3]


def _category_twice(content: dict) -> None:
    content["categories"].append(dict(content["categories"][0]))


def _outside(content: dict) -> None:
    content["annotations"][0]["bbox"] = [5000, 5000, 10, 10]


def _before(content: dict) -> None:
    content["annotations"][0]["bbox"] = [-20, 3, 20, 10]


def _crowds(content: dict) -> None:
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1


def _set(kind: str, name: str, value: object):
    def change(content: dict) -> None:
        content[kind][0][name] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_category_twice, "1 category ids are there twice: [01]"),
        (_outside, r"1 boxes lie outside their image: annotation 1: \[5000.* in 56x56"),
        (_before, "1 boxes lie outside their image"),
        (_crowds, "expected objects, got crowds, ignored ones and boxes without an area"),
        (_set("images", "id", "a"), r"images\[0\]: id: expected a whole number, got 'a'"),
        (_set("images", "width", None), r"images\[0\]: width: expected a whole number above 0"),
        (_set("images", "file_name", 5), r"images\[0\]: file_name: expected text, got 5"),
        (_set("annotations", "category_id", [1]), r"category_id: expected a whole number, got"),
        (_set("annotations", "area", "12"), r"annotations\[0\]: area: expected a number"),
        (_set("annotations", "iscrowd", "no"), r"annotations\[0\]: iscrowd: expected 0 or 1"),
        (_set("categories", "name", 3), r"categories\[0\]: name: expected text, got 3"),
        (_cut, "cannot be read as JSON"),
        (_missing, "1 images are missing: .*nowhere.png"),
        (_nowhere, "1 annotations belong to no image: annotation 1: image_id 1000000"),
        (_unknown, "a category that is not there: annotation 1: category_id 99"),
        (_sizes, "another size than the file says: .*expected 61x56, got 56x56"),
        (_few, "expected 10 categories, as num_classes says, got 9"),
        (_no_box, "annotations.0.: expected .*got no bbox"),
        (_wrong_box, "boxes are not .x, y, width, height."),
        (_order, "categories in the order of their ids"),
        (_other_names, "expected the categories of TrainDataset"),
    ],
)
def test_bad_annotations_stop_before_training(scenes, tmp_path, capsys, change, says):
    copy = _change(scenes, tmp_path, change)
    config = write_detector(tmp_path / "job.yml", small_detector(copy, "YOLOv3"))
    assert train(config, tmp_path / "run", "--iters", 1) == 1
    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


_RUNS = {"size": [56, 56], "counts": [56 * 56]}


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        ([[1, 1, 5, 1, 5, 5, 1]], "annotation 1: a polygon of 7 numbers"),
        ([[1, 1, 5, 1, 5, "5"]], "annotation 1: a polygon of 6 numbers"),
        ([1, 1, 5, 1, 5, 5], "annotation 1: 1 in place of a polygon"),
        ("mask.png", "annotation 1: 'mask.png'"),
        ({**_RUNS, "size": [56, 50]}, r"annotation 1: run lengths of size \[56, 50\]"),
        ({**_RUNS, "counts": [7]}, "annotation 1: run lengths that do not fill the image"),
        ({**_RUNS, "counts": "zzz!!"}, "annotation 1: compressed run lengths that are damaged"),
        ({**_RUNS, "counts": 4}, "annotation 1: run lengths 4"),
    ],
    ids=str,
)
def test_bad_masks_stop_before_training(scenes, tmp_path, capsys, mask, says):
    copy = _change(scenes, tmp_path, _set("annotations", "segmentation", mask))
    config = write_detector(tmp_path / "job.yml", small_detector(copy, "MaskRCNN"))
    assert train(config, tmp_path / "run", "--iters", 1) == 1
    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_run_lengths_are_read_as_pycocotools_writes_them():
    from pycocotools import mask as coco

    random = np.random.default_rng(0)
    for share in (0.0, 0.01, 0.5, 1.0):
        for shape in ((1, 1), (7, 9), (300, 200)):
            mask = (random.uniform(size=shape) < share).astype(np.uint8)
            mask[shape[0] // 2 :, : shape[1] // 3] = 1
            flat = mask.ravel(order="F")
            edges = np.flatnonzero(np.diff(flat)) + 1
            expected = np.diff([0, *edges, flat.size]).tolist()
            expected = expected if flat[0] == 0 else [0, *expected]
            text = coco.encode(np.asfortranarray(mask))["counts"].decode()
            assert expand_run_lengths(text) == expected
            if len(text) > 1:
                cut = text[:-1]
                assert _lengths_or_none(cut) != expected


def _lengths_or_none(text: str) -> list[int] | None:
    try:
        return expand_run_lengths(text)
    except ValueError:
        return None


@pytest.mark.parametrize("architecture", ["YOLOv3", "MaskRCNN", "RetinaNet"])
def test_training_on_pictures_without_objects(scenes, tmp_path, architecture):
    """With `allow_empty`: a few pictures with objects, and batches without any."""

    def few(content: dict) -> None:
        kept = content["images"][0]["id"]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] == kept]

    copy = _change(scenes, tmp_path, few)
    content = small_detector(copy, architecture)
    content["TrainDataset"]["!COCODataSet"]["allow_empty"] = True
    config = write_detector(tmp_path / "job.yml", content)
    code = ppvision(
        *("train", "-c", config, "--save_dir", tmp_path / "run", "--iters", 3, "--log_iters", 1)
    )
    assert code == 0
    losses = [
        value for _, tag, value in read_metrics(tmp_path / "run/metrics.csv") if tag == "Train/loss"
    ]
    assert len(losses) == 3
    assert np.isfinite(losses).all()


def test_masks_of_a_batch_are_those_of_each_picture(runs):
    """One picture in which something is found beside one in which nothing is, in both orders."""
    config, run = runs("MaskRCNN")
    job = open_job(config)
    model = job.load(best(run))
    files = sorted((Path(job.content["EvalDataset"]["dataset_dir"]) / "images/val").iterdir())
    top = [job.predict_image(model, file).scores.max(initial=0) for file in files]
    low, high = np.argsort(top)[[0, -1]]
    assert top[low] < top[high]
    threshold = float((top[low] + top[high]) / 2)
    job = open_job(config, [f"BBoxPostProcess.nms.score_threshold={threshold}"])
    model = job.load(best(run))
    model.eval()
    alone = job.predict_image(model, files[high])
    assert len(alone)
    read, batched = job._reading
    decoded = detection._decoded
    for order in ((low, high), (high, low)):
        samples = [
            read({"im_id": np.array([0]), "curr_iter": 0, **decoded(read_picture(files[k]))})
            for k in order
        ]
        batch = batched(samples)
        found = model({key: paddle.to_tensor(batch[key]) for key in job.example})
        assert found["mask"].shape[0] == found["bbox"].shape[0] == len(alone) + 1
        real = found["bbox"].numpy()[:, 1] > 0
        # After two steps masks lie near their threshold, and rounding moves a pixel of a hundred.
        assert ((found["mask"].numpy()[real] > 0) != alone.masks).mean() < 0.02


def test_mask_heads_need_masks(scenes, tmp_path, capsys):
    content = small_detector(scenes, "MaskRCNN")
    content["TrainDataset"]["!COCODataSet"]["data_fields"] = ["image", "gt_bbox", "gt_class"]
    config = write_detector(tmp_path / "job.yml", content)
    assert train(config, tmp_path / "run", "--iters", 1) == 1
    assert "TrainDataset: expected gt_poly among data_fields" in capsys.readouterr().err


def test_samples_that_do_not_stack_are_an_error(runs, scenes, tmp_path, capsys):
    """Boxes of several pictures in one batch: Paddle's own loader would hang."""
    config, run = runs("YOLOv3")
    options = ["EvalDataset.data_fields=[image, gt_bbox, gt_class]"]
    options += ["EvalDataset.anno_path=annotations/instances_train.json"]  # of many numbers
    assert ppvision("eval", "-c", config, "--model_path", best(run), "-o", *options) == 1
    assert "do not form a batch" in capsys.readouterr().err


def test_category_ids_with_gaps_and_pictures_without_objects(scenes, tmp_path):
    """Classes go by the order of the ids."""

    def change(content: dict) -> None:
        for entry in content["categories"]:
            entry["id"] = 7 * entry["id"] + 3
        for entry in content["annotations"]:
            entry["category_id"] = 7 * entry["category_id"] + 3
        empty = content["images"][0]["id"]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != empty]

    copy = _change(scenes, tmp_path, change)
    content = small_detector(copy, "YOLOv3")
    options = dict(content["TrainDataset"]["!COCODataSet"])
    del options["data_fields"]
    content["EvalDataset"] = {"!COCODataSet": options}
    config = write_detector(tmp_path / "job.yml", content)
    assert train(config, tmp_path / "run", "--iters", 1) == 0
    job = open_job(config)
    assert job.class_names == [str(k) for k in range(10)]
    assert len(job.evaluate(job.load(best(tmp_path / "run"))).by_class["bbox"]) == 10


# -- Pascal VOC ------------------------------------------------------------------------------------

VOC_OBJECT = (
    "<object><name>{}</name><difficult>0</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


@pytest.fixture
def voc(scenes, tmp_path):
    """The scenes' val split as Pascal VOC, and a config for it."""
    root = tmp_path / "voc"
    root.mkdir()
    (root / "images").symlink_to(scenes / "images")
    truth = COCO(str(scenes / "annotations" / "instances_val.json"))
    names = {c["id"]: c["name"] for c in truth.loadCats(truth.getCatIds())}
    (root / "classes.txt").write_text("\n".join(names.values()))
    lines = []
    for image in truth.loadImgs(truth.getImgIds()):
        objects = [
            VOC_OBJECT.format(names[a["category_id"]], x, y, x + w, y + h)
            for a in truth.loadAnns(truth.getAnnIds(image["id"]))
            for x, y, w, h in [a["bbox"]]
        ]
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
        name = f"{image['id']}.xml"
        (root / name).write_text(f"<annotation>{size}{''.join(objects)}</annotation>")
        lines.append(f"images/{image['file_name']} {name}")
    (root / "val.txt").write_text("\n".join(lines))
    content = small_detector(scenes, "YOLOv3")
    content["metric"] = "VOC"
    content["map_type"] = "integral"
    content["EvalDataset"] = {
        "!VOCDataSet": {
            "dataset_dir": str(root),
            "image_dir": ".",
            "anno_path": "val.txt",
            "label_list": "classes.txt",
            "data_fields": ["image", "gt_bbox", "gt_class", "difficult"],
        }
    }
    return write_detector(tmp_path / "voc.yml", content), root


def test_voc_scores(voc, runs, tmp_path, capsys):
    """A model that finds exactly the objects has mAP 1; a real one some number, twice the same."""
    config, _ = voc
    _, run = runs("YOLOv3")
    job = open_job(config)

    class Oracle(paddle.nn.Layer):
        def forward(self, batch: dict) -> dict:
            rows, counts = [], []
            for boxes, classes, scale in zip(
                batch["gt_bbox"], batch["gt_class"], batch["scale_factor"], strict=True
            ):
                down, across = scale.numpy()
                rows += [
                    [float(k[0]), 1.0, *(box / [across, down, across, down])]
                    for box, k in zip(boxes.numpy(), classes.numpy(), strict=True)
                ]
                counts.append(len(boxes))
            return {"bbox": np.float32(rows), "bbox_num": np.int32(counts)}

    scores = job.evaluate(Oracle())
    assert scores.means == {"bbox": {"mAP": 1.0}}
    occurring = scores.by_class["bbox"][~np.isnan(scores.by_class["bbox"])]
    assert len(occurring) > 1
    assert (occurring == 1.0).all()

    assert job.class_names == [str(k) for k in range(10)]
    capsys.readouterr()
    assert ppvision("eval", "-c", config, "--model_path", best(run)) == 0
    assert "bbox: mAP" in capsys.readouterr().out


def _no_xml(root: Path) -> None:
    (root / "1.xml").unlink()


def _half_xml(root: Path) -> None:
    (root / "1.xml").write_text("<annotation><size>")


def _strange(root: Path) -> None:
    text = (root / "2.xml").read_text()
    (root / "2.xml").write_text(text.replace("<name>", "<name>x", 1))


def _other_width(root: Path) -> None:
    text = (root / "2.xml").read_text()
    (root / "2.xml").write_text(text.replace("<width>56", "<width>320"))


def _one_word(root: Path) -> None:
    (root / "val.txt").write_text("images/1.png")


def _no_list(root: Path) -> None:
    (root / "val.txt").unlink()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_no_xml, "1 files are missing: .*1.xml"),
        (_half_xml, "1 XML files have no size or boxes"),
        (_strange, "a class that is not in the label_list: .*2.xml, object 0: 'x"),
        (_other_width, "1 images have another size than their XML.*: expected 320x56, got 56x56"),
        (_one_word, "1 lines are no image and XML file: line 1"),
        (_no_list, "expected a list of images and XML files, found no file"),
    ],
)
def test_bad_voc_files(voc, runs, capsys, change, says):
    config, root = voc
    change(root)
    _, run = runs("YOLOv3")
    assert ppvision("eval", "-c", config, "--model_path", best(run)) == 1
    assert re.search(says, capsys.readouterr().err)


# -- recipes and several processes -----------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "detection").glob("*.yml")), ids=str)
def test_every_recipe_builds(path, plain_weights):
    job = open_job(path)
    if "slim_config" in job.content:
        assert job.ends
    parameters = sum(p.size for p in job.float_model.parameters())
    expected = {"tiny": 41.4, "small": 67.9, "base": 104.8}  # millions
    for size, millions in expected.items():
        if f"pale_{size}" in path.name:
            assert parameters / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.all
def test_two_processes(scenes, tmp_path):
    """Both hold the same weights at the end, from samples of their own; rank 0 alone writes."""
    content = small_detector(scenes, "YOLOv3")
    content["imports"].append("tests.helpers.report_weights")
    config = write_detector(tmp_path / "job.yml", content)
    done = shell(
        *("bash", ROOT / "scripts" / "train.sh", config, "--save_dir", tmp_path / "run"),
        *("--iters", 2, "--batch_size", 2, "--save_interval", 2),
        NPROC=2,
        LOG_DIR=tmp_path / "logs",
        PYTHONPATH=ROOT,
        PPVISION_REPORT=tmp_path / "report",
    )
    logs = "\n".join(p.read_text() for p in (tmp_path / "logs").glob("workerlog.*"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    first, second = (np.load(tmp_path / f"report.{rank}.npz") for rank in (0, 1))
    assert set(first) == set(second)
    assert not np.array_equal(first["|batch"], second["|batch"])
    for name in first:
        if "|" not in name:
            np.testing.assert_array_equal(first[name], second[name])
    assert best(tmp_path / "run").is_file()
    assert len(list((tmp_path / "run" / "vdl").iterdir())) == 1


def test_metrics_are_written(runs):
    _, run = runs("MaskRCNN")
    with (run / "metrics.csv").open() as file:
        tags = {row["tag"] for row in csv.DictReader(file)}
    assert {"Train/loss", "Train/lr", "Evaluate/mask_AP"} <= tags
