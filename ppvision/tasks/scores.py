"""Convert scores of every task to plain values, for `ppvision eval --json`."""

import math
from collections.abc import Mapping, Sequence

import numpy as np


def replace_non_finite(value: float) -> float | None:
    """Return a Python number, or None for a number that JSON does not have (nan, infinity)."""
    return float(value) if math.isfinite(value) else None


def make_class_rows(
    columns: Mapping[str, np.ndarray | Sequence[float]], names: Sequence[str]
) -> list[dict[str, object]]:
    """Return one dictionary per class.

    Args:
        columns: K numbers per score.
        names: names of the K classes, or empty for numbers.
    """
    count = len(next(iter(columns.values())))
    names = list(names) or [str(number) for number in range(count)]
    return [
        {"name": name, **{key: replace_non_finite(column[k]) for key, column in columns.items()}}
        for k, name in enumerate(names)
    ]
