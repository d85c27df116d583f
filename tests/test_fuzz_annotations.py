"""Lists, COCO files and VOC files with something wrong in them: an answer or one of our errors.

Half of the mutations change one value of a valid document, half change bytes. What a check passes
then goes through the data sets and evaluators of PaddleSeg, PaddleDetection and pycocotools, which
may not raise at all.
"""

import contextlib
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

pytest.importorskip("ppdet", reason="pip install --no-deps paddledet==2.6.0")

import ppvision.plugins.paddledet
import ppvision.plugins.paddleseg  # noqa: F401  (both make the frameworks read by our readers)

# isort: split
from paddleseg.datasets import Dataset
from ppdet.data.source.coco import COCODataSet
from ppdet.data.source.voc import VOCDataSet

from ppvision.data.check.coco import check_coco
from ppvision.data.check.segmentation import check_segmentation_list
from ppvision.data.check.voc import check_voc
from ppvision.data.class_folders import ClassFolders
from ppvision.data.listing import list_images, list_labels
from ppvision.data.text import read_names
from ppvision.errors import PpvisionError
from tests.helpers.fuzz import (
    COUNT,
    DEFAULT_COUNT,
    call_within_bounds,
    mutate_bytes,
    mutate_document,
)

SEEDS = pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(range(DEFAULT_COUNT), id="tenth"),
        pytest.param(range(DEFAULT_COUNT, COUNT), id="rest", marks=pytest.mark.all),
    ],
)
WIDTH, HEIGHT = 24, 16  # pixels


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("PPVISION_CACHE", str(tmp_path / "cache"))
    for name in ("a.png", "b.png"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / name)
        Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / f"label_{name}")
    return tmp_path


def write_mutation(
    path: Path, seed: int, document: dict | list, serialise: Callable[[dict | list], bytes]
) -> int:
    """Write a mutation of a document; even seeds change a value, odd ones bytes. Returns its size
    in bytes."""
    rng = random.Random(seed)
    if seed % 2:
        data = mutate_bytes(serialise(document), rng)
    else:
        data = serialise(mutate_document(document, rng))
    path.write_bytes(data)
    return len(data)


def passes(result: object) -> bool:
    return not isinstance(result, PpvisionError)


# -- lists -----------------------------------------------------------------------------------------

PAIRS = [["a.png", "label_a.png"], ["b.png", "label_b.png"], ["a.png", "label_b.png"]]
CLASSES = [["a.png", "0"], ["b.png", "1"]]


def _lines(document: list) -> bytes:
    lines = (
        " ".join(str(f) for f in line) if isinstance(line, list) else str(line) for line in document
    )
    return "\n".join(lines).encode("utf-8", "surrogatepass")


@SEEDS
def test_segmentation_lists(root, seeds):
    passed = 0
    for seed in seeds:
        path = root / "list.txt"
        size = write_mutation(path, seed, PAIRS, _lines)

        def check(path: Path = path) -> dict:
            return check_segmentation_list(path, root, 2)

        result = call_within_bounds(check, size=size, case=f"seed {seed}")
        if passes(result):
            passed += 1
            dataset = Dataset(
                mode="train", dataset_root=str(root), transforms=[], num_classes=2, train_path=path
            )
            assert len(dataset) == result["images"], f"seed {seed}"
            for index in range(len(dataset)):
                assert dataset[index]["label"].shape == (HEIGHT, WIDTH), f"seed {seed}"
    assert 0.02 < passed / len(seeds) < 0.9


@SEEDS
def test_class_lists(root, seeds):
    passed = 0
    for seed in seeds:
        path = root / "list.txt"
        size = write_mutation(path, seed, CLASSES, _lines)

        def read() -> ClassFolders:
            return ClassFolders(root, list_path=root / "list.txt")

        result = call_within_bounds(read, size=size, case=f"seed {seed}")
        passed += passes(result)
    assert 0.02 < passed / len(seeds) < 0.9


@SEEDS
def test_lists_of_predictions(root, seeds):
    passed = 0
    for seed in seeds:
        path = root / "list.txt"
        size = write_mutation(path, seed, PAIRS, _lines)

        def read(path: Path = path) -> list:
            list_labels(path)
            return list_images(path)

        result = call_within_bounds(read, size=size, case=f"seed {seed}")
        if passes(result):
            passed += 1
            names = [name for _, name in result]
            assert len(set(names)) == len(names), f"seed {seed}"
            inside = [Path(name) for name in names]
            assert not any(n.is_absolute() or ".." in n.parts for n in inside), f"seed {seed}"
    assert passed / len(seeds) > 0.02


@SEEDS
def test_class_files(root, seeds):
    for seed in seeds:
        size = write_mutation(root / "labels.txt", seed, [["cat"], ["dog"]], _lines)
        call_within_bounds(lambda: read_names(root / "labels.txt"), size=size, case=f"seed {seed}")


# -- COCO ------------------------------------------------------------------------------------------

POLYGON = [2, 2, 10, 2, 10, 9, 2, 9]
COCO_CONTENT = {
    "info": {"year": 2026},
    "images": [
        {"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
        {"id": 2, "file_name": "b.png", "width": WIDTH, "height": HEIGHT, "license": 1},
    ],
    "annotations": [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 1,
            "bbox": [2, 2, 8, 7],
            "area": 56,
            "iscrowd": 0,
            "segmentation": [POLYGON, [12, 3, 14, 3, 14, 8]],
        },
        {
            "id": 2,
            "image_id": 2,
            "category_id": 3,
            "bbox": [3.5, 2.25, 9, 8],
            "area": 72,
            "iscrowd": 0,
            "track_id": 3,
            "segmentation": {"size": [HEIGHT, WIDTH], "counts": [90, 40, HEIGHT * WIDTH - 130]},
        },
        {
            "id": 3,
            "image_id": 2,
            "category_id": 1,
            "bbox": [0, 0, WIDTH, HEIGHT],
            "area": 99,
            "iscrowd": 1,
            "segmentation": {"size": [HEIGHT, WIDTH], "counts": "PP1P2d8"},
        },
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}],
}


def _json(document: dict | list) -> bytes:
    return json.dumps(document).encode()


def _score(truth: COCO, kind: str) -> float:
    """AP of predictions equal to the truth."""
    found = []
    for entry in truth.dataset["annotations"]:
        if not entry["iscrowd"]:
            found.append({k: entry[k] for k in ("image_id", "category_id", "bbox")})
            found[-1]["score"] = 0.5
            if kind == "segm":
                found[-1]["segmentation"] = truth.annToRLE(entry)
    scored = COCOeval(truth, truth.loadRes(found), kind)
    scored.evaluate()
    scored.accumulate()
    scored.summarize()
    return scored.stats[0]


@SEEDS
@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_coco(root, seeds, masks):
    from pycocotools import mask as mask_utils

    full = mask_utils.encode(np.asfortranarray(np.ones((HEIGHT, WIDTH), np.uint8)))
    document = json.loads(json.dumps(COCO_CONTENT))
    document["annotations"][2]["segmentation"]["counts"] = full["counts"].decode()
    fields = ["image", "gt_bbox", "gt_class", "is_crowd", *(["gt_poly"] if masks else [])]
    passed = 0
    for seed in seeds:
        path = root / f"{seed}.json"
        size = write_mutation(path, seed, document, _json)

        def check(path: Path = path) -> list[str]:
            return check_coco("x", path, root, 2, masks=masks)

        result = call_within_bounds(check, size=size, case=f"seed {seed}")
        if not passes(result):
            continue
        passed += 1
        assert len(result.names) == 2, f"seed {seed}"
        dataset = COCODataSet(str(root), "", path.name, fields, load_crowd=True)
        dataset.parse_dataset()
        assert dataset.roidbs, f"seed {seed}"
        boxes = np.concatenate([record["gt_bbox"] for record in dataset.roidbs])
        assert np.isfinite(boxes).all(), f"seed {seed}"
        assert (boxes[:, 2:] > boxes[:, :2]).all(), f"seed {seed}"
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(dataset.get_anno())
            assert _score(truth, "bbox") == pytest.approx(1.0), f"seed {seed}"
            if masks:  # one without a pixel cannot be found
                _score(truth, "segm")
    assert 0.1 < passed / len(seeds) < 0.9


# -- Pascal VOC ------------------------------------------------------------------------------------

VOC_CONTENT = {
    "annotation": {
        "filename": "a.png",
        "size": {"width": WIDTH, "height": HEIGHT, "depth": 3},
        "object": [
            {
                "name": "cat",
                "difficult": 0,
                "bndbox": {"xmin": 2, "ymin": 2, "xmax": 10, "ymax": 9},
            },
            {"name": "dog", "bndbox": {"xmin": 1.5, "ymin": 3, "xmax": 9, "ymax": 12}},
        ],
    }
}


def _xml_of(key: object, value: object) -> str:
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return "".join(_xml_of(key, item) for item in value)
    name = "".join(c for c in str(key) if c.isalnum()) or "x"
    name = name[:200] if name[0].isalpha() else f"x{name[:200]}"
    if isinstance(value, dict):
        return f"<{name}>{''.join(_xml_of(k, v) for k, v in value.items())}</{name}>"
    return f"<{name}>{escape(str(value))}</{name}>"


def _xml(document: dict) -> bytes:
    text = "".join(_xml_of(key, value) for key, value in document.items())
    return text.encode("utf-8", "surrogatepass")


@SEEDS
@pytest.mark.parametrize("kind", ["xml", "list", "labels"])
def test_voc(root, seeds, kind):
    (root / "b.xml").write_bytes(_xml(VOC_CONTENT))
    (root / "a.xml").write_bytes(_xml(VOC_CONTENT))
    (root / "list.txt").write_bytes(b"a.png a.xml\nb.png b.xml\n")
    (root / "labels.txt").write_bytes(b"cat\ndog\n")
    mutated = {
        "xml": ("a.xml", VOC_CONTENT, _xml),
        "list": ("list.txt", [["a.png", "a.xml"], ["b.png", "b.xml"]], _lines),
        "labels": ("labels.txt", [["cat"], ["dog"]], _lines),
    }[kind]
    passed = 0
    for seed in seeds:
        size = write_mutation(root / mutated[0], seed, *mutated[1:])

        def check() -> None:
            return check_voc("x", root / "list.txt", root, root / "labels.txt", 2)

        result = call_within_bounds(check, size=size, case=f"seed {seed}")
        if not passes(result):
            continue
        passed += 1
        fields = ["image", "gt_bbox", "gt_class", "difficult"]
        dataset = VOCDataSet(
            str(root), "", "list.txt", fields, label_list="labels.txt", allow_empty=True
        )
        dataset.parse_dataset()
        for record in dataset.roidbs:
            assert os.path.isfile(record["im_file"]), f"seed {seed}"
            boxes = record["gt_bbox"]
            assert ((boxes >= 0) & (boxes <= [WIDTH, HEIGHT] * 2)).all(), f"seed {seed}"
            assert (record["gt_class"] < 2).all(), f"seed {seed}"
        assert any(len(record["gt_bbox"]) for record in dataset.roidbs), f"seed {seed}"
    assert 0.02 < passed / len(seeds) < 0.95
