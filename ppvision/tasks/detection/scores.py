"""The scores of a detector."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.cocoeval import COCOeval

from ppvision.tables import format_table
from ppvision.tasks.scores import make_class_rows

# Names of pycocotools' list of twelve, in its order.
_COCO = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


@dataclass(frozen=True)
class Scores:
    """The result of an evaluation.

    Attributes:
        means: by kind ("bbox", "mask") and name: COCO's average precisions ("AP": the mean over
            overlaps of 0.50 to 0.95), or VOC's "mAP". Undefined values (for sizes that do not
            occur) are missing.
        by_class: average precision by kind, one number per class; nan for a class without objects.
    """

    means: dict[str, dict[str, float]]
    by_class: dict[str, np.ndarray]

    def by_tag(self) -> dict[str, float]:
        """Return `Evaluate/bbox_AP`, ...; the first score decides which model is the best."""
        return {
            f"Evaluate/{kind}_{name}": value
            for kind, found in self.means.items()
            for name, value in found.items()
        }

    def as_dict(self, names: Sequence[str]) -> dict[str, object]:
        """Return `scores` by name (`bbox_AP`, ...) and `classes`, each with its `name` and the
        average precision by kind; None for a class without objects. `names` may be empty."""
        means = {tag.partition("/")[2]: float(value) for tag, value in self.by_tag().items()}
        return {"scores": means, "classes": make_class_rows(self.by_class, names)}

    def table(self, names: Sequence[str]) -> str:
        """Format the scores as text; `names` are those of the classes, or empty for numbers."""
        count = len(next(iter(self.by_class.values())))
        names = list(names) or [str(index) for index in range(count)]
        rows = zip(names, *self.by_class.values(), strict=False)
        lines = [format_table([("class", *self.by_class), *rows], "<>")]
        lines += [
            f"{kind}: " + "  ".join(f"{name} {value:.4f}" for name, value in found.items())
            for kind, found in self.means.items()
        ]
        return "\n".join(lines)


def name_coco_means(stats: Sequence[float]) -> dict[str, float]:
    """Return pycocotools' `stats` by name; -1 means that the set does not define a value."""
    return {n: float(v) for n, v in zip(_COCO, stats, strict=False) if v > -1}


def average_coco_by_class(evaluated: COCOeval) -> np.ndarray:
    """Return the average precision of every class, over overlaps of 0.50 to 0.95 and all sizes.

    Args:
        evaluated: pycocotools' evaluation after `accumulate`.
    """
    precision = evaluated.eval["precision"][:, :, :, 0, -1]  # [overlap, recall, class]
    known = precision > -1
    sums = np.where(known, precision, 0).sum(axis=(0, 1))
    counts = known.sum(axis=(0, 1))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
