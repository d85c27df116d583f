"""The result of a detector for one image."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Detections:
    """The objects that a detector found in one image, sorted by score, the highest first.

    Attributes:
        boxes: `[N, 4]` float32: left, top, right, bottom in pixels of the image as it was given.
        scores: `[N]` float32, 0 to 1.
        class_ids: `[N]` int64.
        names: names of the N objects' classes, or None if the model has no names.
        masks: `[N, H, W]` bool at the image's own size, or None for a detector without.
    """

    boxes: np.ndarray
    scores: np.ndarray
    class_ids: np.ndarray
    names: list[str] | None
    masks: np.ndarray | None

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> "Detections":
        """Return the objects with at least this score."""
        return self._of(self.scores >= score)

    def _of(self, kept: np.ndarray) -> "Detections":
        """Select objects: by `[N]` bool, or by places in a new order."""
        names = None if self.names is None else [str(n) for n in np.array(self.names)[kept]]
        masks = None if self.masks is None else self.masks[kept]
        return Detections(self.boxes[kept], self.scores[kept], self.class_ids[kept], names, masks)


def collect_detections(
    rows: np.ndarray, masks: np.ndarray | None, class_names: list[str]
) -> Detections:
    """Make the result from a detector's rows for one image.

    Args:
        rows: `[N, 6]` of class, score, left, top, right, bottom. PaddleDetection marks rows without
            an object by class -1, and adds a box of score 0 to an image without objects; both are
            omitted.
        masks: `[N, H, W]`, 1 inside the object, or None.
        class_names: names of all classes, or empty.
    """
    class_ids = rows[:, 0].astype(np.int64)
    names = [class_names[k] if 0 <= k < len(class_names) else str(k) for k in class_ids]
    found = Detections(
        rows[:, 2:6].astype(np.float32),
        rows[:, 1].astype(np.float32),
        class_ids,
        names if class_names else None,
        None if masks is None else masks > 0,
    )
    found = found._of((class_ids >= 0) & (found.scores > 0))
    return found._of(np.argsort(-found.scores, kind="stable"))
