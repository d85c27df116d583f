"""The rule for detectors, on boxes made by hand."""

import numpy as np
import pytest

from ppvision.deploy.verify.detection_parity import Bounds, check_found, check_raw, overlap
from ppvision.deploy.verify.parity import ParityError
from tests.helpers.messages import raises_naming

BOUNDS = Bounds(score=0.05, overlap=0.5, count=100)
TOLERANCE = 1e-3


def found(*rows: tuple, masks: np.ndarray | None = None) -> list[np.ndarray]:
    """Outputs of one picture: class, score, left, top, right, bottom each."""
    outputs = [np.float32(rows).reshape(-1, 6), np.int32([len(rows)])]
    return outputs if masks is None else [*outputs, masks]


A = (0, 0.9, 0, 0, 100, 100)
B = (1, 0.8, 50, 50, 90, 200)


def test_overlap_of_boxes():
    box = np.float32([0, 0, 10, 10])
    others = np.float32([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [3, 3, 3, 3]])
    np.testing.assert_allclose(overlap(box, others), [1, 50 / 150, 0, 0])
    empty = np.float32([3, 3, 3, 3])
    assert overlap(empty, others).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("ours", "theirs", "matched"),
    [
        (found(A, B), found(B, A), 2),  # in another order
        (found(A), found((0, 0.9004, 0.1, 0, 100, 100.1)), 1),  # within the tolerance
        (found((0, 0.9, 0, 0, 600, 600), (0, 0.7, 5, 5, 15, 15)),) * 2 + (2,),
        # A small box that moves by what boxes may move before NMS.
        (
            found((0, 0.9, 0, 0, 600, 600), (0, 0.7, 5, 5, 15, 15)),
            found((0, 0.9, 0, 0, 600, 600), (0, 0.7, 5.3, 5, 15.3, 15)),
            2,
        ),
        # One side alone has a box at the lowest score.
        (found(A, (1, 0.0505, 0, 0, 9, 9)), found(A), 1),
        # It overlaps a surer one of its class by just what NMS allows: 50 of 100.
        (found(A, (0, 0.5, 0, 0, 100, 50)), found(A), 1),
        # Such a box kept on one side drops a third one there.
        (
            found(A, (0, 0.5, 0, 0, 100, 50)),
            found(A, (0, 0.4, 0, 0, 100, 45)),
            1,
        ),
        (found(), found(), 0),
    ],
)
def test_alike(ours, theirs, matched):
    assert check_found(ours, theirs, BOUNDS, TOLERANCE, "here") == matched
    assert check_found(theirs, ours, BOUNDS, TOLERANCE, "here") == matched


@pytest.mark.parametrize(
    "theirs",
    [
        found(A),  # one is missing
        found(A, B, (1, 0.5, 0, 0, 9, 9)),
        found(A, (0, *B[1:])),  # another class
        found(A, (1, 0.79, *B[2:])),  # another score
        found(A, (1, 0.8, 50, 50, 91, 205)),  # moved
    ],
)
def test_not_alike(theirs):
    with raises_naming(ParityError, "here,", "0:", "class", "counterpart", "boxes"):
        check_found(found(A, B), theirs, BOUNDS, TOLERANCE, "here")
    with raises_naming(ParityError, "here,", "0:", "class", "counterpart", "boxes"):
        check_found(theirs, found(A, B), BOUNDS, TOLERANCE, "here")


def test_the_last_of_a_full_list_may_differ():
    bounds = Bounds(score=0.05, overlap=0.5, count=2)
    assert check_found(found(A, B), found(A, (2, 0.8, 0, 0, 9, 9)), bounds, TOLERANCE, "here") == 1


def test_masks_of_matched_boxes():
    mask = np.zeros((1, 100, 100), np.int32)
    mask[0, 10:60, 10:60] = 1
    for pixels, alike in ((2, True), (25, True), (26, False)):
        other = mask.copy()
        other[0, 0, :pixels] = 1
        outputs = found(A, masks=mask), found(A, masks=other)
        if alike:
            assert check_found(*outputs, BOUNDS, TOLERANCE, "here") == 1
        else:
            with raises_naming(ParityError, "here", "mask", "0"):
                check_found(*outputs, BOUNDS, TOLERANCE, "here")


def raw(random: np.random.Generator, two_stages: bool) -> list[np.ndarray]:
    if two_stages:
        return [random.uniform(0, 500, (200, 3, 4)), random.uniform(0, 1, (200, 4))]
    return [random.uniform(0, 500, (2, 50, 4)), random.uniform(0, 1, (2, 3, 50))]


@pytest.mark.parametrize("two_stages", [False, True])
def test_boxes_before_nms(two_stages):
    boxes, scores = raw(np.random.default_rng(0), two_stages)
    near = [boxes + 0.1, scores + 1e-4]
    error = check_raw([boxes, scores], near, TOLERANCE, "here")
    assert error == pytest.approx(0.1 / boxes.max(), rel=1e-6)
    order = np.arange(boxes.shape[0 if two_stages else 1])
    order[[3, 7]] = order[[7, 3]]  # two change places
    moved = [boxes[order], scores[order]] if two_stages else [boxes[:, order], scores[:, :, order]]
    assert check_raw([boxes, scores], moved, TOLERANCE, "here") == 0.0
    far = [boxes.copy(), scores]
    far[0][..., 0] += 2.0  # pixels, of 500
    with pytest.raises(ParityError, match="NMS"):
        check_raw([boxes, scores], far, TOLERANCE, "here")


def test_few_proposals_may_differ():
    boxes, scores = raw(np.random.default_rng(0), True)
    for lost, alike in ((2, True), (3, False)):
        other = boxes.copy()
        other[:lost] += 40.0
        if alike:
            assert check_raw([boxes, scores], [other, scores], TOLERANCE, "here") == 0.0
        else:
            with pytest.raises(ParityError, match="NMS"):
                check_raw([boxes, scores], [other, scores], TOLERANCE, "here")
