"""mIoU, Boundary IoU and boundary F-score at 3 pixels on a GPU, as `ppvision eval` defines them.

A test compares them with `ppvision.metrics` and PaddleSeg's mIoU on random label maps. Counts stay
on the GPU until `compute`, so that nothing waits for them while other trainings go on.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NONE = -1.0
HIGH = 32767.0
TOLERANCE = 3  # pixels, of the F-score


def boundary_depth(height: int, width: int) -> int:
    """Of Boundary IoU, for a picture of this size."""
    return max(1, round(0.02 * (height**2 + width**2) ** 0.5))


def _largest(x: Tensor, reach: int, beyond: float) -> Tensor:
    """The largest of the square around each pixel, `[B, H, W]`; outside of the picture `beyond`."""
    side = 2 * reach + 1
    x = F.pad(x[:, None], [reach] * 4, value=beyond)
    return F.max_pool2d(F.max_pool2d(x, (1, side), 1), (side, 1), 1)[:, 0]


def other_class_near(classes: Tensor, reach: int, beyond_edge: bool) -> Tensor:
    """Pixels with one of another class in the square around them; classes `[B, H, W]` float, -1
    where ignored."""
    ignored = classes == NONE
    largest = _largest(classes, reach, HIGH if beyond_edge else NONE)
    present = torch.where(ignored, torch.full_like(classes, HIGH), classes)
    smallest = -_largest(-present, reach, -HIGH)
    return ((largest != classes) | (smallest != classes)) & ~ignored


def _within_tolerance(masks: Tensor) -> Tensor:
    """Pixels with one of `masks` `[B, K, H, W]` within a Euclidean distance of 3: the union of a
    row and a column of 7 pixels and a square of 5."""
    pooled = [
        F.max_pool2d(masks, size, 1, (size[0] // 2, size[1] // 2))
        for size in ((1, 7), (7, 1), (5, 5))
    ]
    return torch.maximum(torch.maximum(pooled[0], pooled[1]), pooled[2]) > 0


class Scoring:
    """Counts of predictions.

    Args:
        num_classes: of the data set.
        ignore_index: label of pixels that do not count.
        device: where the counts are.
    """

    def __init__(self, num_classes: int, device: torch.device, ignore_index: int = 255) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        # Rows: pixels right, predicted, true; the same along boundaries; boundary pixels predicted,
        # true, and found again of each.
        self.counts = torch.zeros(10, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add a batch of one size, `[B, H, W]` whole numbers each."""
        height, width = label.shape[1:]
        ignored = label == self.ignore_index
        none = torch.full((), NONE, device=label.device)
        pred = torch.where(ignored, none, prediction.float())
        true = torch.where(ignored, none, label.float())
        of_pred = self._one_hot(pred)  # [B, K, H, W] bool
        of_true = self._one_hot(true)
        depth = boundary_depth(height, width)
        edge_pred = other_class_near(pred, depth, True)[:, None]
        edge_true = other_class_near(true, depth, True)[:, None]
        thin_pred = of_pred & other_class_near(pred, 1, False)[:, None]
        thin_true = of_true & other_class_near(true, 1, False)[:, None]
        both = of_pred & of_true
        half = torch.float16 if label.device.type == "cuda" else torch.float32
        masks = [
            both,
            of_pred,
            of_true,
            both & edge_pred & edge_true,
            of_pred & edge_pred,
            of_true & edge_true,
            thin_pred,
            thin_true,
            thin_pred & _within_tolerance(thin_true.to(half)),
            thin_true & _within_tolerance(thin_pred.to(half)),
        ]
        self.counts += torch.stack([mask.sum(dim=(0, 2, 3)) for mask in masks])

    def _one_hot(self, classes: Tensor) -> Tensor:
        numbers = torch.arange(self.num_classes, device=classes.device, dtype=classes.dtype)
        return classes[:, None] == numbers[:, None, None]

    def compute(self) -> dict[str, float]:
        """`mIoU` (a class that occurs nowhere counts as 0, as in PaddleSeg), `BoundaryIoU` and
        `BoundaryF3` (means over the classes that occur)."""
        counts = self.counts.double().cpu()
        right, pred, true, edge_right, edge_pred, edge_true = counts[:6]
        thin_pred, thin_true, found_pred, found_true = counts[6:]
        iou = right / (pred + true - right).clamp(min=1)
        union = edge_pred + edge_true - edge_right
        precision = found_pred / thin_pred.clamp(min=1)
        recall = found_true / thin_true.clamp(min=1)
        f_score = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        return {
            "mIoU": float(iou.mean()),
            "BoundaryIoU": _mean(edge_right / union.clamp(min=1), union > 0),
            "BoundaryF3": _mean(f_score, thin_pred + thin_true > 0),
        }


def _mean(values: Tensor, occurring: Tensor) -> float:
    return float(values[occurring].mean()) if occurring.any() else float("nan")
