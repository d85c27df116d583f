"""`benchmark/gpu/detection_scores.py` against pycocotools and Paddle's NMS."""

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmark.gpu.detection_scores import (
    CANDIDATES,
    KEPT,
    LEAST_SCORE,
    SUPPRESSED,
    Found,
    average_precision,
    suppress,
)
from ppvision.deploy.run import nms
from ppvision.deploy.run.manifest import Nms

CLASSES = 3


def random_boxes(random: np.random.Generator, count: int) -> np.ndarray:
    corner = random.uniform(0, 80, (count, 2))
    return np.concatenate([corner, corner + random.uniform(8, 40, (count, 2))], 1)


def test_same_average_precision_as_pycocotools(capsys):
    """Boxes near to objects, some twice, some missed, some of a wrong class."""
    random = np.random.default_rng(0)
    truth, kinds, found, rows, annotations = [], [], [], [], []
    for picture in range(8):
        boxes = random_boxes(random, 0 if picture == 3 else 6)
        classes = random.integers(0, CLASSES, len(boxes))
        near = np.concatenate([boxes, boxes[:3], random_boxes(random, 4)])
        near = near + random.normal(0, 2, near.shape)
        own = np.concatenate([classes, classes[:3], random.integers(0, CLASSES, 4)])
        scores = random.permutation(len(near)) / 100 + 0.3
        order = np.argsort(-scores)
        truth.append(boxes), kinds.append(classes)
        found.append(Found(near[order], scores[order], own[order]))
        for box, number in zip(boxes, classes, strict=True):
            sides = [*box[:2], *(box[2:] - box[:2])]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": picture, "category_id": int(number)}
                | {"bbox": sides, "area": float(sides[2] * sides[3]), "iscrowd": 0}
            )
        for box, score, number in zip(near, scores, own, strict=True):
            sides = [*box[:2], *(box[2:] - box[:2])]
            rows.append({"image_id": picture, "category_id": int(number), "score": score})
            rows[-1]["bbox"] = [float(side) for side in sides]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number} for number in range(8)],
        "categories": [{"id": number} for number in range(CLASSES)],
        "annotations": annotations,
    }
    coco.createIndex()
    evaluated = COCOeval(coco, coco.loadRes(rows), "bbox")
    evaluated.evaluate()
    evaluated.accumulate()
    expected = evaluated.eval["precision"][:, :, :, 0, -1].mean(axis=1).T  # [class, overlap]
    result = average_precision(found, truth, kinds, CLASSES)
    np.testing.assert_allclose(result, expected, atol=1e-9)
    assert 0.1 < result.mean() < 0.9


def test_same_boxes_as_paddles_suppression():
    random = np.random.default_rng(1)
    boxes = random_boxes(random, 120).astype(np.float32)
    scores = random.uniform(0, 1, (120, CLASSES)).astype(np.float32) ** 4
    settings = Nms(
        score_threshold=LEAST_SCORE, iou_threshold=SUPPRESSED, candidates=CANDIDATES, kept=KEPT,
        background=None, normalized=True,
    )  # fmt: skip
    rows, _ = nms.suppress(boxes[None], np.ascontiguousarray(scores.T)[None], settings)
    found = suppress(boxes, scores)
    expected = rows[np.argsort(-rows[:, 1], kind="stable")]
    np.testing.assert_array_equal(found.classes, expected[:, 0])
    np.testing.assert_allclose(found.scores, expected[:, 1])
    np.testing.assert_allclose(found.boxes, expected[:, 2:])
    assert len(found.boxes) < 250


def test_nothing_found_is_no_precision():
    empty = Found(np.zeros((0, 4)), np.zeros(0), np.zeros(0))
    truth, kinds = [np.array([[0.0, 0, 9, 9]])], [np.array([1])]
    result = average_precision([empty], truth, kinds, 2)
    assert np.isnan(result[0]).all()
    assert (result[1] == 0).all()
