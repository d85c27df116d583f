"""Boundary metrics by their definitions, with scipy and one class at a time."""

import numpy as np
from scipy import ndimage

SQUARE = np.ones((3, 3), bool)


def boundary_iou(preds, labels, num_classes, ratio=0.02):
    """Cheng et al.: mask minus `d` erosions of the mask padded with nothing; no ignored pixels."""
    both, either = np.zeros(num_classes), np.zeros(num_classes)
    for pred, label in zip(preds, labels, strict=True):
        times = max(1, round(ratio * np.sqrt(pred.shape[0] ** 2 + pred.shape[1] ** 2)))
        for k in range(num_classes):
            edges = []
            for mask in (pred == k, label == k):
                eroded = ndimage.binary_erosion(np.pad(mask, 1), SQUARE, iterations=times)
                edges.append(mask & ~eroded[1:-1, 1:-1])
            both[k] += (edges[0] & edges[1]).sum()
            either[k] += (edges[0] | edges[1]).sum()
    return np.where(either > 0, both / np.maximum(either, 1), np.nan)


def _inner_boundary(mask):
    """Pixels with a pixel outside of the mask, inside the picture, among their eight neighbours."""
    return mask & ~ndimage.binary_erosion(mask, SQUARE, border_value=1)


def boundary_f(preds, labels, num_classes, tolerance):
    counts = np.zeros((4, num_classes))
    for pred, label in zip(preds, labels, strict=True):
        for k in range(num_classes):
            edges = [_inner_boundary(mask) for mask in (pred == k, label == k)]
            for side, (mine, other) in enumerate((edges, edges[::-1])):
                counts[2 * side, k] += mine.sum()
                if other.any():
                    distance = ndimage.distance_transform_edt(~other)
                    counts[2 * side + 1, k] += (mine & (distance <= tolerance)).sum()
    scores = []
    for predicted, right, true, found in counts.T:
        if predicted + true == 0:
            scores.append(np.nan)
            continue
        p, r = right / max(predicted, 1), found / max(true, 1)
        scores.append(2 * p * r / (p + r) if p + r else 0.0)
    return np.array(scores)


def trimap_iou(preds, labels, num_classes, width):
    both, either = np.zeros(num_classes), np.zeros(num_classes)
    for pred, label in zip(preds, labels, strict=True):
        edge = np.zeros(label.shape, bool)
        for k in range(num_classes):
            edge |= _inner_boundary(label == k)
        if not edge.any():
            continue
        band = ndimage.distance_transform_edt(~edge) <= width
        for k in range(num_classes):
            both[k] += (band & (pred == k) & (label == k)).sum()
            either[k] += (band & ((pred == k) | (label == k))).sum()
    return np.where(either > 0, both / np.maximum(either, 1), np.nan)
