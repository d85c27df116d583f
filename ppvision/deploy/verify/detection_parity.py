"""Check whether an exported detector finds the same objects as the model.

Before NMS, boxes and scores follow the rule of `ppvision.deploy.verify.parity`. After NMS, boxes of
one class are matched at an overlap (IoU) of at least 0.99. A box may be missing on one side only if
a limit of NMS decides: its score is within the tolerance of the lowest score that is kept, or its
overlap with a box of higher score is close to the limit. Masks of matched boxes also overlap by
0.99, or differ in one or two pixels.

Some detectors select boxes by their scores before NMS; two-stage detectors select by scores and
overlaps. Boxes with nearly the same score may then change places. For these, rows are matched
before they are compared; in two-stage detectors one proposal in a hundred may exist on one side
only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ppvision.deploy.run.detections import Detections, collect_detections
from ppvision.deploy.verify.parity import ParityError, relative_error

SAME = 0.99  # overlap from which boxes, or masks, count as the same
FEW_PIXELS = 2
LOST_PROPOSALS = 0.01  # fraction of proposals that may differ
NEAR_BOUND = 0.01  # distance of an overlap to the limit of NMS


@dataclass(frozen=True)
class Bounds:
    """The limits that decide in NMS whether a box is kept.

    Attributes:
        score: lowest score that is kept.
        overlap: overlap with a box of higher score of the class, from which a box is dropped.
        count: largest number of boxes per image; -1 for no limit.
    """

    score: float
    overlap: float
    count: int


def check_raw(
    eager: Sequence[np.ndarray], exported: Sequence[np.ndarray], tolerance: float, where: str
) -> float:
    """Compare boxes and scores before NMS.

    Args:
        eager, exported: boxes and scores: `[B, M, 4]` and `[B, C, M]`, or for two stages `[M, C,
            4]` and `[M, C + 1]`.
        tolerance: the bound.
        where: runtime and input, for the message.

    Returns:
        The largest error, `max|a - b| / max(1, max|a|)`.

    Raises:
        ParityError: above the bound, when rows have been matched too.
    """
    error = max(relative_error(a, b) for a, b in zip(eager, exported, strict=True))
    if error > tolerance:
        two_stages = eager[1].ndim == 2
        scales = [max(1.0, float(np.abs(part).max(initial=0))) for part in eager]
        error, lost = 0.0, 0
        for ours, theirs in zip(_rows(eager, scales), _rows(exported, scales), strict=True):
            most, alone = _matched(ours, theirs, tolerance)
            error = max(error, most)
            lost += max(0, alone - (max(1, int(LOST_PROPOSALS * len(ours))) if two_stages else 0))
        if lost:
            raise ParityError(
                f"{where}: {lost} of {sum(map(len, _rows(eager, scales)))} boxes have no "
                f"counterpart before NMS, within {tolerance:.3g} (max|a-b| / max(1, max|a|)).",
                float("inf"),
                tolerance,
            )
    return error


def _rows(outputs: Sequence[np.ndarray], scales: Sequence[float]) -> list[np.ndarray]:
    """Return boxes and scores before NMS as rows `[M, ...]` in units of `scales`, per image; for
    two stages all together."""
    boxes, scores = (part / scale for part, scale in zip(outputs, scales, strict=True))
    if scores.ndim == 2:
        return [np.concatenate([boxes.reshape(len(boxes), -1), scores], axis=1)]
    return [np.concatenate([b, s.T], axis=1) for b, s in zip(boxes, scores, strict=True)]


def _matched(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> tuple[float, int]:
    """Return the largest difference of rows that have a match within the tolerance, and the number
    of rows on both sides without a match."""
    if not len(ours) or not len(theirs):
        return 0.0, max(len(ours), len(theirs))
    nearest = np.array([np.abs(theirs - row).max(axis=1).min() for row in ours])
    back = np.array([np.abs(ours - row).max(axis=1).min() for row in theirs])
    alike = nearest <= tolerance
    lost = max(int((~alike).sum()), int((back > tolerance).sum()))
    return float(nearest[alike].max(initial=0.0)), lost


def check_found(
    eager: Sequence[np.ndarray],
    exported: Sequence[np.ndarray],
    bounds: Bounds,
    tolerance: float,
    where: str,
) -> int:
    """Compare the result of NMS, image by image.

    Args:
        eager, exported: rows `[N, 6]`, counts `[B]`, and masks `[N, H, W]` where there are any.
        bounds: of NMS.
        tolerance: of scores.
        where: for the message.

    Returns:
        The number of boxes that were matched.

    Raises:
        ParityError: a box or mask exists on one side only.
    """
    matched = 0
    for number, (ours, theirs) in enumerate(
        zip(split_by_picture(eager), split_by_picture(exported), strict=True)
    ):
        pairs = _pairs(ours, theirs, tolerance)
        left = [
            set(range(len(side))) - {pair[place] for pair in pairs}
            for place, side in enumerate((ours, theirs))
        ]
        excused = [
            {k for k in alone if _on_a_bound(side, k, bounds, tolerance)}
            for side, alone in zip((ours, theirs), left, strict=True)
        ]
        for place, (side, other) in enumerate(((ours, theirs), (theirs, ours))):
            for k in sorted(left[place] - excused[place]):
                if _dropped_by(side, k, other, excused[1 - place], bounds):
                    continue
                box = ", ".join(f"{x:.1f}" for x in side.boxes[k])
                raise ParityError(
                    f"{where}, image {number}: class {side.class_ids[k]} at [{box}], score "
                    f"{side.scores[k]:.4f}, has no counterpart in the "
                    f"{('exported', 'eager')[place]} model's boxes "
                    f"(overlap {SAME} and a score within {tolerance:.3g}).",
                    float("inf"),
                    tolerance,
                )
        if ours.masks is not None:
            _check_masks(ours, theirs, pairs, tolerance, f"{where}, image {number}")
        matched += len(pairs)
    return matched


def scores_with_nothing(scores: np.ndarray, bounds: Bounds) -> np.ndarray:
    """Add one class to scores before NMS: "no object", with NMS's lowest score.

    Shapes: `[B, C, M]` -> `[B, C + 1, M]`.
    """
    nothing = np.full_like(scores[:, :1], bounds.score)
    return np.concatenate([scores, nothing], axis=1)


def split_by_picture(outputs: Sequence[np.ndarray]) -> list[Detections]:
    """Split a detector's rows, counts and masks by image."""
    rows, counts, *masks = outputs
    ends = np.cumsum(counts.reshape(-1))
    return [
        collect_detections(rows[end - n : end], masks[0][end - n : end] if masks else None, [])
        for end, n in zip(ends, counts.reshape(-1), strict=True)
    ]


def _pairs(ours: Detections, theirs: Detections, tolerance: float) -> list[tuple[int, int]]:
    free = set(range(len(theirs)))
    pairs = []
    # Before NMS, boxes may differ by this many pixels, which is much for a small box.
    reach = tolerance * max(1.0, float(np.abs(ours.boxes).max(initial=0)))
    for i in range(len(ours)):
        overlaps = overlap(ours.boxes[i], theirs.boxes)
        near = np.abs(theirs.boxes - ours.boxes[i]).max(axis=1, initial=0) <= reach
        fits = [
            j
            for j in free
            if ours.class_ids[i] == theirs.class_ids[j]
            and abs(ours.scores[i] - theirs.scores[j]) <= tolerance
            and (overlaps[j] >= SAME or near[j])
        ]
        if fits:
            best = max(fits, key=lambda j: overlaps[j])
            free.remove(best)
            pairs.append((i, best))
    return pairs


def _on_a_bound(found: Detections, place: int, bounds: Bounds, tolerance: float) -> bool:
    score = found.scores[place]
    lowest = bounds.score
    if 0 < bounds.count <= len(found):
        lowest = max(lowest, float(found.scores.min()))
    if score <= lowest + tolerance:
        return True
    surer = (found.class_ids == found.class_ids[place]) & (found.scores >= score)
    surer[place] = False
    overlaps = overlap(found.boxes[place], found.boxes[surer])
    return bool((np.abs(overlaps - bounds.overlap) <= NEAR_BOUND).any())


def _dropped_by(
    side: Detections, place: int, other: Detections, excused: set[int], bounds: Bounds
) -> bool:
    """Whether a box that a limit has kept only on the other side drops this box there."""
    return any(
        other.class_ids[k] == side.class_ids[place]
        and other.scores[k] >= side.scores[place]
        and overlap(side.boxes[place], other.boxes[k : k + 1])[0] >= bounds.overlap - NEAR_BOUND
        for k in excused
    )


def _check_masks(
    ours: Detections,
    theirs: Detections,
    pairs: list[tuple[int, int]],
    tolerance: float,
    where: str,
) -> None:
    ours_masks, theirs_masks = ours.masks, theirs.masks
    assert ours_masks is not None
    assert theirs_masks is not None
    for i, j in pairs:
        a, b = ours_masks[i], theirs_masks[j]
        wrong, either = int((a != b).sum()), int((a | b).sum())
        if wrong > max(FEW_PIXELS, (1 - SAME) * either):
            raise ParityError(
                f"{where}: the mask of class {ours.class_ids[i]}, score {ours.scores[i]:.4f}, "
                f"differs in {wrong} of {either} pixels.",
                float("inf"),
                tolerance,
            )


def overlap(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the intersection over union of a box `[4]` with boxes `[N, 4]`; equal empty boxes have
    1."""
    low = np.maximum(box[:2], boxes[:, :2])
    high = np.minimum(box[2:], boxes[:, 2:])
    shared = np.maximum(high - low, 0).prod(axis=1)
    areas = np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(axis=1)
    union = np.maximum(box[2:] - box[:2], 0).prod() + areas - shared
    return np.where(union > 0, shared / np.maximum(union, 1e-12), np.abs(boxes - box).max(1) == 0)
