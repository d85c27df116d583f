"""What the strict reader costs over a plain decode.

    python benchmark/picture_reading.py              # all formats, about 4 minutes
    python benchmark/picture_reading.py --profile    # the reader's steps, about 1 minute

`ppvision.data.pictures.read_picture` against `cv2.imread`, on synthetic photographs (smooth, with
noise) of some formats and sizes, on one thread. The two are timed alternately in one process, and
every second round in the other order: what ran just before has its code and its file in the
processor's cache, which made up to a quarter of a small picture's time. In rounds of its own the
same is done for what the strict reader replaced (PIL to the last pixel, then `cv2.imread`). Written
are medians of milliseconds, and the median of the rounds' ratios. A row above the aim is followed
by the reader's steps. Writes benchmark/results/picture_reading.csv, or with --profile
benchmark/results/picture_reading_profile.csv.
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

from ppvision.data import pictures
from ppvision.data.pictures import read_picture
from ppvision.environment import machine

SIZES = ((112, 112), (375, 500), (1080, 1920), (3000, 4000))  # height, width
FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WebP": ".webp", "TIFF": ".tif", "BMP": ".bmp"}
AIM = 1.2  # times cv2.imread, at most
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
    """Milliseconds of each round, by reader. Every second round has the other order."""
    times: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds + 1):
        for name in list(readers)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            readers[name](path)
            if number:  # the first round fills the page cache
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: np.array(found) for name, found in times.items()}


def median_microseconds(step: Callable[[], object], rounds: int) -> float:
    step()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return round(1e6 * float(np.median(times)), 1)


def profile_steps(path: str, rounds: int) -> dict[str, float]:
    """Microseconds of the steps of `read_picture`, each repeated alone, beside `cv2.imread`'s.

    Repeated alone a step has its code and data in the cache, so that the steps of a small picture
    are less than the whole takes in turn with others.
    """

    def read_file() -> bytes:
        with pictures._opened(path, path) as file:
            return file[:]

    content = Path(path).read_bytes()
    header = pictures.read_header(content, path)
    array = np.frombuffer(content, np.uint8)

    by_parts = header.format == "BMP" and len(content) > pictures._PART  # read while it is decoded

    def decode() -> np.ndarray:
        with pictures._opened(path if by_parts else content, path) as source:
            return pictures._decode(source, cv2.IMREAD_COLOR_RGB, path, header)

    steps = {
        "cv2.imread": lambda: cv2.imread(path),
        "cv2.imdecode": lambda: cv2.imdecode(array, cv2.IMREAD_COLOR),
        "read_picture": lambda: read_picture(path),
        "of it: open and read": (lambda: None) if by_parts else read_file,
        "of it: header, limit": lambda: pictures._allowed_header(content, path, to_the_end=True),
        "of it: decode": decode,
    }
    if header.format == "PNG":
        steps["of it: checksums"] = lambda: pictures._check_png(content, path)
    return {name: median_microseconds(step, rounds) for name, step in steps.items()}


def write_table(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def measure(path: str, rounds: int) -> dict[str, object]:
    pair = time_in_turn({"imread": cv2.imread, "strict": read_picture}, path, rounds)
    before = time_in_turn({"imread": cv2.imread, "twice": read_twice}, path, rounds)
    return {
        "kilobytes": round(Path(path).stat().st_size / 1000),
        "rounds": rounds,
        "imread_ms": round(float(np.median(pair["imread"])), 3),
        "read_picture_ms": round(float(np.median(pair["strict"])), 3),
        "ratio": round(float(np.median(pair["strict"] / pair["imread"])), 3),
        "ratio_before": round(float(np.median(before["twice"] / before["imread"])), 3),
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31, help="of the largest size (31)")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--profile", action="store_true", help="time the reader's steps instead")
    parser.add_argument("--output", type=Path, help="the CSV file (in benchmark/results)")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    rows, profiles = [], []
    with tempfile.TemporaryDirectory() as folder:
        for height, width in SIZES:
            photograph = draw_photograph(height, width)
            for name in args.formats:
                path = f"{folder}/{height}{FORMATS[name]}"
                if not cv2.imwrite(path, photograph):
                    raise RuntimeError(f"{path}: OpenCV cannot write {name}.")
                # Small pictures take microseconds: more rounds for as sure a median.
                rounds = args.rounds * min(20, max(1, 10**6 // (height * width)))
                place = {"format": name, "pixels": f"{width}x{height}"}
                if not args.profile:
                    rows.append(place | measure(path, rounds))
                    print(rows[-1])
                if args.profile or rows[-1]["ratio"] > AIM:
                    steps = [
                        place | {"step": step, "microseconds": found, "machine": machine()}
                        for step, found in profile_steps(path, rounds).items()
                    ]
                    print(f"{name}, {place['pixels']}, microseconds of each step:")
                    for step in steps:
                        print(f"  {step['step']:24}{step['microseconds']:>12.1f}")
                    profiles += steps
    stem = "picture_reading_profile" if args.profile else "picture_reading"
    output = args.output or Path(__file__).parent / "results" / f"{stem}.csv"
    write_table(output, profiles if args.profile else rows)


if __name__ == "__main__":
    main()
