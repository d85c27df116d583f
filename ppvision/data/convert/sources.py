"""Functions that the converters share: they read a source's lists and maps, and write the
layout."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ppvision.data.listing import is_leftover, locate
from ppvision.data.pictures import read_label
from ppvision.data.text import read_list
from ppvision.data.writing import write_lines
from ppvision.errors import DataError, MissingFileError, shorten

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Sample:
    """One image of a source and the map that labels it."""

    name: str
    image: Path
    label: Path


def find_source(source: str | Path, name: str, file_allowed: bool = False) -> Path:
    """Return the source as a path.

    Raises:
        FileNotFoundError: no such folder (or file, where one is allowed).
    """
    source = Path(source)
    if not (source.is_dir() or (file_allowed and source.is_file())):
        expected = "a folder or tar file" if file_allowed else "a folder"
        raise MissingFileError(
            f"source: expected {expected} with {name}, found none at {source}. Check the path."
        )
    return source


def read_filled_list(folder: Path, split: str) -> list[tuple[int, list[str]]]:
    """Return line numbers and fields of `{split}.txt`, without lines for files that tools leave
    behind.

    Raises:
        DataError: no such list, or nothing in it.
    """
    path = folder / f"{split}.txt"
    lines = [(number, fields) for number, fields in read_list(path) if not is_leftover(fields[0])]
    if not lines:
        raise DataError(f"{path}: the set is empty: the list names no image. Fill it.")
    return lines


def list_samples(source: Path, split: str) -> list[Sample]:
    """Return the `image label` pairs of a list. A sample's name is the image's name without suffix.

    Raises:
        DataError: no such list, nothing in it, another number of fields, a name used twice.
    """
    samples: dict[str, Sample] = {}
    for number, fields in read_filled_list(source, split):
        where = f"{source / split}.txt, line {number}"
        if len(fields) != 2:
            raise DataError(f"{where}: expected `image label`, got {shorten(' '.join(fields))}.")
        image, label = (source / locate(source, name) for name in fields)
        if image.stem in samples:
            raise DataError(f"{where}: the image name {image.stem} occurs twice. Rename one.")
        samples[image.stem] = Sample(image.stem, image, label)
    return list(samples.values())


def read_map(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Read a map of whole numbers `[H, W]`, and check that it has its image's size `shape`.

    Raises:
        DataError: it does not decode, has several channels or another size.
    """
    pixels = read_label(path)
    if pixels.shape != shape:
        raise DataError(
            f"{path}: expected the image's size, {shape[1]} x {shape[0]}, got "
            f"{pixels.shape[1]} x {pixels.shape[0]}. Make it again at that size."
        )
    return pixels


def make_pair_folders(folder: Path, split: str) -> None:
    """Make `images/{split}` and `labels/{split}`."""
    for name in ("images", "labels"):
        (folder / name / split).mkdir(parents=True)


def write_pair_list(folder: Path, split: str, images: list[str]) -> None:
    """Write PaddleSeg's `{split}.txt` for image files whose label is a PNG of the same name."""
    lines = [f"images/{split}/{image} labels/{split}/{Path(image).stem}.png" for image in images]
    write_lines(folder / f"{split}.txt", lines)
