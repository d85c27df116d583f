"""Average precision of boxes as COCO counts it, in NumPy, and the suppression before it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OVERLAPS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MOST = 100  # boxes of a class and picture that count
# Of configs/detection/_base_/ppyoloe_pan.yml.
LEAST_SCORE, CANDIDATES, KEPT, SUPPRESSED = 0.01, 1000, 300, 0.7


@dataclass(frozen=True)
class Found:
    """Boxes of one picture, the best first: `[n, 4]`, `[n]`, `[n]`."""

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes `[n, 4]` and `[m, 4]`: `[n, m]`."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    inner = np.clip(high - low, 0, None).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (first, second)]
    return inner / np.maximum(areas[0][:, None] + areas[1] - inner, 1e-12)


def suppress(boxes: np.ndarray, scores: np.ndarray) -> Found:
    """The best boxes of each class that do not overlap a better one by more than `SUPPRESSED`.

    Args:
        boxes: `[L, 4]` of one picture.
        scores: `[L, K]`.
    """
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for number in range(scores.shape[1]):
        own = scores[:, number]
        order = np.argsort(-own, kind="stable")[:CANDIDATES]
        order = order[own[order] > LEAST_SCORE]
        alive, chosen = np.ones(len(order), bool), []
        among = overlaps(boxes[order], boxes[order])
        for place in range(len(order)):
            if alive[place]:
                chosen.append(place)
                alive[place + 1 :] &= among[place, place + 1 :] <= SUPPRESSED
        best = order[chosen]
        kept.append((boxes[best], own[best], np.full(len(best), number)))
    merged = [np.concatenate(part) for part in zip(*kept, strict=True)]
    order = np.argsort(-merged[1], kind="stable")[:KEPT]
    return Found(merged[0][order], merged[1][order], merged[2][order])


def average_precision(
    found: Sequence[Found], boxes: Sequence[np.ndarray], classes: Sequence[np.ndarray], count: int
) -> np.ndarray:
    """Average precision by class and overlap, `[K, 10]`; nan for a class without objects.

    Args:
        found: of each picture.
        boxes, classes: the objects of each picture, `[n, 4]` and `[n]`.
        count: K.
    """
    result = np.full((count, len(OVERLAPS)), np.nan)
    for number in range(count):
        scores, hits, objects = [], [], 0
        for picture, truth, kinds in zip(found, boxes, classes, strict=True):
            own = picture.classes == number
            best = np.argsort(-picture.scores[own], kind="stable")[:MOST]
            wanted = truth[kinds == number].astype(np.float64)
            scores.append(picture.scores[own][best])
            hits.append(_match(picture.boxes[own][best].astype(np.float64), wanted))
            objects += len(wanted)
        if objects:
            order = np.argsort(-np.concatenate(scores), kind="stable")
            result[number] = _areas(np.concatenate(hits, axis=1)[:, order], objects)
    return result


def _match(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which boxes, the best first, find an object of their own at each overlap: `[10, n]` bool."""
    hits = np.zeros((len(OVERLAPS), len(found)), bool)
    if not len(found) or not len(wanted):
        return hits
    among = overlaps(found, wanted)
    for row, least in enumerate(OVERLAPS):
        free = np.ones(len(wanted), bool)
        for place in range(len(found)):
            candidates = np.where(free, among[place], -1.0)
            # Of equal ones the last, as pycocotools takes.
            best = len(wanted) - 1 - int(candidates[::-1].argmax())
            if candidates[best] >= min(least, 1 - 1e-10):
                hits[row, place], free[best] = True, False
    return hits


def _areas(hits: np.ndarray, objects: int) -> np.ndarray:
    """Mean precision over 101 recalls, for every row of `hits`, sorted by score."""
    if not hits.shape[1]:
        return np.zeros(len(hits))
    right = hits.cumsum(axis=1)
    recall, precision = right / objects, right / np.arange(1, hits.shape[1] + 1)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    means = []
    for own, values in zip(recall, precision, strict=True):
        place = np.searchsorted(own, RECALLS, side="left")
        known = place < len(values)
        means.append(np.where(known, values[np.minimum(place, len(values) - 1)], 0.0).mean())
    return np.array(means)


def summarise(table: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """`AP`, `AP50`, `AP75` over all classes, and `AP50 NAME` of each."""
    result = {
        "AP": float(np.nanmean(table)),
        "AP50": float(np.nanmean(table[:, 0])),
        "AP75": float(np.nanmean(table[:, 5])),
    }
    return result | {f"AP50 {n}": float(v) for n, v in zip(names, table[:, 0], strict=True)}
