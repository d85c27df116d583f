"""Boundary metrics against masks counted by hand and against scipy."""

import cv2
import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ppvision.metrics import BoundaryFScore, BoundaryIoU, TrimapIoU
from tests.helpers import reference_boundary as reference
from tests.helpers.messages import raises_naming

METRICS = (BoundaryIoU, BoundaryFScore, TrimapIoU)


def blobs(rng: np.random.Generator, height: int, width: int, classes: int) -> np.ndarray:
    """A map `[H, W]` of smooth regions."""
    noise = rng.normal(size=(classes, height, width))
    smooth = ndimage.gaussian_filter(noise, (0, height / 12, width / 12))
    return smooth.argmax(axis=0)


def shaken(rng: np.random.Generator, label: np.ndarray, classes: int) -> np.ndarray:
    """A prediction: the label, shifted, with some pixels wrong."""
    moved = np.roll(label, rng.integers(-3, 4, 2), (0, 1))
    return np.where(rng.random(label.shape) < 0.02, rng.integers(classes, size=label.shape), moved)


def computed(metric, preds, labels):
    for pred, label in zip(preds, labels, strict=True):
        metric.update(pred, label)
    return metric.compute()


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_scipy_class_by_class(seed):
    rng = np.random.default_rng(seed)
    classes = 5
    sizes = [(64, 80), (33, 90), (120, 47)]  # two and three pixels deep, summed over the set
    labels = [blobs(rng, *size, classes) for size in sizes]
    preds = [shaken(rng, label, classes) for label in labels]

    found = computed(BoundaryIoU(classes), preds, labels)
    expected = reference.boundary_iou(preds, labels, classes)
    np.testing.assert_allclose(found["class_BoundaryIoU"], expected, atol=1e-12)
    assert found["BoundaryIoU"] == pytest.approx(np.nanmean(expected))

    found = computed(BoundaryFScore(classes), preds, labels)
    for tolerance in (3, 5, 9):
        expected = reference.boundary_f(preds, labels, classes, tolerance)
        np.testing.assert_allclose(found[f"class_BoundaryF{tolerance}"], expected, atol=1e-12)
        assert found[f"BoundaryF{tolerance}"] == pytest.approx(np.nanmean(expected))

    for width in (1, 5, 20):
        found = computed(TrimapIoU(classes, width=width), preds, labels)
        expected = reference.trimap_iou(preds, labels, classes, width)
        np.testing.assert_allclose(found["class_TrimapIoU"], expected, atol=1e-12)
        assert found["TrimapIoU"] == pytest.approx(np.nanmean(expected))


@pytest.mark.parametrize("at_once", [1, 50, 10**6])
def test_f_score_is_the_same_however_many_pixels_are_looked_at(monkeypatch, at_once):
    rng = np.random.default_rng(0)
    label = blobs(rng, 64, 80, 4)
    pred = shaken(rng, label, 4)
    pred[:, 40:] = 0  # boundaries without any to be found
    monkeypatch.setattr("ppvision.metrics.boundary.LOOKED_AT_ONCE", at_once)
    found = computed(BoundaryFScore(4), [pred], [label])
    for tolerance in (3, 5, 9):
        expected = reference.boundary_f([pred], [label], 4, tolerance)
        np.testing.assert_allclose(found[f"class_BoundaryF{tolerance}"], expected, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_equal_to_scipy_on_noise_of_any_size(height, width, classes, seed):
    rng = np.random.default_rng(seed)
    pred, label = rng.integers(classes, size=(2, height, width))
    found = computed(BoundaryIoU(classes), [pred], [label])["class_BoundaryIoU"]
    np.testing.assert_allclose(found, reference.boundary_iou([pred], [label], classes))
    found = computed(BoundaryFScore(classes, tolerances=(2,)), [pred], [label])
    expected = reference.boundary_f([pred], [label], classes, 2)
    np.testing.assert_allclose(found["class_BoundaryF2"], expected)
    found = computed(TrimapIoU(classes, width=2), [pred], [label])["class_TrimapIoU"]
    np.testing.assert_allclose(found, reference.trimap_iou([pred], [label], classes, 2))


def test_noise_far_from_any_boundary_takes_distance_transforms(monkeypatch):
    """Not 253 offsets for every pixel of it; a good prediction needs no transform."""
    rng = np.random.default_rng(3)
    transforms, transform = [], cv2.distanceTransform
    monkeypatch.setattr(
        cv2, "distanceTransform", lambda *given: transforms.append(given) or transform(*given)
    )
    tall = blobs(rng, 98, 128, 4)
    label, shifted = tall[2:], tall[:-2]
    for pred, count in ((rng.integers(6, size=label.shape), 4), (shifted, 0)):
        transforms.clear()
        found = computed(BoundaryFScore(6), [pred], [label])
        assert len(transforms) == count  # classes 4 and 5 are not in the label
        for tolerance in (3, 5, 9):
            expected = reference.boundary_f([pred], [label], 6, tolerance)
            np.testing.assert_allclose(found[f"class_BoundaryF{tolerance}"], expected, atol=1e-12)


def test_boundary_iou_of_a_square_by_hand():
    # 10 x 10: the diagonal is 14.1, 2 % of it 0.28, so the boundary is one pixel deep.
    label = np.zeros((10, 10), np.int64)
    label[2:8, 2:8] = 1  # 6 x 6: a ring of 20 pixels
    pred = np.zeros_like(label)
    pred[2:8, 3:9] = 1  # one to the right
    # Rings share 2 rows of 5; left column of pred's (at 3) and right one of label's (at 7) lie
    # inside the other's square but not on its ring.
    assert computed(BoundaryIoU(2), [pred], [label])["class_BoundaryIoU"][1] == 10 / (20 + 20 - 10)


def test_the_pictures_edge_is_a_boundary_for_iou_and_none_for_f():
    label = np.ones((10, 10), np.int64)  # one class: its boundary is the frame of 36 pixels
    metric = BoundaryIoU(2)
    metric.update(label, label)
    assert metric.counts[:, 1].tolist() == [36, 36, 36]
    assert np.isnan(computed(BoundaryFScore(2), [label], [label])["BoundaryF3"])
    assert np.isnan(computed(TrimapIoU(2), [label], [label])["TrimapIoU"])


def test_f_score_of_two_halves_by_hand():
    # The boundary runs between columns 9 and 10 in the label, 13 and 14 in the prediction: boundary
    # pixels of class 0 lie in columns 9 and 13, of class 1 in columns 10 and 14, four apart.
    label = np.zeros((20, 30), np.int64)
    label[:, 10:] = 1
    pred = np.zeros_like(label)
    pred[:, 14:] = 1
    found = computed(BoundaryFScore(2), [pred], [label])
    assert (found["BoundaryF3"], found["BoundaryF5"], found["BoundaryF9"]) == (0.0, 1.0, 1.0)


def test_trimap_of_two_halves_by_hand():
    # Boundary columns 9 and 10, band of two: columns 7 to 12; the prediction is off by one column.
    label = np.zeros((20, 30), np.int64)
    label[:, 10:] = 1
    pred = np.zeros_like(label)
    pred[:, 11:] = 1
    found = computed(TrimapIoU(2, width=2), [pred], [label])["class_TrimapIoU"]
    assert found.tolist() == [3 / 4, 2 / 3]


@pytest.mark.parametrize("metric", METRICS)
def test_ignored_pixels_count_in_nothing(metric):
    rng = np.random.default_rng(0)
    label = blobs(rng, 60, 60, 3)
    pred = shaken(rng, label, 3)
    label[20:40, 10:50] = 255
    other = pred.copy()
    other[label == 255] = rng.integers(3, size=(label == 255).sum())
    first, second = metric(3), metric(3)
    first.update(pred, label)
    second.update(other, label)
    assert first.counts.sum() > 0
    np.testing.assert_array_equal(first.counts, second.counts)


def test_a_class_does_not_end_at_an_ignored_pixel():
    label = np.zeros((10, 20), np.int64)
    label[:, 10:] = 255
    metric = BoundaryIoU(1)
    metric.update(np.zeros_like(label), label)
    assert metric.counts[2, 0] == 10 + 9 + 9  # three sides of the picture, not the fourth
    score = BoundaryFScore(2)
    label[:, 12:] = 1  # two ignored columns between the classes: no pixel touches the other class
    score.update(np.zeros_like(label), label)
    assert score.counts[1].sum() == 0


@pytest.mark.parametrize("metric", METRICS)
def test_a_perfect_prediction_has_one_and_nothing_seen_nan(metric):
    label = blobs(np.random.default_rng(1), 50, 70, 4)
    empty = metric(5).compute()
    assert all(np.isnan(value).all() for value in empty.values())
    for name, value in computed(metric(5), [label], [label]).items():
        if name.startswith("class_"):
            assert value[:4].tolist() == [1.0] * 4
            assert np.isnan(value[4])  # a class that does not occur is not in the mean
        else:
            assert value == 1.0


@pytest.mark.parametrize("metric", METRICS)
def test_batches_tensors_and_small_types(metric):
    rng = np.random.default_rng(2)
    labels = np.stack([blobs(rng, 40, 40, 3) for _ in range(2)])
    preds = np.stack([shaken(rng, label, 3) for label in labels])
    labels[:, :3] = 255
    one_by_one = computed(metric(3), preds, labels)
    batch = metric(3)
    batch.update(paddle.to_tensor(preds), labels.astype(np.uint8))
    for name, value in batch.compute().items():
        np.testing.assert_array_equal(value, one_by_one[name])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("pred", "label", "tokens"),
    [
        (np.zeros((4, 5), int), np.zeros((5, 4), int), "size [4, 5] [5, 4]"),
        (np.zeros(4, int), np.zeros(4, int), "maps [4]"),
        (np.zeros((0, 4), int), np.zeros((0, 4), int), "maps [0,"),
        (np.zeros((2, 3, 4, 4), int), np.zeros((2, 4, 4), int), "(argmax) logits"),
        (np.zeros((4, 4)), np.zeros((4, 4), int), "pred: float64"),
        (np.zeros((4, 4), int), np.full((4, 4), 3), "label: 0 2 3"),
        (np.full((4, 4), 255), np.zeros((4, 4), int), "pred: 0 2 255"),
        (np.full((4, 4), -1), np.zeros((4, 4), int), "pred: -1"),
        (np.zeros((4, 4), int), np.full((4, 4), 70000), "label: 70000"),
    ],
)
def test_bad_input(metric, pred, label, tokens):
    with raises_naming(ValueError, *tokens.split()):
        metric(3).update(pred, label)


@pytest.mark.parametrize("metric", METRICS)
def test_of_a_batch_with_a_bad_picture_nothing_counts(metric):
    label = blobs(np.random.default_rng(4), 30, 30, 3)
    bad = label.copy()
    bad[0, 0] = 7
    found = metric(3)
    with raises_naming(ValueError, "pred:", "0", "2", "7"):
        found.update(np.stack([label, bad]), np.stack([label, label]))
    assert not found.counts.any()


@pytest.mark.parametrize("metric", METRICS)
def test_masks_of_bool_channels_of_one_and_numpy_options(metric):
    mask = blobs(np.random.default_rng(5), 40, 40, 2)
    shifted = np.roll(mask, 1, 0)
    plain, other = metric(2), metric(np.int64(2))
    plain.update(shifted, mask)
    other.update(shifted[None, None].astype(bool), mask[None].astype(bool))
    assert plain.counts.sum() > 0
    np.testing.assert_array_equal(other.counts, plain.counts)


@pytest.mark.parametrize("metric", METRICS)
def test_an_ignored_class_is_not_scored(metric):
    label = blobs(np.random.default_rng(6), 60, 60, 3)
    pred = np.where(label == 1, 0, label)  # class 0 is predicted where 1 is
    found = computed(metric(3, ignore_index=0), [pred], [label])
    for name in (name for name in found if not name.startswith("class_")):
        classes = found[f"class_{name}"]
        assert np.isnan(classes[0])
        assert classes[1] == 0  # that is its own error
        assert found[name] == np.mean(classes[1:])


@pytest.mark.parametrize("metric", METRICS)
def test_255_is_ignored_among_more_classes_unless_another_is_named(metric):
    label = blobs(np.random.default_rng(7), 60, 60, 2) + 254  # classes 254 and 255
    for name, value in computed(metric(300), [label], [label]).items():
        if name.startswith("class_"):
            assert np.isnan(value[255])
    for name, value in computed(metric(300, ignore_index=-1), [label], [label]).items():
        if name.startswith("class_"):
            assert value[254:256].tolist() == [1.0, 1.0]


def test_bad_options():
    for bad in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="num_classes"):
            BoundaryIoU(bad)
    with pytest.raises(ValueError, match="32767"):
        BoundaryIoU(32768)
    for bad in (0, "a"):
        with pytest.raises(ValueError, match="dilation_ratio"):
            BoundaryIoU(2, dilation_ratio=bad)
    for bad in (None, "255", True):
        with pytest.raises(ValueError, match="ignore_index"):
            BoundaryIoU(2, ignore_index=bad)
    far = np.array([[2**63 + 5]], np.uint64)
    with pytest.raises(ValueError, match=str(2**63 + 5)):
        BoundaryIoU(2).update(far, np.zeros((1, 1), np.uint8))
    for bad in ((3, 0), (), (2.5,)):
        with pytest.raises(ValueError, match="tolerances"):
            BoundaryFScore(2, tolerances=bad)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        BoundaryFScore(2, tolerances=3)
    with pytest.raises(ValueError, match="width"):
        TrimapIoU(2, width=0)
