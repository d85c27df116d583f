"""A sample of values, for the steps of activations."""

import numpy as np


def draw_evenly(values: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw values from all parts of an array: one at random from each of `count` equal parts.

    A fixed stride would not do. Sizes of maps and numbers of channels are often powers of two, and
    then every value at such a stride is of the same few channels or columns.

    Args:
        values: of any shape.
        count: how many, at least 1.
        random: generator of the places.

    Returns:
        `[count]`, a copy; all values if there are no more.
    """
    flat = values.reshape(-1)
    if flat.size <= count:
        return flat.copy()
    places = (np.arange(count) + random.random(count)) * (flat.size / count)
    return flat[np.minimum(places.astype(np.int64), flat.size - 1)]


class ValueSample:
    """Values of one tensor over many batches, as many of each batch.

    Args:
        per_batch: values kept of a batch, at most.
        in_all: values kept, at most. Beyond it half of them go, and later batches give half.

    Attributes:
        low: the least of all values that were added, or 0 if that is less.
        high: the greatest, or 0.
        count: number of values that were added.
    """

    def __init__(self, per_batch: int, in_all: int) -> None:
        self._per_batch, self._in_all = per_batch, in_all
        self._random = np.random.default_rng(0)  # the same values give the same sample
        self._parts: list[np.ndarray] = []
        self._share = 1.0
        self.low, self.high, self.count = 0.0, 0.0, 0

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def add(self, values: np.ndarray) -> None:
        """Add a batch of float32 values, of any shape."""
        self.low = min(self.low, float(values.min(initial=0.0)))
        self.high = max(self.high, float(values.max(initial=0.0)))
        self.count += values.size
        if not values.size:
            return
        count = max(1, round(self._share * min(values.size, self._per_batch)))
        self._parts.append(draw_evenly(values, count, self._random))
        while len(self) > self._in_all:
            self._share /= 2
            self._parts = [draw_evenly(self.values, len(self) // 2, self._random)]

    @property
    def values(self) -> np.ndarray:
        """The values that were kept, `[N]`."""
        return np.concatenate(self._parts) if self._parts else np.zeros(0, np.float32)
