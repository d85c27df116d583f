"""Counts of an evaluation of a segmentation model, and the scores from them."""

import logging
import re
from dataclasses import dataclass, field

import numpy as np
import paddle

import ppvision.plugins.paddleseg  # noqa: F401  (repairs PaddleSeg's metrics)

# isort: split
from paddleseg.utils import metrics

from ppvision.metrics import BoundaryFScore, BoundaryIoU, TrimapIoU
from ppvision.tables import format_table
from ppvision.tasks.scores import make_class_rows, replace_non_finite

logger = logging.getLogger("ppvision")

BOUNDARY_SCORES = ("BoundaryIoU", "BoundaryF3", "BoundaryF5", "BoundaryF9", "TrimapIoU")


@dataclass(frozen=True)
class Scores:
    """The result of an evaluation, with the classes in order.

    Attributes:
        miou, accuracy, kappa, class_iou, class_precision: as PaddleSeg's `evaluate` defines them.
        boundary: the means of `BOUNDARY_SCORES`; nan if the set has no boundary.
        class_boundary: the same per class, nan for classes that do not occur.
    """

    miou: float
    accuracy: float
    kappa: float
    class_iou: np.ndarray
    class_precision: np.ndarray
    boundary: dict[str, float] = field(default_factory=dict)
    class_boundary: dict[str, np.ndarray] = field(default_factory=dict)

    def by_tag(self) -> dict[str, float]:
        """Return `Evaluate/mIoU`, ...; undefined scores are omitted."""
        found = {"mIoU": self.miou, "Acc": self.accuracy, **self.boundary}
        return {f"Evaluate/{name}": value for name, value in found.items() if np.isfinite(value)}

    @property
    def _columns(self) -> dict[str, np.ndarray]:
        return {"IoU": self.class_iou, "precision": self.class_precision, **self.class_boundary}

    def as_dict(self, names: list[str]) -> dict[str, object]:
        """Return `scores` by name and `classes`, each with its `name` and scores; None for
        undefined values. `names` are those of the classes, or empty for numbers."""
        means = {"mIoU": self.miou, "Acc": self.accuracy, "Kappa": self.kappa, **self.boundary}
        return {
            "scores": {name: replace_non_finite(value) for name, value in means.items()},
            "classes": make_class_rows(self._columns, names),
        }

    def table(self, names: list[str]) -> str:
        """Format the scores as text; `names` are those of the classes, or empty for numbers."""
        names = names or [str(index) for index in range(len(self.class_iou))]
        columns = self._columns
        rows = zip(names, *columns.values(), strict=True)
        lines = [format_table([*_split_heads(["class", *columns]), *rows])]
        if any(np.isnan(scores).any() for scores in self.class_boundary.values()):
            lines.append("-: not in the mean; in mIoU (PaddleSeg's) an absent class counts as 0")
        lines.append(f"mIoU {self.miou:.4f}  Acc {self.accuracy:.4f}  Kappa {self.kappa:.4f}")
        if self.boundary:
            found = [f"{name} {value:.4f}" for name, value in self.boundary.items()]
            lines += ["  ".join(found[i : i + 4]) for i in range(0, len(found), 4)]
        return "\n".join(lines)


def _split_heads(names: list[str]) -> list[list[str]]:
    """Split names of columns into two rows, so that a table fits a terminal of 80 columns."""
    parts = [re.fullmatch(r"((?:Boundary|Trimap)?)(.*)", name) for name in names]
    heads = [[part[1] for part in parts if part], [part[2] for part in parts if part]]
    return heads if any(heads[0]) else heads[1:]


class Scoring:
    """Counts images one by one: PaddleSeg's areas, and our metrics along the boundaries.

    Args:
        num_classes: number of classes of the data set.
        ignore_index: label of pixels that do not count.
    """

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.areas = np.zeros((3, num_classes), np.int64)  # in both, predicted, true
        self.f_score = BoundaryFScore(num_classes, ignore_index)
        self.boundaries = [
            BoundaryIoU(num_classes, ignore_index),
            self.f_score,
            TrimapIoU(num_classes, ignore_index),
        ]

    def update(self, prediction: np.ndarray, label: np.ndarray) -> None:
        """Add one image.

        Args:
            prediction: classes `[H, W]`.
            label: true classes `[H, W]`.
        """
        areas = metrics.calculate_area(
            paddle.to_tensor(prediction.astype(np.int64)[None]),
            paddle.to_tensor(label.astype(np.int64)[None]),
            self.num_classes,
            self.ignore_index,
        )
        self.areas += np.stack([area.numpy() for area in areas])
        for metric in self.boundaries:
            metric.update(prediction, label)

    def add_other_ranks(self) -> None:
        """Sum the counts of the processes of a data-parallel run."""
        if paddle.distributed.get_world_size() < 2:
            return
        everything = [self.areas, *(metric.counts for metric in self.boundaries)]
        total = paddle.to_tensor(np.concatenate([counts.ravel() for counts in everything]))
        paddle.distributed.all_reduce(total)
        sizes = np.cumsum([counts.size for counts in everything])[:-1]
        for counts, summed in zip(everything, np.split(total.numpy(), sizes), strict=True):
            counts[...] = summed.reshape(counts.shape)

    def scores(self) -> Scores:
        """Return the scores of all images so far; warn if the labels have no boundary."""
        _, true_boundary = self.f_score.counts[:, 0]
        classes = np.count_nonzero(self.areas[2])
        if classes > 1 and not true_boundary.any():
            logger.warning(
                f"labels: {classes} classes, no two of which touch (ignored pixels between them?): "
                "boundary F-score and trimap IoU have no meaning here; Boundary IoU has"
            )
        areas = [paddle.to_tensor(area) for area in self.areas]
        class_iou, miou = metrics.mean_iou(*areas)
        accuracy, precision, _ = metrics.class_measurement(*areas)
        found = {k: v for metric in self.boundaries for k, v in metric.compute().items()}
        return Scores(
            float(miou),
            float(accuracy),
            float(metrics.kappa(*areas)),
            class_iou,
            precision,
            {name: float(value) for name, value in found.items() if name in BOUNDARY_SCORES},
            {name: np.asarray(found[f"class_{name}"]) for name in BOUNDARY_SCORES if name in found},
        )
