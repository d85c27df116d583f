"""Boundary metrics of segmentation: Boundary IoU, boundary F-score, trimap IoU.

All three count pixels per class over the whole set and divide once at the end; the mean is over the
classes that occur. Papers that average over images get other numbers.

A class ends at a pixel if another class is within reach. One test of the whole map finds this for
all classes: two filters of OpenCV give the largest and the smallest class within the window.
Ignored pixels have no class (we chose this): they count in no sum, whatever is predicted there, and
a class does not end at them. If labels separate all classes by a strip of ignored pixels (PASCAL
VOC), F-score and trimap IoU therefore find no true boundary: trimap IoU is nan; F is nan, or 0 for
classes with a predicted boundary. Boundary IoU looks across the strip. A class whose number is the
`ignore_index` is not scored (nan). Predicting it where another class is true is an error of that
class.
"""

from abc import ABC, abstractmethod
from numbers import Integral

import cv2
import numpy as np

from ppvision.errors import InputError, shorten

_NONE = -1  # class of pixels that do not count
MOST_CLASSES = np.iinfo(np.int16).max  # OpenCV's filters accept no wider integers
WIDEST_DISC = 16  # pixels up to which a filter is faster than a distance transform
LOOKED_AT_ONCE = (
    2**14
)  # pixels that the search for the nearest boundary tests together; we chose it


def boundary_depth(height: int, width: int, dilation_ratio: float = 0.02) -> int:
    """Return the depth in pixels of a boundary in Boundary IoU, for an image of this size."""
    return max(1, round(dilation_ratio * float(np.hypot(height, width))))


def other_class_near(classes: np.ndarray, reach: int, beyond_edge: bool) -> np.ndarray:
    """Find pixels with another class in the square of `2 * reach + 1` around them, `[H, W]` bool.

    Args:
        classes: `[H, W]` int16, -1 for ignored pixels (false there, and not another class).
        reach: in pixels.
        beyond_edge: whether the outside of the image counts as another class.
    """
    kernel = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    high = np.iinfo(np.int16).max
    ignored = classes == _NONE
    largest = cv2.dilate(
        classes, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=high if beyond_edge else _NONE
    )
    smallest = cv2.erode(
        np.where(ignored, high, classes), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=high
    )
    return ((largest != classes) | (smallest != classes)) & ~ignored


def _is_count(value: object) -> bool:
    """Return a whole number of at least 1; NumPy's are accepted too."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


class _CountedPerClass(ABC):
    """Base of the metrics: checked input, counts per class, a mean over classes that occur.

    Attributes:
        counts: whole numbers that add up over images (and over processes).
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        if not _is_count(num_classes):
            raise InputError(
                f"num_classes: expected a whole number of at least 1, got {shorten(num_classes)}."
            )
        if num_classes > MOST_CLASSES:
            raise InputError(f"num_classes: expected at most {MOST_CLASSES}, got {num_classes}.")
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int | np.integer):
            raise InputError(f"ignore_index: expected a whole number, got {shorten(ignore_index)}.")
        self.num_classes, self.ignore_index = num_classes, int(ignore_index)
        self.counts: np.ndarray = np.zeros(0, np.int64)

    def update(self, pred: np.ndarray, label: np.ndarray) -> None:
        """Add one image or a batch; after an error nothing of it is added.

        Args:
            pred: predicted classes, `[H, W]`, `[B, H, W]` or `[B, 1, H, W]` integers, or a mask of
                bool for classes 0 and 1 (array or tensor).
            label: true classes, in one of the same forms; `ignore_index` for unknown pixels.

        Raises:
            ValueError: other shapes or types, or a class out of range.
        """
        pred, label = np.asarray(pred), np.asarray(label)
        given = f"{list(pred.shape)} and {list(label.shape)}"
        pred, label = _as_batch(pred), _as_batch(label)
        if pred.shape != label.shape or pred.ndim != 3 or not pred.size:
            raise InputError(
                "pred, label: expected two maps [H, W], [B, H, W] or [B, 1, H, W] of one size, got "
                f"{given}. Take the classes (argmax) of logits first."
            )
        ignored = label == self.ignore_index
        pred, label = self._checked(pred, ignored, "pred"), self._checked(label, ignored, "label")
        for one_pred, one_label in zip(pred, label, strict=True):
            self._count(one_pred, one_label)

    def _checked(self, classes: np.ndarray, ignored: np.ndarray, name: str) -> np.ndarray:
        """Return `[B, H, W]` int16 with -1 for ignored pixels."""
        if classes.dtype.kind not in "iub":
            raise InputError(
                f"{name}: expected whole numbers, got {classes.dtype}. Take the argmax of "
                "probabilities, or astype(int) of class numbers."
            )
        if classes.min() < 0 or classes.max() >= self.num_classes:
            seen = classes[~ignored]  # ignored pixels may have any value
            if seen.size and (seen.min() < 0 or seen.max() >= self.num_classes):
                raise InputError(
                    f"{name}: expected classes from 0 to {self.num_classes - 1} (in the label also "
                    f"{self.ignore_index}), got {int(seen.min())} to {int(seen.max())}."
                )
        # Made once, in the narrow type of OpenCV's filters: three metrics do this for each map, and
        # wider copies took longer than the counting.
        small = classes.astype(np.int16)
        np.copyto(small, _NONE, where=ignored)
        return small

    def _per_class(self, classes: np.ndarray) -> np.ndarray:
        return np.bincount(classes, minlength=self.num_classes)

    def _with_mean(self, name: str, classes: np.ndarray) -> dict[str, float | np.ndarray]:
        if 0 <= self.ignore_index < self.num_classes:
            classes[self.ignore_index] = np.nan
        occurring = classes[~np.isnan(classes)]
        return {
            name: float(occurring.mean()) if occurring.size else float("nan"),
            f"class_{name}": classes,
        }

    @abstractmethod
    def _count(self, pred: np.ndarray, label: np.ndarray) -> None:
        """Add one image, `[H, W]` each, to `counts`."""

    @abstractmethod
    def compute(self) -> dict[str, float | np.ndarray]:
        """Return the scores so far: the mean by name, and under `class_<name>` one number per
        class, nan for a class that did not occur (all nan before the first image)."""


def _as_batch(classes: np.ndarray) -> np.ndarray:
    """Return `[H, W]` or `[B, 1, H, W]` as `[B, H, W]`, and other shapes unchanged."""
    if classes.ndim == 4 and classes.shape[1] == 1:
        return classes[:, 0]
    return classes[None] if classes.ndim == 2 else classes


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


class BoundaryIoU(_CountedPerClass):
    """IoU of the pixels along the inner side of each class's boundary.

    Args:
        num_classes: classes, from 0 on.
        ignore_index: label of pixels that do not count. Default 255, which is ignored even where it
            is one of more than 255 classes: name another one then.
        dilation_ratio: depth of the boundary as a fraction of the image's diagonal. Default 0.02.

    The boundary of a mask is the part that an erosion removes: 3x3, `max(1, round(0.02 *
    diagonal))` times, with zeros beyond the image's edge, so that the edge is a boundary too.

    Source: Cheng et al., "Boundary IoU", CVPR 2021, arXiv 2103.16562; per class over the whole set.
    """

    def __init__(
        self, num_classes: int, ignore_index: int = 255, dilation_ratio: float = 0.02
    ) -> None:
        super().__init__(num_classes, ignore_index)
        if not isinstance(dilation_ratio, float | int) or not 0 < dilation_ratio < 1:
            raise InputError(
                f"dilation_ratio: expected it in (0, 1), got {shorten(dilation_ratio)}."
            )
        self.dilation_ratio = dilation_ratio
        self.counts = np.zeros((3, num_classes), np.int64)  # in both, in pred, in label

    def _count(self, pred: np.ndarray, label: np.ndarray) -> None:
        depth = boundary_depth(label.shape[0], label.shape[1], self.dilation_ratio)
        of_pred = other_class_near(pred, depth, beyond_edge=True)
        of_label = other_class_near(label, depth, beyond_edge=True)
        both = of_pred & of_label & (pred == label)
        self.counts += [
            self._per_class(label[both]),
            self._per_class(pred[of_pred]),
            self._per_class(label[of_label]),
        ]

    def compute(self) -> dict[str, float | np.ndarray]:
        both, of_pred, of_label = self.counts
        return self._with_mean("BoundaryIoU", _ratio(both, of_pred + of_label - both))


def _squares_to_class(
    classes: np.ndarray, wanted: np.ndarray, row: np.ndarray, column: np.ndarray
) -> np.ndarray:
    """Return the squared distance from each place to the nearest pixel of the wanted class.

    Args:
        classes: `[H, W]`.
        wanted, row, column: `[N]` each.

    Returns:
        `[N]` int64; larger than the map if that class does not occur.
    """
    squares = np.full(len(wanted), np.iinfo(np.int64).max)
    for one in np.unique(wanted):
        others = (classes != one).astype(np.uint8)
        if others.all():
            continue
        distance = cv2.distanceTransform(others, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        here = wanted == one
        squares[here] = np.rint(np.square(distance[row[here], column[here]], dtype=np.float64))
    return squares


class BoundaryFScore(_CountedPerClass):
    """F-score of boundary pixels that are found within a tolerance.

    Args:
        num_classes: classes, from 0 on.
        ignore_index: label of pixels that do not count. Default 255, which is ignored even where it
            is one of more than 255 classes: name another one then.
        tolerances: Euclidean, in pixels. Default 3, 5 and 9.

    A boundary pixel of a class has another class among its eight neighbours; the image's edge is
    not a boundary. Precision is the fraction of predicted boundary pixels with a true one of the
    same class within the tolerance. Recall is the reverse. Both are over the whole set, and F is
    their harmonic mean.

    Source: Csurka et al., "What is a good evaluation measure for semantic segmentation?", BMVC
    2013, who average over images. We chose counting over the set, and the tolerances.
    """

    def __init__(
        self, num_classes: int, ignore_index: int = 255, tolerances: tuple[int, ...] = (3, 5, 9)
    ) -> None:
        super().__init__(num_classes, ignore_index)
        if (
            not isinstance(tolerances, (tuple, list))
            or not tolerances
            or not all(_is_count(tolerance) for tolerance in tolerances)
        ):
            raise InputError(
                "tolerances: expected a tuple of whole numbers of pixels from 1 on, got "
                f"{shorten(tolerances)}. Write (3,) for one of 3."
            )
        self.tolerances = tuple(tolerances)
        # Boundary pixels of pred and of label, then those that are found, per tolerance.
        self.counts = np.zeros((2, 1 + len(tolerances), num_classes), np.int64)
        reach = max(tolerances)
        rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
        squares = rows**2 + columns**2
        order = np.argsort(squares, kind="stable")
        order = order[squares[order] <= reach**2]
        self._disc = rows[order], columns[order], squares[order]  # nearest first

    def _count(self, pred: np.ndarray, label: np.ndarray) -> None:
        boundaries = [
            np.where(other_class_near(classes, 1, beyond_edge=False), classes, np.int16(_NONE))
            for classes in (pred, label)
        ]
        for side, (mine, other) in enumerate((boundaries, boundaries[::-1])):
            classes, squares = self._nearest(mine, other)
            self.counts[side, 0] += self._per_class(classes)
            for number, tolerance in enumerate(self.tolerances, start=1):
                found = classes[squares <= tolerance**2]
                self.counts[side, number] += self._per_class(found)

    def _nearest(self, mine: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for every pixel of `mine` its class, and the squared distance to the nearest pixel
        of that class in `other` (beyond every tolerance if there is none).

        The search tries one offset after another, nearest first, for the pixels that are not found
        yet; most are found after a few. When it has tested as many pixels as a distance transform
        per class would, the transforms are used. The work is at most about twice that of the better
        method.
        """
        reach = max(self.tolerances)
        padded = np.pad(other, reach, constant_values=_NONE)
        pixels = np.flatnonzero(mine != _NONE)
        row, column = np.divmod(pixels, mine.shape[1])
        classes = mine.ravel()[pixels]
        squares = np.full(len(classes), reach**2 + 1, np.int64)
        left, wanted = np.arange(len(classes)), classes  # pixels that are not found yet
        looked_at, enough = 0, np.count_nonzero(self._per_class(classes)) * mine.size
        places = (row + reach) * padded.shape[1] + column + reach
        flat = padded.ravel()
        down, right, disc_squares = self._disc
        offsets = down * padded.shape[1] + right
        start = 0
        while len(left) and start < len(offsets):
            # Several offsets at once if few pixels are left, because a call of NumPy then takes
            # longer than its work.
            here = slice(start, start + max(1, LOOKED_AT_ONCE // len(left)))
            hits = flat.take(places[:, None] + offsets[here]) == wanted[:, None]  # [left, offsets]
            found = hits.any(axis=1)
            squares[left[found]] = disc_squares[here][hits[found].argmax(axis=1)]
            left, wanted, places = left[~found], wanted[~found], places[~found]
            start, looked_at = here.stop, looked_at + hits.size
            if looked_at > enough:
                squares[left] = _squares_to_class(other, wanted, row[left], column[left])
                break
        return classes, squares

    def compute(self) -> dict[str, float | np.ndarray]:
        (all_pred, *found_pred), (all_label, *found_label) = self.counts
        scores: dict[str, float | np.ndarray] = {}
        for tolerance, of_pred, of_label in zip(
            self.tolerances, found_pred, found_label, strict=True
        ):
            # 2PR / (P + R); 0 if only one of the two has a boundary.
            precision = of_pred / np.maximum(1, all_pred)
            recall = of_label / np.maximum(1, all_label)
            f_score = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
            f_score[all_pred + all_label == 0] = np.nan
            scores |= self._with_mean(f"BoundaryF{tolerance}", f_score)
        return scores


def _within(boundary: np.ndarray, distance: int) -> np.ndarray:
    """Find pixels `[H, W]` with one of `boundary` within a Euclidean distance."""
    if distance <= WIDEST_DISC:
        rows, columns = np.ogrid[-distance : distance + 1, -distance : distance + 1]
        disc = (rows**2 + columns**2 <= distance**2).astype(np.uint8)
        return cv2.dilate(boundary.astype(np.uint8), disc).astype(bool)
    distances = cv2.distanceTransform(
        (~boundary).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE
    )
    return distances <= distance


class TrimapIoU(_CountedPerClass):
    """mIoU within a band around the true boundaries.

    Args:
        num_classes: classes, from 0 on.
        ignore_index: label of pixels that do not count. Default 255, which is ignored even where it
            is one of more than 255 classes: name another one then.
        width: Euclidean distance from a boundary pixel up to which a pixel counts, on both sides.
            Default 5.

    A boundary pixel has another class among its eight neighbours; the image's edge is not a
    boundary.

    Source: Kohli et al., "Robust Higher Order Potentials for Enforcing Label Consistency", CVPR
    2008 (the trimap). We chose the default width.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, width: int = 5) -> None:
        super().__init__(num_classes, ignore_index)
        if not _is_count(width):
            raise InputError(
                f"width: expected a whole number of pixels from 1 on, got {shorten(width)}."
            )
        self.width = width
        self.counts = np.zeros((3, num_classes), np.int64)  # correct, predicted, true

    def _count(self, pred: np.ndarray, label: np.ndarray) -> None:
        boundary = other_class_near(label, 1, beyond_edge=False)
        if not boundary.any():
            return
        band = _within(boundary, self.width) & (label != _NONE)
        self.counts += [
            self._per_class(label[band & (pred == label)]),
            self._per_class(pred[band]),
            self._per_class(label[band]),
        ]

    def compute(self) -> dict[str, float | np.ndarray]:
        right, predicted, true = self.counts
        return self._with_mean("TrimapIoU", _ratio(right, predicted + true - right))
