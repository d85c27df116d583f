"""What `run_alone` runs: each does its work and says how much memory it took. Modules are imported
in the functions, so that each loads what it needs only."""

import contextlib
import gc
import random
from pathlib import Path

import numpy as np

from tests.helpers.alone import read_peak, read_resident
from tests.helpers.fuzz import mutate_document


def allocate(size: int) -> int:
    """Growth of the peak, in bytes, by an array of as many."""
    before = read_peak()
    np.ones(size, np.uint8).sum()
    return read_peak() - before


def measure_transforms(kind: str, valid: list, count: int) -> tuple[int, int]:
    """Transforms that are built from mutated specs and applied to a picture.

    Args:
        kind: "Transforms" or "DetectionTransforms".
        valid: lists of transforms, of which every mutation changes one.
        count: of mutations.

    Returns:
        How many raised `InputError`, and the growth of the peak in bytes.
    """
    from ppvision.deploy.run import detection_transforms, transforms
    from ppvision.errors import InputError

    for module in (detection_transforms, transforms):  # 2^28 takes 0.8 GB, as it may
        module.MAX_PIXELS = 2**20
    make = {
        "Transforms": transforms.Transforms,
        "DetectionTransforms": detection_transforms.DetectionTransforms,
    }[kind]
    rng = random.Random(5)
    picture = np.full((30, 20, 3), 99, np.uint8)
    for specs in valid:  # what only the first costs
        with contextlib.suppress(InputError):
            make(specs)(picture)
    before, refused = read_peak(), 0
    for _ in range(count):
        try:
            make(mutate_document(rng.choice(valid), rng))(picture)
        except InputError:
            refused += 1
    return refused, read_peak() - before


def measure_download(url: str) -> tuple[str, int]:
    """The name of the error that a download ends with, and the growth of the peak in bytes."""
    from ppvision.remote import RequestError, open_answer, read_pieces

    before, error = read_peak(), "none"
    try:
        with open_answer("GET", url, "shown") as answer:
            b"".join(read_pieces(answer, "shown"))
    except RequestError as caught:
        error = type(caught).__name__
    return error, read_peak() - before


def measure_predictions(folder: str, calls: int, first: int) -> int:
    """Bytes by which the process grows between call `first` and the last, ever new sizes."""
    from ppvision.deploy import Predictor

    predictor = Predictor(Path(folder), threads=1)
    rng, before = np.random.default_rng(0), 0
    for call in range(calls):
        height, width = rng.integers(60, 120, 2)
        predictor(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        if call == first:
            gc.collect()
            before = read_resident()
    gc.collect()
    return read_resident() - before


def measure_engine(folder: str, isolate: bool) -> int:
    """Bytes by which the process grows when an engine runs twice, opened and closed each time."""
    from ppvision.deploy import Predictor

    x = np.zeros((1, 3, 40, 40), np.float32)
    before = read_resident()
    for _ in range(2):
        with Predictor(Path(folder), threads=1, isolate=isolate) as predictor:
            predictor.run(x)
    return read_resident() - before
