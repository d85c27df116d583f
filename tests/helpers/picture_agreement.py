"""Run by test_pictures.py in a process of its own: what does every entry point say of a file?

    python picture_agreement.py FOLDER files [MAX_VALUE]    every file of the folder
    python picture_agreement.py FOLDER damage COUNT         COUNT damaged copies of its files

Prints JSON; raises when two entry points disagree, or another error than ours comes up.
"""

import contextlib
import hashlib
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from paddleseg.datasets import Dataset
from ppdet.data.transform.operators import Decode

import ppvision.plugins.paddledet
import ppvision.plugins.paddleseg
from ppvision.data.check.segmentation import check_pairs
from ppvision.data.class_folders import ClassFolders
from ppvision.data.pictures import read_label, read_picture, read_picture_size
from ppvision.deploy.run import predictor
from ppvision.errors import DataError


def _segmentation(path: str, mode: str, max_value: int | None) -> np.ndarray:
    """A picture of PaddleSeg's own data set, without the list that it reads as UTF-8."""
    dataset = Dataset.__new__(Dataset)
    dataset.mode, dataset.edge, dataset.file_list = mode, False, [[path, LABEL]]
    dataset.transforms = ppvision.plugins.paddleseg.Compose([])
    dataset.transforms.max_value = max_value
    return dataset[0]["img"].transpose(1, 2, 0)


def _class_folders(path: str, max_value: int | None) -> np.ndarray:
    dataset = ClassFolders.__new__(ClassFolders)
    dataset.samples, dataset.transforms, dataset.max_value = [(path, 0)], [], max_value
    return dataset[0][0].transpose(1, 2, 0)


def _check(path: str, max_value: int | None) -> None:
    check_pairs("set", [(path, None)], max_value)


ENTRIES: dict[str, Callable[[str, int | None], np.ndarray | None]] = {
    "read_picture": lambda path, white: read_picture(path, max_value=white),
    "content": lambda path, white: read_picture(
        Path(path).read_bytes() if os.path.isfile(path) else b"", max_value=white
    ),
    "check": _check,
    "class folders": _class_folders,
    "PaddleSeg, training": lambda path, white: _segmentation(path, "train", white),
    "PaddleSeg, evaluation": lambda path, white: _segmentation(path, "val", white),
    "PaddleDetection": lambda path, white: Decode()({"im_file": path, "max_value": white})["image"],
    "Predictor": lambda path, white: predictor._read(path, white),
}


def ask_everybody(path: str, max_value: int | None) -> str:
    """ "refused", or the hash of the pixels that all entry points read."""
    answers = {}
    for entry, read in ENTRIES.items():
        before = len(os.listdir("/proc/self/fd"))
        try:
            pixels = read(path, max_value)
        except DataError as error:
            str(error).encode("utf-8")  # it can be printed
            answers[entry] = "refused"
            continue
        finally:
            assert len(os.listdir("/proc/self/fd")) == before, f"{entry} leaves a file open"
        if pixels is not None:  # the check has none
            assert pixels.ndim == 3, entry
            assert pixels.shape[:2] == read_picture_size(path), entry
            pixels = np.ascontiguousarray(pixels.astype(np.uint8))
            answers[entry] = hashlib.sha256(pixels).hexdigest()
    different = set(answers.values())
    checked = "refused" if "refused" in different else "fine"
    assert answers.get("check", "fine") == checked, f"{path}: {answers}"
    assert len(different) == 1, f"{path}: {answers}"
    return different.pop()


def damage(content: bytes, source: random.Random) -> bytes:
    """Cut off, flip bytes, or take out or repeat a part; near the start as often as anywhere."""
    end = len(content) if source.random() < 0.5 else min(len(content), 80)
    place = source.randrange(1, end)
    kind = source.choice(("cut", "flip", "flip", "take out", "repeat", "set"))
    if kind == "cut":
        return content[:place]
    if kind in ("flip", "set"):
        changed = bytearray(content)
        for _ in range(source.choice((1, 1, 3))):
            at = source.randrange(1, end)
            changed[at] = (
                source.choice((0, 255, 1, 128))
                if kind == "set"
                else changed[at] ^ (1 << source.randrange(8))
            )
        return bytes(changed)
    stop = place + source.randrange(1, 40)
    return content[:place] + (content[stop:] if kind == "take out" else content[place - 9 :])


def main() -> None:
    folder, what, *number = sys.argv[1:]
    files = sorted(Path(folder).iterdir())
    if what == "files":
        max_value = int(number[0]) if number else None
        found = {os.fsencode(f.name).hex(): ask_everybody(str(f), max_value) for f in files}
        print(json.dumps(found))
        return
    source, counts = random.Random(int(number[0])), Counter()
    contents = [file.read_bytes() for file in files]
    damaged = str(Path(folder) / "damaged")
    for _ in range(int(number[0])):
        content = damage(source.choice(contents), source)
        Path(damaged).write_bytes(content)
        counts["tried"] += 1
        try:
            answer = ask_everybody(damaged, None)
            counts["refused" if answer == "refused" else "read"] += 1
            with contextlib.suppress(DataError):
                read_label(damaged)
        except BaseException:
            sys.stderr.write(f"content: {content.hex()}\n")
            raise
    print(json.dumps(counts))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        os.environ["PPVISION_CACHE"] = work
        LABEL = str(Path(work) / "label.png")
        cv2.imwrite(LABEL, np.zeros((2, 2), np.uint8))
        main()
