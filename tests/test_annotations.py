"""COCO and VOC annotations as people's tools write them: the check, PaddleDetection's data sets and
its evaluators take the same content."""

import itertools
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.helpers.messages import raises_naming

pytest.importorskip("ppdet", reason="pip install --no-deps paddledet==2.6.0")

from ppvision.data.check.coco import check_coco
from ppvision.data.check.voc import check_voc
from ppvision.data.coco_reading import read_category_names, read_coco
from ppvision.data.voc_reading import read_voc
from ppvision.errors import DataError
from ppvision.tasks import open_job
from ppvision.tasks.detection.job import Detection
from tests.helpers.small_detectors import small_detector, write_detector

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:\s*Non compatible API"),
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
]

WIDTH, HEIGHT = 64, 48  # pixels
BOXES = [[5, 7, 26, 23], [21, 12, 20, 29], [34, 17, 16, 29], [9, 6, 34, 28]]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PPVISION_CACHE", str(tmp_path / "cache"))


def _polygon(box: list) -> list:
    left, top, width, height = box
    right, bottom = left + width, top + height
    return [left, top, right, top, right, bottom, left, bottom]


def coco_content() -> dict:
    """Two pictures with two objects each, of two classes."""
    names = ("a.png", "sub/b.png")
    return {
        "images": [
            {"id": k, "file_name": name, "width": WIDTH, "height": HEIGHT}
            for k, name in enumerate(names, 1)
        ],
        "annotations": [
            {
                "id": k,
                "image_id": 1 + (k - 1) // 2,
                "category_id": 1 + (k - 1) % 2,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                "segmentation": [_polygon(box)],
            }
            for k, box in enumerate(BOXES, 1)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def write_pictures(folder: Path) -> None:
    (folder / "sub").mkdir(parents=True)
    for seed, name in enumerate(("a.png", "sub/b.png")):
        pixels = np.random.default_rng(seed).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)


@pytest.fixture
def root(tmp_path):
    write_pictures(tmp_path / "images")
    (tmp_path / "annotations").mkdir()
    return tmp_path


def write_coco(root: Path, content: dict | bytes) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}.json").write_bytes(data)


def open_coco(root: Path, architecture: str = "YOLOv3") -> Detection:
    config = small_detector(root, architecture)
    config["num_classes"] = 2
    fields = config["TrainDataset"]["!COCODataSet"]["data_fields"]
    config["EvalDataset"]["!COCODataSet"]["data_fields"] = fields
    # Boxes of several pictures make no batch.
    config["EvalReader"]["batch_size"] = 1
    return open_job(write_detector(root / "job.yml", config))


class Oracle(paddle.nn.Layer):
    """Finds exactly these objects.

    Args:
        job: whose EvalDataset says which picture has which number.
        objects: `(class number, box)` pairs by name of the picture's file.
    """

    def __init__(self, job: Detection, objects: dict[str, list]) -> None:
        super().__init__()
        dataset = job._dataset("EvalDataset")
        dataset.allow_empty = True
        dataset.parse_dataset()
        self.found = {}
        for record in dataset.roidbs:
            (name,) = (n for n in objects if record["im_file"].endswith(f"/{n}"))
            self.found[int(record["im_id"][0])] = objects[name]

    def forward(self, batch: dict) -> dict:
        (number,) = batch["im_id"].numpy().reshape(-1)
        found = self.found[int(number)]
        rows = [[k, 0.9, x, y, x + w, y + h] for k, (x, y, w, h) in found]
        masks = []
        for _, box in found:
            runs = mask_utils.merge(mask_utils.frPyObjects([_polygon(box)], HEIGHT, WIDTH))
            masks.append(mask_utils.decode(runs))
        outputs = {
            "bbox": np.array(rows, np.float32).reshape(-1, 6),
            "bbox_num": np.array([len(rows)], np.int32),
        }
        if "gt_poly" in batch:
            outputs["mask"] = np.array(masks, np.int32).reshape(-1, HEIGHT, WIDTH)
        return outputs


TRUTH = {
    "a.png": [(0, BOXES[0]), (1, BOXES[1])],
    "sub/b.png": [(0, BOXES[2]), (1, BOXES[3])],
}


def _without(*places: int) -> dict[str, list]:
    """`TRUTH` without these objects."""
    kept = [k for k in range(4) if k not in places]
    return {
        name: [(k % 2, BOXES[k]) for k in kept if k // 2 == picture]
        for picture, name in enumerate(TRUTH)
    }


def _each(name: str, values):
    def change(content: dict) -> None:
        for entry, value in zip(content["annotations"], values, strict=False):
            entry[name] = value

    return change


def _drop(kind: str, name: str, count: int = 4):
    def change(content: dict) -> None:
        for entry in content[kind][:count]:
            del entry[name]

    return change


def _set(kind: str, place: int, **values: object):
    def change(content: dict) -> None:
        content[kind][place].update(values)

    return change


def _names_as_ids(content: dict) -> None:
    for entry in content["images"]:
        entry["id"] = f"picture {entry['id']}"
    for entry in content["annotations"]:
        entry["image_id"] = f"picture {entry['image_id']}"


def _floats(content: dict) -> None:
    """As a table program writes every number."""
    for entry in itertools.chain(content["images"], content["categories"], content["annotations"]):
        for key, value in entry.items():
            if isinstance(value, int):
                entry[key] = float(value)


def _picture_ids(*ids: int):
    def change(content: dict) -> None:
        for entry, number in zip(content["images"], ids, strict=True):
            for annotation in content["annotations"]:
                if annotation["image_id"] == entry["id"]:
                    annotation["to"] = number
            entry["id"] = number
        for annotation in content["annotations"]:
            annotation["image_id"] = annotation.pop("to")

    return change


def _crowd(content: dict) -> None:
    runs = mask_utils.encode(np.asfortranarray(np.ones((HEIGHT, WIDTH), np.uint8)))
    content["annotations"].append(
        {
            "id": 0,
            "image_id": 1,
            "category_id": 1,
            "bbox": [0, 0, WIDTH, HEIGHT],
            "area": WIDTH * HEIGHT,
            "iscrowd": 1,
            "segmentation": {"size": [HEIGHT, WIDTH], "counts": runs["counts"].decode()},
        }
    )


def _leftover(content: dict) -> None:
    content["images"].append({**content["images"][0], "id": 9, "file_name": "._a.png"})
    content["annotations"].append({**content["annotations"][0], "id": 9, "image_id": 9})


def _windows(content: dict) -> None:
    content["images"][1]["file_name"] = "sub\\b.png"


def _absolute(content: dict, root: Path) -> None:
    content["images"][1]["file_name"] = str(root / "images" / "sub" / ".." / "sub" / "b.png")


def _extra(**values: object):
    def change(content: dict) -> None:
        content["annotations"].append({**content["annotations"][0], "id": 5, **values})

    return change


# What has no pixel by pycocotools.
EMPTY_MASKS = {
    "points in a line": [[1, 1, 5, 5, 9, 9]],
    "level line": [[5, 7, 15, 7, 25, 7]],
    "one point": [[5, 5] * 4],
    "outside": [[70, 70, 80, 70, 80, 80]],
    "far outside": [[-(2**24), 5, -(2**23), 5, -(2**23), 9]],
    "between pixels": [[1.2, 1.2, 1.3, 1.2, 1.3, 1.3]],
    "sliver": [[5.1, 5, 5.2, 5, 5.2, 40, 5.1, 40]],
    "twice round": [_polygon(BOXES[0]) * 2],
    "several": [[5, 5] * 4, [1, 1, 5, 5, 9, 9], [70, 70, 80, 70, 80, 80]],
    "zeros": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]},
    "zeros in parts": {"size": [HEIGHT, WIDTH], "counts": [9, 0, HEIGHT * WIDTH - 9]},
    "compressed zeros": {"size": [HEIGHT, WIDTH], "counts": "PP3"},
}

# What is handled: change, what the log says, objects that are left out of the truth.
HANDLED = {
    "ids from 0": (_each("id", [0, 1, 2, 3]), "annotation ids", ()),
    "negative ids": (_each("id", [-4, -3, -2, -1]), "annotation ids", ()),
    "ids as text": (_each("id", ["a", "b", "c", "0"]), "annotation ids", ()),
    "ids as fractions": (_each("id", [0.5, 1.5, 2.5, 3.5]), "annotation ids", ()),
    "no number can hold them": (_each("id", [2**53 + k for k in range(4)]), "annotation ids", ()),
    "ids twice": (_each("id", [7, 7, 7, 8]), "3 annotation ids|2 annotation ids", ()),
    "no ids": (_drop("annotations", "id"), "4 annotation ids", ()),
    "strange ids": (_each("id", [None, [], {}, True]), "4 annotation ids", ()),
    "picture ids from 0": (_picture_ids(0, 1), "", ()),
    "negative picture ids": (_picture_ids(-5, -1), "", ()),
    "large picture ids": (_picture_ids(2**52, 3), "", ()),
    "image ids as text": (_names_as_ids, "2 image ids are text", ()),
    "floats": (_floats, "", ()),
    "no iscrowd": (_drop("annotations", "iscrowd"), "4 annotations have no iscrowd", ()),
    "no area": (_drop("annotations", "area"), "4 annotations have no area", ()),
    "iscrowd as a boolean": (_each("iscrowd", [False, False, 0.0, None]), "", ()),
    "crowd": (_crowd, "", ()),
    "flat box": (_extra(bbox=[3, 3, 0, 5]), "1 boxes have no area", ()),
    "box that rounds to nothing": (_extra(bbox=[3, 3, 1e-4, 9]), "1 boxes have no area", ()),
    "all zero box": (_extra(bbox=[0, 0, 0, 0], area=0), "1 boxes have no area", ()),
    "no area in a good box": (_set("annotations", 3, area=0), "1 boxes have no area", (3,)),
    "tracks": (_each("track_id", [1, "x", None, 2**40]), "3 annotations have a track_id", ()),
    "leftovers": (_leftover, "1 images are what tools leave behind", ()),
    "windows": (_windows, "", ()),
    "unused keys": (_each("keypoints", [[], None, "x", [1, 2, 0]]), "", ()),
    "bytes that are no UTF-8": (None, "", ()),
    "byte order mark": (None, "", ()),
    "utf-16": (None, "", ()),
    "absolute": (None, "", ()),
}
# Of masks alone: a box detector learns these objects' boxes.
EMPTY = {
    f"mask: {name}": (_extra(segmentation=mask), "1 objects have no pixel of a mask", ())
    for name, mask in EMPTY_MASKS.items()
}


def _written(root: Path, name: str) -> None:
    content = coco_content()
    change = (HANDLED | EMPTY)[name][0]
    data: dict | bytes = content
    if change is not None:
        change(content)
    elif name == "absolute":
        _absolute(content, root)
    elif name == "byte order mark":
        data = b"\xef\xbb\xbf" + json.dumps(content).encode()
    elif name == "utf-16":
        data = json.dumps(content).encode("utf-16")
    else:
        picture = os.fsdecode("图.png".encode("gbk"))
        os.rename(root / "images" / "sub" / "b.png", root / "images" / "sub" / picture)
        content["images"][1]["file_name"] = "sub/PLACE"
        data = json.dumps(content).encode().replace(b"PLACE", os.fsencode(picture))
    write_coco(root, data)


# A box detector takes all of them; with masks by default those that change what is left.
WITH_MASKS = ("ids from 0", "strange ids", "crowd", "flat box", "leftovers", "image ids as text")
CASES = [pytest.param(name, "YOLOv3", id=name) for name in HANDLED]
CASES += [
    pytest.param(
        *(name, "MaskRCNN"),
        id=f"{name}-masks",
        marks=[] if name in WITH_MASKS else pytest.mark.all,
    )
    for name in HANDLED
]
CASES += [pytest.param(name, "MaskRCNN", id=name) for name in EMPTY]


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_predictions_equal_to_the_truth_score_one(root, name, architecture, caplog):
    """Through the check, PaddleDetection's data set and readers, and its evaluation."""
    _written(root, name)
    job = open_coco(root, architecture)
    with caplog.at_level(logging.INFO, logger="ppvision"):
        job.check_data("train_dataset", "val_dataset")
    _, says, dropped = (HANDLED | EMPTY)[name]
    assert re.search(says, caplog.text)
    truth = _without(*dropped)
    if name == "bytes that are no UTF-8":
        truth[os.fsdecode("图.png".encode("gbk"))] = truth.pop("sub/b.png")
    scores = job.evaluate(Oracle(job, truth))
    kinds = ["bbox", "mask"] if architecture == "MaskRCNN" else ["bbox"]
    assert list(scores.means) == kinds
    for kind in kinds:
        for mean in ("AP", "AP50", "AP75"):
            assert scores.means[kind][mean] == pytest.approx(1.0, abs=1e-6)
        np.testing.assert_allclose(scores.by_class[kind], 1.0, atol=1e-6)
    samples = job.train_dataset
    learned = [sum(len(samples.dataset.roidbs[k]["gt_bbox"]) for k in range(len(samples)))]
    assert learned == [sum(map(len, truth.values()))]
    if name != "bytes that are no UTF-8":  # which OpenCV does not open by name
        batch = job.batched([samples[k] for k in range(len(samples))])
        assert len(batch["image"]) == len(samples)


def test_the_oracle_can_be_wrong(root):
    """The test above fails where an object is missed."""
    write_coco(root, coco_content())
    job = open_coco(root)
    assert job.evaluate(Oracle(job, _without(0))).means["bbox"]["AP"] < 0.9


def test_annotation_id_0_scored_wrong_before(root):
    """What is repaired: pycocotools itself on the file as it is."""
    content = coco_content()
    _each("id", [0, 1, 2, 3])(content)
    path = root / "a.json"
    path.write_text(json.dumps(content))
    found = [
        {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for a in content["annotations"]
    ]

    def average_precision(truth: COCO) -> float:
        scored = COCOeval(truth, truth.loadRes([dict(f) for f in found]), "bbox")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
        return scored.stats[0]

    assert average_precision(COCO(str(path))) < 0.99
    repaired = COCO()
    repaired.dataset = read_coco(path, root / "images").content
    repaired.createIndex()
    assert average_precision(repaired) == pytest.approx(1.0)


def test_paddledetections_own_trainer_evaluates_the_same(root):
    """Its data set and metric alone, after the plug-in's import: ids from 0."""
    from ppdet.data.source.coco import COCODataSet
    from ppdet.metrics import COCOMetric

    content = coco_content()
    _each("id", [0, 1, 2, 3])(content)
    write_coco(root, content)
    dataset = COCODataSet(str(root), "images", "annotations/instances_val.json", allow_empty=True)
    dataset.parse_dataset()
    metric = COCOMetric(dataset.get_anno(), output_eval=str(root / "out"))
    rows = [[k, 0.9, x, y, x + w, y + h] for name in TRUTH for k, (x, y, w, h) in TRUTH[name]]
    inputs = {"im_id": np.array([[1], [2]])}
    metric.update(inputs, {"bbox": np.float32(rows), "bbox_num": np.int32([2, 2])})
    metric.accumulate()
    assert metric.get_results()["bbox"][0] == pytest.approx(1.0)
    dataset.parse_dataset()  # again: the copy is what is read
    assert len(dataset.roidbs) == 2


def test_an_ordinary_file_is_read_as_it_is(root):
    """No copy is made, and the content is that of the file."""
    from ppdet.data.source.coco import COCODataSet

    write_coco(root, coco_content())
    path = root / "annotations" / "instances_val.json"
    found = read_coco(path, root / "images", masks=True)
    assert found.content == coco_content()
    assert (found.changed, found.problems, found.notes) == (False, [], [])
    dataset = COCODataSet(str(root), "images", "annotations/instances_val.json")
    dataset.parse_dataset()
    assert Path(dataset.get_anno()) == path


def test_a_file_of_another_suffix(root):
    """PaddleDetection asserts `.json`."""
    write_coco(root, coco_content())
    for name in ("train.JSON", "train"):
        (root / "annotations" / name).write_text(json.dumps(coco_content()))
        config = small_detector(root, "YOLOv3")
        config["num_classes"] = 2
        config["TrainDataset"]["!COCODataSet"]["anno_path"] = f"annotations/{name}"
        job = open_job(write_detector(root / "job.yml", config))
        job.check_data("train_dataset")
        assert len(job.train_dataset) == 2


def test_pictures_without_annotations_stay_what_paddledetection_makes_of_them(root):
    """A file without the key `annotations` names pictures alone."""
    from ppdet.data.source.coco import COCODataSet

    content = coco_content()
    del content["annotations"]
    write_coco(root, content)
    dataset = COCODataSet(str(root), "images", "annotations/instances_val.json")
    dataset.parse_dataset()
    assert len(dataset.roidbs) == 2
    with pytest.raises(DataError, match="'annotations'"):
        check_coco("x", root / "annotations/instances_val.json", root / "images", 2)


def test_copies_go_with_the_process(root):
    """And a process that was forked from it leaves them alone."""
    content = coco_content()
    _each("id", [0, 1, 2, 3])(content)
    write_coco(root, content)
    code = (
        "import os, sys, ppvision.plugins.paddledet\n"
        "from ppdet.data.source.coco import COCODataSet\n"
        f"d = COCODataSet({str(root)!r}, 'images', 'annotations/instances_val.json')\n"
        "d.parse_dataset()\n"
        "if not (child := os.fork()):\n"
        "    sys.exit(0)\n"
        "os.waitpid(child, 0)\n"
        "assert os.path.isfile(d.get_anno())\n"
        "print('copy:' + d.get_anno())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(root)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("copy:"))
    assert line.startswith(f"copy:{root}/ppvision-")
    assert not list(root.glob("ppvision-*"))


# -- masks -----------------------------------------------------------------------------------------


def test_polygons_of_fewer_than_three_points(root, caplog):
    """Dropped beside good ones; an object without any polygon left goes from both sides."""
    content = coco_content()
    content["annotations"][0]["segmentation"] += [[10, 10, 11, 10], []]
    content["annotations"][1]["segmentation"].insert(0, [10, 10, 11, 10])  # taken for a box
    for place, mask in ((2, [[10, 10, 11, 10]]), (3, [])):
        content["annotations"][place]["segmentation"] = mask
    content["annotations"].append({**content["annotations"][0], "id": 5, "segmentation": None})
    content["annotations"].append({**content["annotations"][0], "id": 6})
    del content["annotations"][-1]["segmentation"]
    write_coco(root, content)
    job = open_coco(root, "MaskRCNN")
    with caplog.at_level(logging.INFO, logger="ppvision"):
        job.check_data("train_dataset", "val_dataset")
    assert "4 polygons have fewer than three points" in caplog.text
    assert "4 objects have no pixel of a mask" in caplog.text
    scores = job.evaluate(Oracle(job, _without(2, 3)))
    for kind in ("bbox", "mask"):
        assert scores.means[kind]["AP"] == pytest.approx(1.0)
    (record,) = job.train_dataset.dataset.roidbs
    assert [len(polygons) for polygons in record["gt_poly"]] == [1, 1]


def test_a_box_detector_keeps_boxes_whose_masks_are_damaged(root):
    """PaddleDetection's reader lost its place at an empty mask: boxes became zeros."""
    content = coco_content()
    for place, mask in enumerate(([[]], [], None, "mask.png")):
        content["annotations"][place]["segmentation"] = mask
    write_coco(root, content)
    job = open_coco(root)
    job.check_data("train_dataset", "val_dataset")
    assert job.evaluate(Oracle(job, TRUTH)).means["bbox"]["AP"] == pytest.approx(1.0)
    found = np.concatenate([r["gt_bbox"] for r in job.train_dataset.dataset.roidbs])
    expected = [[x, y, x + w, y + h] for x, y, w, h in BOXES]
    np.testing.assert_array_equal(found, expected)


def test_masks_of_few_pixels_stay(root):
    """What the corners' area alone does not tell from an empty mask."""
    content = coco_content()
    masks = (
        [[5, 5, 25, 25, 25, 5, 5, 25]],  # a bow tie
        [[5, 5] * 4, [5, 5, 6, 5, 6, 6, 5, 6]],  # a point, and one pixel
        {"size": [HEIGHT, WIDTH], "counts": [9, 1, HEIGHT * WIDTH - 10]},
        [[-(2**24), -(2**24), 2**24, -(2**24), 2**24, 2**24]],  # an edge that takes seconds
    )
    for place, mask in enumerate(masks):
        content["annotations"][place]["segmentation"] = mask
    path = root / "a.json"
    path.write_text(json.dumps(content))
    found = read_coco(path, root / "images", masks=True)
    assert (found.objects, found.notes) == (4, [])
    assert found.content == content


def test_polygons_alone_are_needed_where_masks_are_learned(root):
    content = coco_content()
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[1, 1, 2, 2]]
    write_coco(root, content)
    with raises_naming(DataError, "instances_train.json", "objects"):
        open_coco(root, "MaskRCNN").check_data("train_dataset")
    open_coco(root).check_data("train_dataset")


# -- what is refused -------------------------------------------------------------------------------

REFUSED = {
    "text beside numbers": (_set("images", 0, id="1"), "images[0] id '1'"),
    "picture ids twice": (_set("images", 1, id=1), "image ids twice"),
    "picture of text": (_set("annotations", 0, image_id="1"), "image_id '1'"),
    "picture true": (_set("annotations", 0, image_id=True), "image_id True"),
    "picture list": (_set("annotations", 0, image_id=[1]), "annotations[0] image_id [1]"),
    "category text": (_set("categories", 0, id="cat"), "categories[0] id 'cat'"),
    "category large": (_set("categories", 1, id=2**60), "categories[1] id"),
    "category bytes": (_set("categories", 0, name="\udce9"), "categories[0] name UTF-8"),
    "no box": (_drop("annotations", "bbox", 1), "annotations[0]: bbox"),
    "box of text": (_set("annotations", 0, bbox=["1", 2, 3, 4]), "boxes '1'"),
    "box of five": (_set("annotations", 0, bbox=[1, 2, 3, 4, 5]), "boxes 5]"),
    "box without end": (_set("annotations", 0, bbox=[1, 2, float("inf"), 4]), "boxes inf"),
    "box too wide for float32": (_set("annotations", 0, bbox=[1, 2, 1e30, 4]), "boxes 1e+30"),
    "size of text": (_set("images", 0, width="64"), "images[0] width '64'"),
    "size of halves": (_set("images", 0, width=63.5), "images[0] width 63.5"),
    "no size": (_drop("images", "height", 1), "images[0]: height"),
    "file of nothing": (_set("images", 0, file_name=""), "images missing"),
    "file with a zero": (_set("images", 0, file_name="a\0b"), "images missing"),
    "file of a kilometre": (_set("images", 0, file_name="x" * 10**5), "images missing"),
    "iscrowd as text": (_set("annotations", 0, iscrowd="0"), "annotations[0] iscrowd '0'"),
    "area as text": (_set("annotations", 0, area="9"), "annotations[0] area '9'"),
    "area of nothing": (_set("annotations", 0, area=float("nan")), "annotations[0] area nan"),
    "all ignored": (_each("ignore", [1] * 4), "objects ignored"),
    "no categories": (lambda content: content.pop("categories"), "'categories'"),
    "no annotations": (lambda content: content.pop("annotations"), "'annotations'"),
    "no images": (lambda content: content.update(images=[], annotations=[]), "images none"),
    "a list of text": (lambda content: content.update(images=["a"]), "'images'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_report(root, name):
    change, tokens = REFUSED[name]
    content = coco_content()
    change(content)
    write_coco(root, content)
    job = open_coco(root)
    with raises_naming(DataError, *tokens.split()) as caught:
        job.check_data("train_dataset")
    assert len(str(caught.value)) < 1500
    assert "instances_train.json" in str(caught.value)
    if lacked := {"no box": "bbox", "no size": "height"}.get(name):
        # Among what was expected, and as what is not there.
        assert str(caught.value).count(lacked) == 2


def test_all_kinds_in_one_report(root):
    content = coco_content()
    _set("images", 0, width="64")(content)
    _set("annotations", 2, bbox=[1])(content)
    _set("annotations", 3, category_id=9)(content)
    content["categories"].append({"id": 2, "name": "bird"})
    write_coco(root, content)
    with pytest.raises(DataError) as caught:
        open_coco(root).check_data("train_dataset")
    for token in ("width: expected", "boxes are not", "category_id 9", "ids are there twice"):
        assert token in str(caught.value)


def test_run_lengths_without_an_end(root):
    content = coco_content()
    content["annotations"][0]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": "o" * 10**6}
    write_coco(root, content)
    with pytest.raises(DataError, match="damaged"):
        open_coco(root, "MaskRCNN").check_data("train_dataset")


def test_class_names(root):
    write_coco(root, b"\xef\xbb\xbf" + json.dumps(coco_content()).encode())
    assert open_coco(root).class_names == ["cat", "dog"]
    assert read_category_names(root / "annotations/instances_val.json") == ["cat", "dog"]


# -- Pascal VOC ------------------------------------------------------------------------------------

DIFFICULT = {
    "0": False,
    "1": True,
    " 1 ": True,
    "Unspecified": False,
    "": False,
    "False": False,
    "True": True,
    "no": False,
    "YES": True,
    "2": True,
    "0.0": False,
    None: False,
}


def voc_object(name: str, box: list, difficult: str | None = "0", more: str = "") -> str:
    x, y, w, h = box
    flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    edges = f"<ymax>{y + h}</ymax><xmax>{x + w}</xmax><ymin>{y}</ymin><xmin>{x}</xmin>"
    return f"<object>{more}<bndbox>{edges}</bndbox>{flag}<name>{name}</name></object>"


def voc_text(*objects: str) -> str:
    size = f"<size><depth>3</depth><height>{HEIGHT}</height><width>{WIDTH}</width></size>"
    return f"<annotation><id>0</id>{''.join(objects)}{size}</annotation>"


@pytest.fixture
def voc(root):
    """Two pictures with two objects each, written as tools on Windows do."""
    (root / "xml").mkdir()
    for name, start in (("a", 0), ("b", 2)):
        objects = [voc_object(("cat", "dog")[k], BOXES[start + k]) for k in range(2)]
        (root / "xml" / f"{name}.xml").write_text(voc_text(*objects))
    lines = "images/a.png\txml/a.xml\r\n\r\nimages\\sub\\b.png   xml\\b.xml\r\n\r\n"
    (root / "list.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (root / "labels.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n\r\n")
    return root


def open_voc(root: Path, **options: object) -> Detection:
    config = small_detector(root, "YOLOv3")
    config.update(metric="VOC", map_type="integral", num_classes=2)
    options = {
        "dataset_dir": str(root),
        "image_dir": ".",
        "anno_path": "list.txt",
        "label_list": "labels.txt",
        "data_fields": ["image", "gt_bbox", "gt_class", "difficult"],
        **options,
    }
    config["TrainDataset"] = config["EvalDataset"] = {"!VOCDataSet": options}
    config["EvalReader"]["batch_size"] = 1
    return open_job(write_detector(root / "job.yml", config))


def test_voc_as_tools_write_it(voc):
    job = open_voc(voc)
    job.check_data("train_dataset", "val_dataset")
    assert job.class_names == ["cat", "dog"]
    scores = job.evaluate(Oracle(job, TRUTH))
    assert scores.means == {"bbox": {"mAP": 1.0}}
    assert len(job.batched([job.train_dataset[k] for k in range(2)])["image"]) == 2


@pytest.mark.parametrize("text", DIFFICULT)
def test_every_form_of_difficult(voc, text, caplog):
    """An object that is difficult is not missed where a model does not find it."""
    objects = [voc_object("cat", BOXES[0]), voc_object("dog", BOXES[1], text)]
    (voc / "xml" / "a.xml").write_text(voc_text(*objects))
    job = open_voc(voc)
    with caplog.at_level(logging.INFO, logger="ppvision"):
        job.check_data("train_dataset", "val_dataset")
    counted = (text or "").strip() not in ("0", "1")
    assert ("1 objects have no `difficult`, or one that is not 0 or 1" in caplog.text) is counted
    record = job.train_dataset.dataset.roidbs[0]
    np.testing.assert_array_equal(record["difficult"], [[0], [DIFFICULT[text]]])
    missed = job.evaluate(Oracle(job, _without(1))).means["bbox"]["mAP"]
    assert (missed == 1.0) is DIFFICULT[text]


@pytest.mark.parametrize("text", ["maybe", "nan", "inf", "0x1", "\u00b2"])
def test_a_difficult_that_says_nothing(voc, text):
    (voc / "xml" / "b.xml").write_text(voc_text(voc_object("cat", BOXES[0], text)))
    with raises_naming(DataError, "`difficult`", "b.xml", "0", repr(text)):
        open_voc(voc).check_data("train_dataset")


def test_records_are_those_of_paddledetection(voc):
    """On files that PaddleDetection's own reader takes: the same records to the bit."""
    from ppdet.data.source.voc import VOCDataSet

    boxes = [[-3, -2, 20, 20], [50, 30, 40, 40], [5.5, 6.25, 10, 10], [70, 5, 10, 10]]
    objects = [voc_object("dog", box, str(k % 2)) for k, box in enumerate(boxes)]
    (voc / "xml" / "a.xml").write_text(voc_text(*objects).replace("<id>0</id>", ""))
    (voc / "xml" / "b.xml").write_text(voc_text().replace("<id>0</id>", ""))
    (voc / "plain.txt").write_text("images/a.png xml/a.xml\nimages/sub/b.png xml/b.xml\n")
    (voc / "plain_labels.txt").write_text("cat\ndog\n")
    fields = ["image", "gt_bbox", "gt_class", "difficult", "gt_score"]
    given = (str(voc), "", "plain.txt", fields, -1, "plain_labels.txt", True)
    code = (
        "import pickle, sys\n"
        "from ppdet.data.source.voc import VOCDataSet\n"
        f"dataset = VOCDataSet(*{given!r})\n"
        "dataset.parse_dataset()\n"
        f"pickle.dump(dataset.roidbs, open({str(voc / 'theirs')!r}, 'wb'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    theirs = np.load(voc / "theirs", allow_pickle=True)
    dataset = VOCDataSet(*given)
    dataset.parse_dataset()
    assert len(dataset.roidbs) == len(theirs) == 2
    for ours, other in zip(dataset.roidbs, theirs, strict=True):
        assert ours.keys() == other.keys()
        assert Path(ours.pop("im_file")) == Path(other.pop("im_file"))
        for key, value in other.items():
            np.testing.assert_array_equal(ours[key], value)
            assert np.asarray(ours[key]).dtype == np.asarray(value).dtype
    assert len(theirs[0]["gt_bbox"]) == 3  # one lies outside


def test_an_xmls_id_is_no_number_of_a_picture(voc):
    """Tools leave it at 0: the pictures of an exported detector were mixed up."""
    dataset = open_voc(voc)._dataset("EvalDataset")
    dataset.parse_dataset()
    assert [int(record["im_id"][0]) for record in dataset.roidbs] == [0, 1]


VOC_TEXTS = {
    "namespace": voc_text(voc_object("cat", BOXES[2]), voc_object("dog", BOXES[3])).replace(
        "<annotation>", '<annotation xmlns="http://example.org/voc">'
    ),
    "blanks around names": voc_text(
        voc_object("\n cat ", BOXES[2]), voc_object("\tdog\n", BOXES[3])
    ),
    "parts": voc_text(
        voc_object(
            "cat",
            BOXES[2],
            more="<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>",
        ),
        voc_object("dog", BOXES[3]),
    ),
    "attributes": voc_text(
        voc_object("cat", BOXES[2]).replace("<object>", '<object id="3" b="x">'),
        voc_object("dog", BOXES[3]),
    ),
    "a declared encoding": '\n<?xml version="1.0" encoding="GBK"?><!DOCTYPE annotation>'
    + voc_text(voc_object("cat", BOXES[2]), voc_object("dog", BOXES[3]), "<folder>a</folder>"),
    "floats": voc_text(
        voc_object("cat", [float(x) for x in BOXES[2]]), voc_object("dog", BOXES[3])
    ).replace(str(WIDTH), f"{WIDTH}.0"),
    "a box that rounds to nothing beside": voc_text(
        voc_object("cat", BOXES[2]), voc_object("dog", BOXES[3]), voc_object("cat", [3, 3, 1e-5, 9])
    ),
    "a flat box beside": voc_text(
        voc_object("cat", BOXES[2]), voc_object("dog", BOXES[3]), voc_object("cat", [3, 3, 0, 9])
    ),
}


@pytest.mark.parametrize("name", VOC_TEXTS)
def test_unusual_xml(voc, name):
    (voc / "xml" / "b.xml").write_text(VOC_TEXTS[name])
    job = open_voc(voc)
    job.check_data("train_dataset", "val_dataset")
    assert job.evaluate(Oracle(job, TRUTH)).means == {"bbox": {"mAP": 1.0}}


def test_pictures_without_objects(voc):
    """Also one whose boxes all have no area: left out of training unless they are wanted."""
    (voc / "xml" / "b.xml").write_text(voc_text(voc_object("cat", [3, 3, 0, 9])))
    for wanted, count in ((False, 1), (True, 2)):
        job = open_voc(voc, allow_empty=wanted)
        job.check_data("train_dataset", "val_dataset")
        assert len(job.train_dataset) == count
        assert job.evaluate(Oracle(job, _without(2, 3))).means == {"bbox": {"mAP": 1.0}}


@pytest.mark.parametrize(
    ("change", "tokens"),
    [
        (lambda root: (root / "labels.txt").write_text("cat\ncat\n"), "labels.txt twice 'cat'"),
        (lambda root: (root / "labels.txt").write_text("cat\n"), "labels.txt 2 1"),
        (lambda root: (root / "labels.txt").write_bytes(b"caf\xe9\ncat"), "labels.txt UTF-8"),
        (lambda root: (root / "list.txt").write_text("\n\n"), "list.txt images"),
        (lambda root: (root / "list.txt").write_text("images/a.png"), "1"),
        (lambda root: _write_xml(root, voc_text()), None),
        (lambda root: _write_xml(root, voc_text(voc_object("cow", BOXES[0]))), "b.xml 0 'cow'"),
        (lambda root: _write_xml(root, voc_text(voc_object("", BOXES[0]))), "b.xml 0 ''"),
        (lambda root: _write_xml(root, "<annotation/>"), "size/width"),
        (
            lambda root: _write_xml(root, voc_text().replace(f">{WIDTH}<", ">0<")),
            "0 48",
        ),
        (
            lambda root: _write_xml(root, voc_text(voc_object("cat", [1, 1, float("nan"), 1]))),
            "bndbox/xmax 'nan'",
        ),
        (
            lambda root: _write_xml(root, voc_text().replace(f">{WIDTH}<", ">1e300<")),
            "size/width '1e300'",
        ),
        (
            lambda root: _write_xml(root, "<!DOCTYPE a [<!ENTITY x 'y'>]><a>&x;</a>"),
            "b.xml entities",
        ),
    ],
)
def test_voc_files_that_are_refused(voc, change, tokens):
    change(voc)
    job = open_voc(voc)
    if tokens is None:
        job.check_data("train_dataset")
        return
    with raises_naming(DataError, *tokens.split()):
        job.check_data("train_dataset")


def _write_xml(root: Path, text: str) -> None:
    (root / "xml" / "b.xml").write_text(text)


def test_what_deserves_a_look_is_in_the_log(voc, caplog):
    text = voc_text(voc_object("cat", BOXES[0], "1"))
    (voc / "xml" / "a.xml").write_text(text)
    (voc / "xml" / "b.xml").write_text(text.replace("object", "OBJECT"))
    with (voc / "list.txt").open("a") as file:
        file.write("images/a.png xml/a.xml\n")
    check_voc("x", voc / "list.txt", voc, voc / "labels.txt", 2)
    for token in ("1 lines repeat", "1 images have no <object>", "every object is difficult"):
        assert token in caplog.text


def test_every_object_of_a_file_is_in_the_report(voc):
    _write_xml(voc, voc_text("<object/>", "<object/>", voc_object("cow", BOXES[0])))
    with raises_naming(DataError, "'cow'") as caught:
        open_voc(voc).check_data("train_dataset")
    # Without boxes, and with a class that the label list has not.
    assert re.findall(r"object (\d)\b", str(caught.value)) == [*"01", *"012"]


def test_check_and_reading_agree_on_the_number_of_objects(voc, caplog):
    found = read_voc(voc / "list.txt", voc, ["cat", "dog"])
    assert [len(picture.objects) for picture in found.pictures] == [2, 2]
    check_voc("x", voc / "list.txt", voc, voc / "labels.txt", 2)
