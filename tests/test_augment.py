"""Augmentation against Pillow, and against cases worked out by hand."""

import random

import numpy as np
import pytest
from paddle.vision import transforms as vision
from PIL import Image, ImageEnhance, ImageOps

from ppvision.data.augment import (
    SIGNED,
    UNSIGNED,
    FittingCrop,
    MixBatch,
    RandAugment,
    RandomErasing,
)
from ppvision.errors import InputError
from tests.helpers.messages import raises_naming


@pytest.fixture
def picture() -> np.ndarray:
    rng = np.random.default_rng(5)
    smooth = np.add.outer(np.arange(40), np.arange(32))[..., None] * [1.5, 2.0, 1.0]
    return (smooth + rng.integers(10, 60, (40, 32, 3))).clip(0, 230).astype(np.uint8)


def test_unsigned_operations_are_those_of_pillow(picture):
    image = Image.fromarray(picture)
    for name, strength, expected, tolerance in (
        ("identity", 0.7, image, 0),
        ("invert", 0.7, ImageOps.invert(image), 0),
        ("autocontrast", 0.7, ImageOps.autocontrast(image), 1),
        ("posterize", 0.75, ImageOps.posterize(image, 8 - 3), 0),
        ("posterize", 0.0, image, 0),
        ("solarize", 0.5, ImageOps.solarize(image, 128), 0),
        ("solarize", 0.0, image, 0),
        ("equalize", 0.7, ImageOps.equalize(image), 12),  # the two round the histogram otherwise
    ):
        found = UNSIGNED[name](picture, strength, 128)
        assert found.dtype == np.uint8
        difference = np.abs(found.astype(int) - np.asarray(expected).astype(int)).max()
        assert difference <= tolerance, name


@pytest.mark.parametrize("strength", [-1.0, -0.4, 0.4, 1.0])
def test_enhancements_are_those_of_pillow(picture, strength):
    image = Image.fromarray(picture)
    factor = 1 + 0.9 * strength
    for name, enhancer, tolerance in (
        ("brightness", ImageEnhance.Brightness, 1),
        ("contrast", ImageEnhance.Contrast, 2),
        ("saturation", ImageEnhance.Color, 2),
    ):
        found = SIGNED[name](picture, strength, 128).astype(int)
        expected = np.asarray(enhancer(image).enhance(factor)).astype(int)
        assert np.abs(found - expected).max() <= tolerance, name


def test_sharpness_leaves_flat_and_moves_edges():
    image = np.full((9, 9, 3), 100, np.uint8)
    image[:, 5:] = 160
    soft, hard = (SIGNED["sharpness"](image, s, 128)[4, :, 0].astype(int) for s in (-1, 1))
    assert soft[2] == hard[2] == 100
    assert abs(soft[5] - soft[4]) < 60 < abs(hard[5] - hard[4])


@pytest.mark.parametrize("name", [n for n in SIGNED if "_" in n or n == "rotate"])
def test_geometry_moves_both_ways_about_the_centre(name, picture):
    dot = np.zeros((41, 41, 3), np.uint8)
    dot[18:23, 10:15] = 250
    there, back = (SIGNED[name](dot, s, 0) for s in (0.5, -0.5))
    assert (SIGNED[name](dot, 0.0, 0) == dot).all()

    def centre(image):
        rows, columns = np.nonzero(image[..., 0] > 100)
        return np.array([rows.mean(), columns.mean()])

    moved = centre(there) - centre(dot), centre(back) - centre(dot)
    np.testing.assert_allclose(moved[0], -moved[1], atol=1.5)
    if name.startswith("translate"):
        axis = 1 if name.endswith("x") else 0
        assert abs(moved[0][axis]) == pytest.approx(0.5 * 0.45 * 41, abs=0.6)
    if name == "rotate":  # 15 degrees about (20, 20), from (20, 12)
        angle = np.degrees(np.arctan2(-(centre(there)[0] - 20), -(centre(there)[1] - 20)))
        assert abs(angle) == pytest.approx(15, abs=2)


def test_randaugment_changes_pictures_and_keeps_what_it_is_given(picture):
    augment = RandAugment(num_ops=2, magnitude=9)
    random.seed(0)
    before = picture.copy()
    results = [augment(picture) for _ in range(40)]
    assert (picture == before).all()
    assert all(r.shape == picture.shape and r.dtype == np.uint8 for r in results)
    assert len({r.tobytes() for r in results}) > 30


def test_random_erasing(picture):
    image = picture.astype(np.float32)
    random.seed(1)
    np.random.seed(1)
    assert RandomErasing(prob=0.0)(image) is image
    shares = []
    for _ in range(200):
        changed = (RandomErasing(prob=1.0)(image) != image).any(axis=2)
        rows, columns = np.nonzero(changed)
        area = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert changed.sum() == area  # one whole rectangle
        shares.append(area / changed.size)
    assert 0.01 < min(shares) < 0.05
    assert 0.25 < max(shares) < 0.40
    hits = sum(RandomErasing(prob=0.25)(image) is not image for _ in range(2000))
    assert 400 < hits < 600
    with pytest.raises(ValueError, match="Normalize"):
        RandomErasing(prob=1.0)(picture)


def samples(labels, side=8):
    rng = np.random.default_rng(0)
    return [
        (rng.normal(size=(3, side, side)).astype(np.float32), np.int64(label)) for label in labels
    ]


def test_smoothed_targets_by_hand():
    images, targets = MixBatch(5, label_smoothing=0.1)(samples([0, 3]))
    expected = [[0.92, 0.02, 0.02, 0.02, 0.02], [0.02, 0.02, 0.02, 0.92, 0.02]]
    np.testing.assert_allclose(targets, expected, atol=1e-6)
    np.testing.assert_array_equal(images[1], samples([0, 3])[1][0])


def test_mixup_mixes_pictures_and_targets_alike():
    batch = samples([0, 1, 2, 3])
    np.random.seed(2)
    images, targets = MixBatch(4, mixup=0.8)(batch)
    kept = targets[0, 0]
    assert 0 < kept < 1
    np.testing.assert_allclose(targets[0], [kept, 0, 0, 1 - kept], atol=1e-6)
    np.testing.assert_allclose(images[0], kept * batch[0][0] + (1 - kept) * batch[3][0], atol=1e-5)
    np.testing.assert_allclose(images[2], kept * batch[2][0] + (1 - kept) * batch[1][0], atol=1e-5)


def test_cutmix_targets_are_the_shares_of_the_pixels():
    batch = samples([0, 1, 2, 3], side=16)
    seen = set()
    for seed in range(30):
        np.random.seed(seed)
        images, targets = MixBatch(4, cutmix=1.0)(batch)
        own = (images[1] == batch[1][0]).all(axis=0)
        other = (images[1] == batch[2][0]).all(axis=0)
        assert (own ^ other).all()
        assert targets[1, 1] == pytest.approx(own.mean(), abs=1e-6)
        assert targets[1, 2] == pytest.approx(other.mean(), abs=1e-6)
        seen.add(round(float(own.mean()), 3))
    assert len(seen) > 10


def test_both_are_drawn():
    random.seed(0)
    np.random.seed(0)
    batch = samples([0, 1], side=16)
    kinds = [
        (MixBatch(2, mixup=0.8, cutmix=1.0)(batch)[0][0] == batch[0][0]).any() for _ in range(50)
    ]
    assert 10 < sum(kinds) < 40  # CutMix keeps pixels as they are, mixup none


@pytest.mark.parametrize(
    ("make", "tokens"),
    [
        (lambda: RandAugment(magnitude=11), "RandAugment: magnitude 10, 11"),
        (lambda: RandAugment(num_ops=0), "RandAugment: num_ops 0,"),
        (lambda: RandomErasing(prob=2), "RandomErasing: prob 2,"),
        (lambda: RandomErasing(scale=(0.5, 0.1)), "RandomErasing: scale[0] [0.5, 0.1]"),
        (lambda: MixBatch(3, mixup=-1), "mixup -1,"),
        (lambda: MixBatch(3, label_smoothing=1), "label_smoothing 1."),
    ],
)
def test_values_out_of_range(make, tokens):
    with raises_naming(ValueError, *tokens.split()):
        make()


def test_a_random_crop_is_that_of_paddle(picture):
    for options in ({"size": 20}, {"size": (40, 32)}, {"size": 48, "pad_if_needed": True}):
        results = []
        for kind in (FittingCrop, vision.RandomCrop):
            random.seed(3)
            results.append(kind(**options)(picture))
        np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"size": 41}, "41 32 40"),
        ({"size": (10, 50)}, "50 10 32 40"),
        ({"size": 60, "padding": 5}, "60 42 50"),
    ],
)
def test_a_picture_that_is_smaller_than_a_random_crop_is_named_so(picture, options, sizes):
    with raises_naming(InputError, "RandomCrop", *sizes.split()):
        FittingCrop(**options)(picture)
