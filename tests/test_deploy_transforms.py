"""ppvision.deploy.run.transforms against PaddleSeg's own, on pictures of odd sizes."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paddle.vision.transforms import CenterCrop

from ppvision.deploy.run.transforms import KNOWN, Step, Transforms
from tests.helpers.messages import raises_naming

seg = pytest.importorskip("paddleseg.transforms")

SPECS = [
    {"type": "Resize"},
    {"type": "Resize", "target_size": [37, 53]},
    {"type": "Resize", "target_size": [64, 41], "keep_ratio": True},
    {"type": "Resize", "target_size": [41, 64], "keep_ratio": True, "size_divisor": 16},
    {"type": "Resize", "target_size": [50, 61], "size_divisor": 32},
    *(
        {"type": "Resize", "target_size": [45, 29], "interp": interp}
        for interp in ("NEAREST", "LINEAR", "CUBIC", "AREA", "LANCZOS4")
    ),
    {"type": "ResizeByLong", "long_size": 57},
    {"type": "ResizeByShort", "short_size": 31},
    {"type": "ResizeByShort", "short_size": 64, "max_size": 90},
    {"type": "LimitLong", "max_long": 40},
    {"type": "LimitLong", "min_long": 70},
    {"type": "LimitLong", "max_long": 70, "min_long": 50},
    {"type": "Padding", "target_size": [97, 83]},
    {"type": "Padding", "target_size": [83, 97], "im_padding_value": 3.5},
    {"type": "PaddingByAspectRatio"},
    {"type": "PaddingByAspectRatio", "aspect_ratio": 1.7, "im_padding_value": 0},
    {"type": "Normalize"},
    {"type": "Normalize", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
]
CHAIN = [
    {"type": "ResizeByLong", "long_size": 61},
    {
        "type": "Padding",
        "target_size": [64, 64],
        "im_padding_value": 127.5,
        "label_padding_value": 0,
    },
    {"type": "Normalize", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
]


def by_paddleseg(specs, rgb):
    """The same through PaddleSeg's Compose, from the float32 BGR picture that it reads itself."""
    built = [
        getattr(seg, spec["type"])(**{k: v for k, v in spec.items() if k != "type"})
        for spec in specs
    ]
    data = {"img": rgb[..., ::-1].astype("float32"), "gt_fields": []}
    data = seg.Compose(built)(data)
    return data["img"], [(kind, tuple(size)) for kind, size in data["trans_info"]]


def same(specs, rgb):
    ours, steps = Transforms(specs)(rgb)
    theirs, info = by_paddleseg(specs, rgb)
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.flags["C_CONTIGUOUS"]
    assert np.array_equal(ours, theirs)
    assert steps == info


@pytest.mark.parametrize("spec", SPECS, ids=str)
@settings(max_examples=15, deadline=None)
@given(height=st.integers(9, 80), width=st.integers(9, 80), seed=st.integers(0, 2**32 - 1))
def test_equals_paddleseg(spec, height, width, seed):
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    same([spec], rgb)


@settings(max_examples=15, deadline=None)
@given(height=st.integers(2, 150), width=st.integers(2, 150), seed=st.integers(0, 2**32 - 1))
def test_chain_equals_paddleseg(height, width, seed):
    if round(min(height, width) * 61 / max(height, width)) == 0:
        return
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    same(CHAIN, rgb)


def test_every_known_transform_is_compared():
    assert {spec["type"] for spec in SPECS} | {"CenterCrop"} == set(KNOWN)


@pytest.mark.parametrize("size", [(20, 20), (21, 20), (33, 7), (47, 32), (46, 31)])
def test_center_crop_equals_paddles(size):
    rgb = np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    width, height = size
    theirs = CenterCrop((height, width))(rgb)
    ours, _ = Transforms([{"type": "CenterCrop", "target_size": list(size)}])(rgb)
    np.testing.assert_array_equal(ours, theirs.transpose(2, 0, 1).astype(np.float32))


def test_center_crop_of_a_picture_that_is_too_small():
    rgb = np.zeros((10, 30, 3), np.uint8)
    with raises_naming(ValueError, "CenterCrop", "20x20", "30x10"):
        Transforms([{"type": "CenterCrop", "target_size": [20, 20]}])(rgb)


def test_file_and_array_go_the_same_way(tmp_path):
    """PaddleSeg resizes float32, not uint8: an array must not be rounded where a file is not."""
    rgb = np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), rgb[..., ::-1])
    specs = [{"type": "Resize", "target_size": [20, 31]}]
    theirs = seg.Compose([seg.Resize((20, 31))])({"img": str(tmp_path / "a.png")})["img"]
    assert np.array_equal(Transforms(specs)(rgb)[0], theirs)


def test_no_transforms_only_turn_channel_first():
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    ours, steps = Transforms([])(rgb)
    assert steps == []
    assert np.array_equal(ours, rgb.transpose(2, 0, 1).astype("float32"))


def test_the_picture_itself_is_not_changed():
    rgb = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8).astype("float32")
    before = rgb.copy()
    Transforms([{"type": "Normalize"}])(rgb)
    assert np.array_equal(rgb, before)


def test_short_side_does_not_depend_on_earlier_pictures():
    """PaddleSeg's ResizeByShort keeps what it lowered for one long picture."""
    transforms = Transforms([{"type": "ResizeByShort", "short_size": 40, "max_size": 60}])
    long, square = np.zeros((20, 80, 3), np.uint8), np.zeros((30, 30, 3), np.uint8)
    assert transforms(long)[0].shape == (3, 15, 60)
    assert transforms(square)[0].shape == (3, 40, 40)


def test_steps_name_the_size_before():
    _, steps = Transforms(CHAIN)(np.zeros((30, 50, 3), np.uint8))
    assert steps == [Step("resize", (30, 50)), Step("padding", (37, 61))]


@pytest.mark.parametrize(
    "name",
    ["RandomHorizontalFlip", "ResizeStepScaling", "RandomPaddingCrop", "RandomDistort", "No"],
)
def test_refuses_what_it_cannot_reproduce(name):
    with pytest.raises(ValueError, match=name) as caught:
        Transforms([{"type": name}])
    for known in KNOWN:
        assert known in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "tokens"),
    [
        ({"type": "Resize", "size": [3, 3]}, "target_size keep_ratio"),
        ({"type": "Resize", "target_size": 512}, "target_size"),
        ({"type": "Resize", "target_size": [0, 5]}, "target_size 1 0"),
        ({"type": "Resize", "interp": "RANDOM"}, "interp random"),
        ({"type": "Resize", "size_divisor": 1.5}, "size_divisor"),
        ({"type": "ResizeByLong"}, "long_size"),
        ({"type": "ResizeByShort", "short_size": [20, 30]}, "short_size"),
        ({"type": "LimitLong", "max_long": 3, "min_long": 9}, "min_long max_long"),
        ({"type": "Normalize", "std": [0.5, 0, 0.5]}, "std zeros"),
        ({"type": "Normalize", "mean": [0.5, 0.5]}, "mean 1 3"),
        ({"type": "PaddingByAspectRatio", "aspect_ratio": 0}, "aspect_ratio 0"),
        ({"target_size": [3, 3]}, "type: NAME"),
        ("Normalize", "type: NAME"),
    ],
)
def test_wrong_specs_are_named(spec, tokens):
    with raises_naming(ValueError, *tokens.split()):
        Transforms([spec])


def test_a_single_spec_is_not_a_list():
    with pytest.raises(ValueError, match="list"):
        Transforms({"type": "Normalize"})


def test_padding_smaller_than_the_picture():
    with raises_naming(ValueError, "8x8", "9x4"):
        Transforms([{"type": "Padding", "target_size": [8, 8]}])(np.zeros((4, 9, 3), np.uint8))


def test_too_narrow_picture():
    with pytest.raises(ValueError, match="narrow"):
        Transforms([{"type": "ResizeByLong", "long_size": 32}])(np.zeros((1, 200, 3), np.uint8))
