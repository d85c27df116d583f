"""PP-YOLOE's losses: which place learns which object, and what it then costs.

Two rules assign objects to places: ATSS (by the distance of fixed boxes, while the network knows
nothing), then task alignment (by what the network finds). The numbers are PaddleDetection's; the
shapes do not depend on them, so that no step waits for the GPU: places without an object are
computed too and weigh nothing. Everything is float32.

Sources: Zhang and others, ATSS, CVPR 2020, https://arxiv.org/abs/1912.02424; Feng and others, TOOD,
ICCV 2021, https://arxiv.org/abs/2108.07755; Zhang and others, VarifocalNet, CVPR 2021,
https://arxiv.org/abs/2008.13367; Li and others, Generalized Focal Loss, NeurIPS 2020,
https://arxiv.org/abs/2006.04388; Rezatofighi and others, GIoU, CVPR 2019,
https://arxiv.org/abs/1902.09630.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark.gpu.detection_networks import BINS, Head, RawOutputs, decode, places

# Of configs/detection/_base_/ppyoloe_pan.yml.
ANCHOR_CELLS = 5.0  # side of ATSS's fixed boxes, in cells
ATSS_CANDIDATES = 9  # places of each map, by object
ALIGNED_CANDIDATES = 13  # places of all maps together, by object
SCORE_POWER, OVERLAP_POWER = 1.0, 6.0  # of task alignment
WEIGHTS = {"class": 1.0, "iou": 2.5, "dfl": 0.5}
FOCAL_ALPHA, FOCAL_GAMMA = 0.75, 2.0  # PaddleDetection's defaults of the varifocal loss
TINY = 1e-9


@dataclass(frozen=True)
class Targets:
    """Objects of a batch, padded to n per picture.

    Attributes:
        boxes: `[B, n, 4]` left, top, right, bottom in pixels; 0 where there is none.
        classes: `[B, n]` int64; 0 where there is none.
        real: `[B, n]` bool: whether there is an object.
    """

    boxes: Tensor
    classes: Tensor
    real: Tensor


@dataclass(frozen=True)
class Assignment:
    """What every place learns.

    Attributes:
        positive: `[B, L]` bool: it learns an object.
        boxes: `[B, L, 4]` in pixels; any where not positive.
        classes: `[B, L, K]`: 1 for the class of the object.
        scores: `[B, L, K]`: what the class's probability is to become, from 0 to 1.
    """

    positive: Tensor
    boxes: Tensor
    classes: Tensor
    scores: Tensor


def pairwise_iou(first: Tensor, second: Tensor, epsilon: float = TINY) -> Tensor:
    """Overlaps of boxes: `[..., n, 4]` and `[..., L, 4]` -> `[..., n, L]`."""
    a, b = first.unsqueeze(-2), second.unsqueeze(-3)
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(0)
    overlap = inner[..., 0] * inner[..., 1]
    areas = [(x[..., 2] - x[..., 0]).clamp(0) * (x[..., 3] - x[..., 1]).clamp(0) for x in (a, b)]
    return overlap / (areas[0] + areas[1] - overlap + epsilon)


def _inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether points `[L, 2]` lie in boxes `[B, n, 4]`: `[B, n, L]`."""
    x, y = points[:, 0], points[:, 1]
    left, top, right, bottom = boxes.unsqueeze(2).unbind(-1)  # [B, n, 1] each
    sides = torch.stack([x - left, y - top, right - x, bottom - y])
    return sides.amin(dim=0) > TINY


def _one_object_per_place(mask: Tensor, overlaps: Tensor) -> Tensor:
    """Of several objects at a place, the one that overlaps most: `[B, n, L]` bool."""
    numbers = torch.arange(overlaps.shape[1], device=overlaps.device).unsqueeze(1)
    best = overlaps.argmax(dim=1, keepdim=True) == numbers
    return torch.where(mask.sum(dim=1, keepdim=True) > 1, best, mask)


def _gather(mask: Tensor, scores: Tensor, targets: Targets, num_classes: int) -> Assignment:
    """From `[B, n, L]`, one object per place, and the score of each place `[B, L]`."""
    index = mask.int().argmax(dim=1)  # [B, L]
    positive = mask.any(dim=1)
    boxes = targets.boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
    numbers = torch.arange(num_classes, device=mask.device)
    classes = targets.classes.gather(1, index).unsqueeze(-1) == numbers  # [B, L, K]
    classes = (classes & positive.unsqueeze(-1)).float()
    return Assignment(positive, boxes, classes, classes * scores.unsqueeze(-1))


@torch.no_grad()
def assign_by_distance(
    found: Tensor, points: Tensor, strides: Tensor, counts: Sequence[int], targets: Targets, k: int
) -> Assignment:
    """ATSS: of the places nearest to an object, those whose fixed box overlaps it most.

    Args:
        found: boxes of the network `[B, L, 4]`, for the scores.
        points: `[L, 2]` in pixels.
        strides: `[L, 1]`.
        counts: places of each map.
        targets: the objects, n of them.
        k: number of classes.
    """
    half = 0.5 * ANCHOR_CELLS * strides
    anchors = torch.cat([points - half, points + half], dim=1)
    batch, boxes, _ = targets.boxes.shape
    overlaps = pairwise_iou(targets.boxes.reshape(-1, 4), anchors, 1e-10)
    overlaps = overlaps.reshape(batch, boxes, -1)  # [B, n, L]
    middles = (targets.boxes[..., :2] + targets.boxes[..., 2:]) / 2
    distances = (middles.unsqueeze(2) - points).norm(dim=-1)  # [B, n, L]
    near = torch.zeros_like(overlaps, dtype=torch.bool)
    start, values = 0, []
    for count in counts:
        part = distances[..., start : start + count]
        index = part.topk(min(ATSS_CANDIDATES, count), largest=False).indices + start
        near.scatter_(2, index, True)
        values.append(overlaps.gather(2, index))
        start += count
    seen = torch.cat(values, dim=2)
    threshold = seen.mean(dim=2, keepdim=True) + seen.std(dim=2, keepdim=True)
    mask = near & (overlaps > threshold) & _inside(points, targets.boxes)
    mask = _one_object_per_place(mask & targets.real.unsqueeze(-1), overlaps)
    scores = (pairwise_iou(targets.boxes, found) * mask).amax(dim=1)
    return _gather(mask, scores, targets, k)


@torch.no_grad()
def assign_by_alignment(
    scores: Tensor, found: Tensor, points: Tensor, targets: Targets
) -> Assignment:
    """Task alignment: the places inside an object that find its class and its box best.

    Args:
        scores: probabilities of the network `[B, L, K]`.
        found: its boxes `[B, L, 4]`.
        points: `[L, 2]` in pixels.
        targets: the objects, n of them.
    """
    overlaps = pairwise_iou(targets.boxes, found)  # [B, n, L]
    index = targets.classes.unsqueeze(-1).expand(-1, -1, scores.shape[1])
    of_class = scores.transpose(1, 2).gather(1, index)  # [B, n, L]
    metric = of_class.pow(SCORE_POWER) * overlaps.pow(OVERLAP_POWER)
    inside = _inside(points, targets.boxes)
    best = (metric * inside).topk(min(ALIGNED_CANDIDATES, metric.shape[2])).indices
    near = torch.zeros_like(inside).scatter_(2, best, True)
    mask = near & inside & targets.real.unsqueeze(-1)
    mask = _one_object_per_place(mask, overlaps)
    metric = metric * mask
    highest = metric.amax(dim=2, keepdim=True)
    widest = (overlaps * mask).amax(dim=2, keepdim=True)
    aligned = (metric / (highest + TINY) * widest).amax(dim=1)
    return _gather(mask, aligned, targets, scores.shape[2])


def detection_losses(
    head: Head, raw: RawOutputs, targets: Targets, *, static: Tensor
) -> dict[str, Tensor]:
    """`loss`, and its parts `loss_cls`, `loss_iou`, `loss_dfl` before their weights.

    Args:
        head: for the numbers of its distributions.
        raw: its outputs.
        targets: the objects of the batch.
        static: a bool `[]`: assign by distance (ATSS), else by alignment. Both are computed, so
            that one CUDA graph serves the whole training.
    """
    logits, sides = raw.logits.float(), raw.sides.float()
    points, strides = places(raw.sizes, logits.device)
    cells = decode(points, head.distances(sides))  # [B, L, 4], in cells
    scores = logits.sigmoid()
    pixels, middles = cells.detach() * strides, points * strides
    counts = [height * width for height, width in raw.sizes]
    near = assign_by_distance(pixels, middles, strides, counts, targets, logits.shape[2])
    aligned = assign_by_alignment(scores.detach(), pixels, middles, targets)
    found = Assignment(
        *(
            torch.where(static, getattr(near, part.name), getattr(aligned, part.name))
            for part in fields(Assignment)
        )
    )
    total = found.scores.sum().clamp(min=1.0)
    weight = found.scores.sum(dim=2)  # [B, L]; 0 for places without an object
    wanted = found.boxes / strides
    losses = {
        "loss_cls": _varifocal(logits, scores, found).sum() / total,
        "loss_iou": (_giou_loss(cells, wanted) * weight).sum() / total,
        "loss_dfl": (_distribution_loss(sides, points, wanted) * weight).sum() / total,
    }
    loss = WEIGHTS["class"] * losses["loss_cls"]
    loss = loss + WEIGHTS["iou"] * losses["loss_iou"] + WEIGHTS["dfl"] * losses["loss_dfl"]
    return {"loss": loss, **losses}


def _varifocal(logits: Tensor, scores: Tensor, found: Assignment) -> Tensor:
    """`[B, L, K]`. The weights learn too, as in PaddleDetection."""
    weight = FOCAL_ALPHA * scores.pow(FOCAL_GAMMA) * (1 - found.classes) + found.scores
    entropy = F.binary_cross_entropy_with_logits(logits, found.scores, reduction="none")
    return weight * entropy


def _giou_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """One minus the generalised overlap of boxes, pair by pair: `[B, L, 4]` twice -> `[B, L]`."""
    epsilon = 1e-10
    inner = torch.minimum(found[..., 2:], wanted[..., 2:])
    inner = (inner - torch.maximum(found[..., :2], wanted[..., :2])).clamp(0)
    outer = torch.maximum(found[..., 2:], wanted[..., 2:])
    outer = outer - torch.minimum(found[..., :2], wanted[..., :2])
    overlap = inner[..., 0] * inner[..., 1]
    union = _area(found) + _area(wanted) - overlap + epsilon
    around = outer[..., 0] * outer[..., 1] + epsilon
    return 1 - (overlap / union - (around - union) / around)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _distribution_loss(sides: Tensor, points: Tensor, wanted: Tensor) -> Tensor:
    """Cross entropy with the two whole numbers beside each distance, mean of four: `[B, L]`."""
    distances = torch.cat([points - wanted[..., :2], wanted[..., 2:] - points], dim=-1)
    distances = distances.clamp(0, BINS - 1 - 0.01)  # so that there is a number above
    lower = distances.floor()
    share = distances - lower  # [B, L, 4]
    logs = sides.log_softmax(dim=3)
    index = lower.long().unsqueeze(-1)
    below, above = logs.gather(3, index), logs.gather(3, index + 1)
    return -(below.squeeze(-1) * (1 - share) + above.squeeze(-1) * share).mean(dim=2)
