"""Text tables."""

import math

import numpy as np
import pytest

from ppvision.tables import format_records, format_table


def test_columns_are_aligned_and_numbers_short():
    rows = [("class", "IoU", "note"), ("road", 0.51, "a"), ("s", math.nan, None), ("t", 12, "")]
    assert format_table(rows, "<><").splitlines() == [
        "class     IoU  note",
        "road   0.5100  a",
        "s           -  -",
        "t          12",
    ]
    assert format_table([("a",), (np.float32(0.25),), (np.int64(3),)]) == "a\n0.2500\n3"


def test_records_stand_under_their_keys():
    records = [{"bits": 8, "mIoU": 0.5}, {"bits": 2, "mIoU": 0.25}]
    assert format_records(records) == "bits    mIoU\n   8  0.5000\n   2  0.2500"


def test_rows_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="zip"):
        format_table([("a", "b"), ("c",)])
