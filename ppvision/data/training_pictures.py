"""Class folders for training: images that grow with the epochs, and a teacher's answers."""

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from ppvision.data.augment import RecordedFlip
from ppvision.data.class_folders import ClassFolders


class TrainingPictures(ClassFolders):
    """`ClassFolders` whose images may have another size in each epoch, and a teacher's answers.

    Args:
        side_at: side in pixels of the images of an epoch (from 0), to which they are resized
            after all transforms; None leaves them as the transforms give them. Default None.
        **options: of `ClassFolders`.

    Attributes:
        answers: `[N, 2, K]` logits of each whole image and of its left-right mirror; a sample is
            then `(image, class number, logits [K] float32)`. Default None.
    """

    def __init__(self, *, side_at: Callable[[int], int] | None = None, **options: object) -> None:
        super().__init__(**options)
        self.answers: np.ndarray | None = None
        self._side_at = side_at
        self._side: int | None = None
        self._flips: Sequence[RecordedFlip] = [
            transform for transform in self.transforms if isinstance(transform, RecordedFlip)
        ]

    def set_epoch(self, epoch: int) -> None:
        """Set the size of an epoch; the engine calls it before every sample."""
        if self._side_at is not None:
            self._side = self._side_at(epoch)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        image, label = super().__getitem__(index)
        if self._side is not None:
            image = _resize(image, self._side)
        if self.answers is None:
            return image, label
        mirrored = sum(flip.flipped for flip in self._flips) % 2
        return image, label, self.answers[index, mirrored].astype(np.float32)


def _resize(image: np.ndarray, side: int) -> np.ndarray:
    """`[3, H, W]` -> `[3, side, side]`."""
    if image.shape[1:] == (side, side):
        return image
    # If the image shrinks, take the mean over areas: linear interpolation would alias.
    shrinks = side < min(image.shape[1:])
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = cv2.resize(image.transpose(1, 2, 0), (side, side), interpolation=interpolation)
    return np.ascontiguousarray(resized.transpose(2, 0, 1))
