"""Digit scenes: the same seed gives the same files, and every label says what is in the picture."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from ppvision.data.convert import digit_scenes
from ppvision.data.convert.coco import encode_rle, find_visible_box
from ppvision.data.convert.digit_scenes import (
    MAX_COVERED,
    MIN_CONTRAST,
    _contrasting_colour,
    compose_scene,
    load_digits,
    load_photos,
    write_digit_scenes,
)
from ppvision.errors import DataError
from tests.helpers.messages import raises_naming

SMALL = {"count": 6, "val_count": 3, "size": 48, "max_digits": 5}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "set"
    write_digit_scenes(folder, **SMALL)
    return folder


@pytest.fixture(scope="module")
def train_sources():
    return load_digits("train"), load_photos("train")


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def pairs_of(folder: Path, split: str) -> list[list[str]]:
    return [line.split(" ") for line in (folder / f"{split}.txt").read_text().splitlines()]


def test_same_seed_same_bytes_other_seed_other_pictures(scenes, tmp_path):
    write_digit_scenes(tmp_path / "again", **SMALL)
    first, again = files_of(scenes), files_of(tmp_path / "again")
    assert first == again
    write_digit_scenes(tmp_path / "other", **SMALL, seed=1)
    other = files_of(tmp_path / "other")
    pictures = [name for name in first if name.startswith("images/")]
    assert len(pictures) == 9
    assert all(first[name] != other[name] for name in pictures)


def test_scene_does_not_depend_on_how_many_there_are(scenes, tmp_path):
    write_digit_scenes(tmp_path / "fewer", **{**SMALL, "count": 2, "val_count": 1})
    first, fewer = files_of(scenes), files_of(tmp_path / "fewer")
    pictures = [name for name in fewer if name.endswith((".jpg", ".png"))]
    assert pictures
    assert all(fewer[name] == first[name] for name in pictures)


def test_train_and_val_share_no_digit():
    train, train_classes = load_digits("train")
    val, val_classes = load_digits("val")
    assert len(train) == 4000
    assert len(val) == 1000
    assert not {tile.tobytes() for tile in train} & {tile.tobytes() for tile in val}
    assert np.bincount(train_classes).tolist() == [400] * 10
    assert np.bincount(val_classes).tolist() == [100] * 10


def test_train_and_val_share_no_piece_of_a_photograph(tmp_path):
    # Every column of this picture has its own colour, so a column says where it came from.
    columns = np.zeros((40, 200, 3), np.uint8)
    columns[:, :, 0] = np.arange(200)
    Image.fromarray(columns).save(tmp_path / "columns.png")
    (train,), (val,) = load_photos("train", tmp_path), load_photos("val", tmp_path)
    assert set(train[:, :, 0].ravel()) == set(range(150))
    assert set(val[:, :, 0].ravel()) == set(range(150, 200))


def test_photographs_are_read_as_rgb(tmp_path):
    Image.new("RGB", (120, 40), (250, 10, 20)).save(tmp_path / "red.png")
    assert load_photos("train", tmp_path)[0][0, 0].tolist() == [250, 10, 20]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")
@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_masks_equal_the_label_map(scenes, split):
    path = scenes / "annotations" / f"instances_{split}.json"
    coco = COCO(str(path))
    pairs = pairs_of(scenes, split)
    assert len(coco.getImgIds()) == len(pairs)
    annotations = 0
    for image_id in coco.getImgIds():
        record = coco.loadImgs(image_id)[0]
        image, label_path = pairs[image_id - 1]
        assert f"images/{record['file_name']}" == image
        label = np.asarray(Image.open(scenes / label_path))
        assert label.shape == (record["height"], record["width"])
        rebuilt = np.zeros_like(label)
        for annotation in coco.loadAnns(coco.getAnnIds(image_id)):
            mask = coco.annToMask(annotation).astype(bool)  # pycocotools' own decoder
            assert not rebuilt[mask].any(), "two instances claim one pixel"
            rebuilt[mask] = annotation["category_id"]
            rows, columns = np.nonzero(mask)
            assert annotation["bbox"] == [
                columns.min(),
                rows.min(),
                np.ptp(columns) + 1,
                np.ptp(rows) + 1,
            ]
            assert annotation["area"] == mask.sum() > 0
            annotations += 1
        np.testing.assert_array_equal(rebuilt, label)
    assert annotations == len(coco.anns) > 0


def test_label_map_equals_instances_times_digits(train_sources):
    for seed in range(20):
        scene = compose_scene(np.random.default_rng(seed), *train_sources, 64, 6)
        expected = np.zeros_like(scene.label)
        for number, digit in enumerate(scene.digits, start=1):
            expected[scene.instances == number] = digit + 1
        np.testing.assert_array_equal(scene.label, expected)
        assert scene.image.shape == (64, 64, 3)
        assert scene.image.dtype == scene.label.dtype == np.uint8


@pytest.fixture
def seen(monkeypatch):
    """What compose_scene uses: its background, and opacity and colour of each placed digit."""
    parts = {"background": None, "opacities": [], "colours": []}
    background = digit_scenes._background
    place, colour = digit_scenes._placed_tile, digit_scenes._contrasting_colour

    def see_background(*arguments):
        parts.update(background=background(*arguments), opacities=[], colours=[])
        return parts["background"]

    def see_tile(*arguments):
        parts["tried"] = place(*arguments)
        return parts["tried"]

    def see_colour(*arguments):  # called once for each digit that is placed, after its last try
        parts["opacities"].append(parts["tried"])
        parts["colours"].append(colour(*arguments))
        return parts["colours"][-1]

    monkeypatch.setattr(digit_scenes, "_background", see_background)
    monkeypatch.setattr(digit_scenes, "_placed_tile", see_tile)
    monkeypatch.setattr(digit_scenes, "_contrasting_colour", see_colour)
    return parts


def test_a_digit_is_seen_under_its_mask_and_nothing_elsewhere(train_sources, seen):
    for seed in range(20):
        scene = compose_scene(np.random.default_rng(seed), *train_sources, 96, 1)
        change = scene.image.astype(float) - seen["background"]
        # Opacity is at least a half under the mask, and the colour MIN_CONTRAST = 60 away.
        assert abs(change[scene.label > 0].mean()) > 30
        # Grain alone: a deviation of at most 6 grey levels.
        untouched = seen["opacities"][0] == 0
        assert untouched.mean() > 0.3
        assert np.abs(change[untouched]).mean() < 6


def test_every_digit_shows_its_colour(train_sources, seen):
    compared = 0
    for seed in range(20):
        scene = compose_scene(np.random.default_rng(seed), *train_sources, 96, 4)
        assert len(seen["colours"]) == len(scene.digits)
        for i, colour in enumerate(seen["colours"]):
            pure = (scene.instances == i + 1) & (seen["opacities"][i] > 0.99)
            for later in seen["opacities"][i + 1 :]:
                pure &= later == 0
            if pure.sum() >= 20:
                shown = scene.image[pure].mean(axis=0)
                np.testing.assert_allclose(shown, colour.clip(3, 252), atol=6)
                compared += 1
    assert compared > 20


def test_scale_rotation_and_place_vary_within_their_bounds(train_sources, monkeypatch):
    """Read off the matrices that reach OpenCV; the bounds are those of the module's text."""
    matrices, warp = [], cv2.warpAffine

    def see(tile, matrix, *arguments, **options):
        assert tile.shape == (28, 28)
        matrices.append(matrix.copy())
        return warp(tile, matrix, *arguments, **options)

    monkeypatch.setattr(digit_scenes.cv2, "warpAffine", see)
    size = 100
    for seed in range(150):
        compose_scene(np.random.default_rng(seed), *train_sources, size, 1)
    linear = np.stack(matrices)[:, :, :2]
    height = 28 * np.sqrt(np.linalg.det(linear)) / size
    angle = np.degrees(np.arctan2(linear[:, 0, 1], linear[:, 0, 0]))
    centre = np.stack([matrix @ [13.5, 13.5, 1] for matrix in matrices]) / size
    assert 0.35 <= height.min() < 0.4
    assert 0.65 < height.max() <= 0.7
    assert -25 <= angle.min() < -20
    assert 20 < angle.max() <= 25
    for place in centre.T:
        assert 0.1 < place.min() < 0.25
        assert 0.75 < place.max() < 0.9


def test_no_listed_digit_is_covered_away(train_sources, monkeypatch):
    """Crowded scenes: what is left of a digit is at least the share that the rule leaves it."""
    placed = []
    original = digit_scenes._contrasting_colour

    def remember(rng, under):  # called once for each digit that is placed, with its whole area
        placed.append(len(under))
        return original(rng, under)

    monkeypatch.setattr(digit_scenes, "_contrasting_colour", remember)
    most = 0
    for seed in range(30):
        placed.clear()
        scene = compose_scene(np.random.default_rng(seed), *train_sources, 32, 40)
        visible = np.bincount(scene.instances.ravel(), minlength=len(placed) + 1)[1:]
        assert len(visible) == len(placed) == len(scene.digits)
        assert np.all(visible >= (1 - MAX_COVERED) * np.array(placed))
        assert np.all(visible > 0)
        most = max(most, len(placed))
    assert most >= 4, "the scenes were not crowded: the test tested nothing"


def test_hole_of_a_zero_is_background(train_sources):
    tiles, classes = train_sources[0]
    zeros = tiles[classes == 0], classes[classes == 0]
    holes = 0
    for seed in range(20):
        scene = compose_scene(np.random.default_rng(seed), zeros, train_sources[1], 96, 1)
        background = (scene.label == 0).astype(np.uint8)
        regions, numbered = cv2.connectedComponents(background, connectivity=4)
        outside = set(np.concatenate([numbered[0], numbered[-1], numbered[:, 0], numbered[:, -1]]))
        holes += any(region not in outside for region in range(1, regions))
    assert holes >= 15  # an open zero, or one cut by the border, has no hole


def test_colour_contrasts_with_every_grey_and_is_found_soon():
    class CountingRng:
        """A generator that counts its draws and gives up where the loop would go on."""

        def __init__(self, seed):
            self.rng, self.draws = np.random.default_rng(seed), 0

        def uniform(self, *args, **kwargs):
            self.draws += 1
            assert self.draws < 10_000, "the colour loop does not end"
            return self.rng.uniform(*args, **kwargs)

    for grey in [*range(0, 256, 5), 127.5]:
        rng = CountingRng(int(grey))
        under = np.full((4, 3), float(grey))
        for _ in range(300):
            assert abs(_contrasting_colour(rng, under).mean() - grey) >= MIN_CONTRAST
        # One draw in six is far enough from grey 127.5 (the sum of three uniform draws is below
        # 3 * 67.5 / 255 with probability 0.794^3 / 6 = 0.083), more from any other.
        assert rng.draws / 300 < 7.5


def test_size_and_most_digits_are_respected(train_sources):
    counts = set()
    for seed in range(40):
        scene = compose_scene(np.random.default_rng(seed), *train_sources, 80, 3)
        counts.add(len(scene.digits))
        assert scene.label.shape == (80, 80)
    assert counts == {1, 2, 3}


def test_class_folders_hold_one_crop_per_annotation(scenes):
    for split in ("train", "val"):
        document = json.loads((scenes / "annotations" / f"instances_{split}.json").read_text())
        names = {category["id"]: category["name"] for category in document["categories"]}
        expected = dict.fromkeys(names.values(), 0)
        for annotation in document["annotations"]:
            expected[names[annotation["category_id"]]] += 1
        folders = (scenes / "classes" / split).iterdir()
        assert {folder.name: len(list(folder.iterdir())) for folder in folders} == expected
    for crop in (scenes / "classes").rglob("*.jpg"):
        with Image.open(crop) as picture:
            assert 24 <= picture.width == picture.height <= SMALL["size"]


def test_description(scenes):
    said = json.loads((scenes / "dataset.json").read_text())
    assert said["seed"] == 0
    assert (said["size"], said["max_digits"]) == (48, 5)
    assert said["train"]["scenes"] == 6
    assert said["val"]["scenes"] == 3
    crops = len(list((scenes / "classes" / "train").rglob("*.jpg")))
    assert said["train"]["digits"] == crops
    assert (scenes / "classes.txt").read_text().split() == ["background", *"0123456789"]


def test_paddleseg_reads_the_lists(scenes):
    dataset_class = pytest.importorskip("paddleseg.datasets", exc_type=ImportError).Dataset
    for mode, count in (("train", 6), ("val", 3)):
        listed = {f"{mode}_path": str(scenes / f"{mode}.txt")}
        dataset = dataset_class(
            mode=mode, dataset_root=str(scenes), transforms=[], num_classes=11, **listed
        )
        assert len(dataset) == count
        sample = dataset[0]
        assert sample["img"].shape == (3, 48, 48)
        written = np.asarray(Image.open(scenes / "labels" / mode / "000000.png"))
        np.testing.assert_array_equal(np.squeeze(sample["label"]), written)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", 0),
        ("val_count", 0),
        ("size", 31),
        ("size", 64.0),
        ("max_digits", 0),
        ("max_digits", 101),
        ("seed", -1),
    ],
)
def test_argument_out_of_range(tmp_path, name, value):
    with raises_naming(ValueError, f"{name}:", str(value)):
        write_digit_scenes(tmp_path / "set", **{**SMALL, name: value})
    assert not list(tmp_path.iterdir())


def test_output_with_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with raises_naming(FileExistsError, "output:", "holds"):
        write_digit_scenes(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_empty_folder_is_accepted(tmp_path):
    write_digit_scenes(tmp_path / "set", count=1, size=32)
    (tmp_path / "empty").mkdir()
    write_digit_scenes(tmp_path / "empty", count=1, size=32)
    assert files_of(tmp_path / "set") == files_of(tmp_path / "empty")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch, interruption):
    written = []

    def fail_later(path, picture):
        written.append(path)
        if len(written) > 5:
            raise interruption("stop")
        path.write_bytes(b"")

    monkeypatch.setattr(digit_scenes, "write_picture", fail_later)
    with pytest.raises(interruption):
        write_digit_scenes(tmp_path / "set", **SMALL)
    assert len(written) == 6
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("channel", [0, 1, 2], ids=["red", "green", "blue"])
def test_own_photographs_are_used(tmp_path, channel):
    photos = tmp_path / "photos"
    photos.mkdir()
    colour = [0, 0, 0]
    colour[channel] = 200
    Image.new("RGB", (200, 100), tuple(colour)).save(photos / "plain.png")
    write_digit_scenes(tmp_path / "set", **SMALL, photos=photos)
    image, label = pairs_of(tmp_path / "set", "train")[0]
    pixels = np.asarray(Image.open(tmp_path / "set" / image)).astype(int)
    under = np.asarray(Image.open(tmp_path / "set" / label)) == 0
    far = cv2.erode(under.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
    np.testing.assert_allclose(pixels[far].mean(axis=0), colour, atol=30)


@pytest.mark.parametrize("output", ["photos", "photos/set", "photos/deep/set", "other/../photos/a"])
def test_output_among_the_photographs_is_refused(tmp_path, output):
    """Its training scenes would be read back as photographs of the validation split."""
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (200, 100), (0, 200, 0)).save(photos / "plain.png")
    with raises_naming(ValueError, "output:", "photographs"):
        write_digit_scenes(tmp_path / output, **SMALL, photos=photos)
    assert [path.name for path in photos.iterdir()] == ["plain.png"]
    write_digit_scenes(tmp_path / "photos-set", count=1, size=32, photos=photos)  # beside it


@pytest.mark.parametrize("content", ["missing", "empty", "broken", "truncated", "small"])
def test_photographs_that_cannot_be_used(tmp_path, content):
    photos = tmp_path / "photos"
    if content != "missing":
        photos.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (100, 200, 3), np.uint8)
    if content == "broken":
        (photos / "bad.jpg").write_text("no picture")
    if content == "truncated":
        Image.fromarray(noise).save(photos / "bad.jpg")
        whole = (photos / "bad.jpg").read_bytes()
        (photos / "bad.jpg").write_bytes(whole[: len(whole) // 2])
    if content == "small":
        Image.fromarray(noise[:, :60]).save(photos / "bad.png")
    error, tokens = {
        "missing": (FileNotFoundError, "photos none"),
        "empty": (FileNotFoundError, "photos none"),
        "broken": (DataError, "bad.jpg: decode"),
        "truncated": (DataError, "bad.jpg: decode cut"),
        "small": (DataError, "bad.png 60 100 96 24"),
    }[content]
    with raises_naming(error, *tokens.split()):
        write_digit_scenes(tmp_path / "set", **SMALL, photos=photos)
    assert not (tmp_path / "set").exists()


def naive_rle(mask: np.ndarray) -> list[int]:
    counts, current = [0], 0
    for column in range(mask.shape[1]):
        for row in range(mask.shape[0]):
            if int(mask[row, column]) != current:
                counts.append(0)
                current = 1 - current
            counts[-1] += 1
    return counts


def test_run_lengths_equal_the_definition():
    rng = np.random.default_rng(0)
    masks = [rng.random((h, w)) < p for h, w, p in ((3, 5, 0.5), (7, 2, 0.2), (1, 9, 0.8))]
    masks += [np.zeros((2, 3), bool), np.ones((2, 3), bool), np.eye(4, dtype=bool)]
    for mask in masks:
        assert encode_rle(mask) == {"size": list(mask.shape), "counts": naive_rle(mask)}


def test_box_of_nothing_is_refused():
    with pytest.raises(ValueError, match="pixel"):
        find_visible_box(np.zeros((4, 4), bool))
