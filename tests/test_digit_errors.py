"""`benchmark/digit_errors.py`: what its numbers mean, by hand."""

import numpy as np
import pytest

from benchmark.digit_errors import describe_errors, reduce_label


def test_strokes_and_classes_are_told_apart():
    # 80 of background; of class 1, 6 found, 2 taken for class 2, 2 missed; class 2: 10 found.
    pixels = np.array([[80, 0, 0], [2, 6, 2], [0, 0, 10]])
    found = describe_errors(pixels)
    assert found["stroke_iou"] == pytest.approx(18 / 20)
    assert found["class_share"] == pytest.approx(16 / 18)
    assert found["mIoU"] == pytest.approx((80 / 82 + 6 / 10 + 10 / 12) / 3)


def test_a_thin_line_is_lost_at_the_stride():
    label = np.zeros((32, 32), np.uint8)
    label[:, 5] = 1  # a quarter of its cells
    label[:, 12:24] = 2  # whole cells
    found = reduce_label(label, 3)
    assert found.shape == label.shape
    assert set(np.unique(found)) == {0, 2}
    np.testing.assert_array_equal(found[:, 14:22], 2)
