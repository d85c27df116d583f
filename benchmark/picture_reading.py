"""What the strict reader costs over a plain decode.

    python benchmark/picture_reading.py

`ppvision.data.pictures.read_picture` against `cv2.imread`, and against what it replaced (PIL to
the last pixel, then `cv2.imread`), on synthetic photographs (smooth, with noise) of some formats
and sizes, in turn in one process, on one thread. Written are medians of milliseconds, and the
median of the rounds' ratios. Writes benchmark/results/picture_reading.csv.
"""

import argparse
import csv
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ppvision.data.pictures import read_picture
from ppvision.environment import machine

SIZES = ((112, 112), (375, 500), (1080, 1920), (3000, 4000))  # height, width
FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WebP": ".webp", "TIFF": ".tif", "BMP": ".bmp"}
NOISE = 6  # of 255, standard deviation: a photograph compresses to about a bit a channel


def draw_photograph(height: int, width: int) -> np.ndarray:
    """`[H, W, 3]` uint8: smooth colours under noise, so that it compresses as a photograph does."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (max(2, height // 32), max(2, width // 32), 3), np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    noisy = smooth + random.normal(0, NOISE, smooth.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def read_twice(path: str) -> np.ndarray:
    """As before there was one reader: PIL says whether a file is whole, OpenCV gives the pixels."""
    with Image.open(path) as picture:
        picture.load()
    return cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)


def time_in_turn(
    readers: dict[str, Callable[[str], np.ndarray]], path: str, rounds: int
) -> dict[str, np.ndarray]:
    """Milliseconds of each round, by reader."""
    times: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds + 1):
        for name, read in readers.items():
            start = time.perf_counter()
            read(path)
            if number:  # the first round fills the page cache
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: np.array(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31, help="of the largest size (31)")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "picture_reading.csv"
    )
    args = parser.parse_args()
    cv2.setNumThreads(1)
    readers = {"imread": cv2.imread, "strict": read_picture, "twice": read_twice}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for height, width in SIZES:
            photograph = draw_photograph(height, width)
            for name, suffix in FORMATS.items():
                path = f"{folder}/{height}{suffix}"
                if not cv2.imwrite(path, photograph):
                    raise RuntimeError(f"{path}: OpenCV cannot write {name}.")
                # Small pictures take microseconds: more rounds for as sure a median.
                rounds = args.rounds * min(20, max(1, 10**6 // (height * width)))
                times = time_in_turn(readers, path, rounds)
                row = {
                    "format": name,
                    "pixels": f"{width}x{height}",
                    "kilobytes": round(Path(path).stat().st_size / 1000),
                    "rounds": rounds,
                    "imread_ms": round(float(np.median(times["imread"])), 3),
                    "read_picture_ms": round(float(np.median(times["strict"])), 3),
                    "ratio": round(float(np.median(times["strict"] / times["imread"])), 3),
                    "ratio_before": round(float(np.median(times["twice"] / times["imread"])), 3),
                    "machine": machine(),
                }
                rows.append(row)
                print(row)
    with args.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
