"""From pictures on disk to pictures of predictions."""

import json
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_utils
from tqdm import tqdm

from ppvision.data.listing import list_images, listed_labels
from ppvision.data.pictures import read_label, read_picture
from ppvision.deploy.detections import Detections
from ppvision.deploy.predictor import Classification
from ppvision.errors import DataError
from ppvision.files import write_text
from ppvision.tasks.pictures import (
    detected,
    labelled,
    save_comparison,
    save_picture,
    save_prediction,
)

logger = logging.getLogger("ppvision")

Prediction = np.ndarray | Classification | Detections
Predict = Callable[[Path, np.ndarray], Prediction]  # of a picture's path and its pixels

AHEAD = 4  # pictures that are read before, or written after, the one in the model
DRAWN_SCORE = 0.5  # lowest of a found object that is drawn
CLASSIFIED_SIDE = 224  # pixels of a classified picture as it is shown


def read_rgb(path: str | Path) -> np.ndarray:
    """A picture `[H, W, 3]` uint8 RGB.

    Raises:
        DataError: no such file, not a picture, or cut off.
    """
    return read_picture(path)


def predict_to_folder(
    predict: Callable[[Path, np.ndarray], np.ndarray],
    image_path: str | Path,
    folder: str | Path,
    class_names: list[str],
    ignore_index: int | None = 255,
    num_classes: int | None = None,
) -> list[str]:
    """Write overlays, class maps and `predictions.json` for every picture, and comparisons with
    the labels that a list names: `overlay/`, `labels/` and `compared/<name>.png`.

    Args:
        predict: `(path, pixels) -> [H, W]` classes; pixels are `[H, W, 3]` uint8 RGB.
        image_path: see `list_images`.
        folder: where results go.
        class_names: for the JSON's shares of pixels; empty for numbers.
        ignore_index: label of pixels that do not count. Default 255; None for no comparisons.
        num_classes: of the labels, which are compared only if they have no other. Default None:
            any.

    Returns:
        One line for every picture that could not be read or predicted.
    """
    pictures = list_images(image_path)
    labels = {} if ignore_index is None else listed_labels(image_path)

    def write(path: Path, name: str, image: np.ndarray, prediction: np.ndarray) -> dict[str, float]:
        save_prediction(image, prediction, Path(folder), name)
        if path in labels:
            try:
                label = _read_label(labels[path], prediction.shape)
                _check_range(labels[path], label, ignore_index, num_classes)
                save_comparison(image, label, prediction, ignore_index, Path(folder), name)
            except DataError as error:  # it is predicted all the same
                logger.warning(f"no comparison: {error}")
        counts = np.bincount(prediction.ravel())
        return {
            class_names[i] if class_names else str(i): round(int(n) / prediction.size, 6)
            for i, n in enumerate(counts)
            if n
        }

    report, failures = _for_every_picture(pictures, predict, write)
    _write_report(folder, report)
    return failures


def _read_label(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The classes `[H, W]` of a label map, numbered as in the file.

    Raises:
        DataError: not a readable map, or one of another size.
    """
    label = read_label(path, f"label {path}")
    if label.shape != shape:
        raise DataError(
            f"label {path}: expected one class number per pixel, {list(shape)} like the "
            f"prediction, got {list(label.shape)}."
        )
    return label


def _check_range(path: Path, label: np.ndarray, ignore_index: int, num_classes: int | None) -> None:
    known = label[label != ignore_index]
    if num_classes is not None and known.size and known.max() >= num_classes:
        raise DataError(
            f"label {path}: expected classes from 0 to {num_classes - 1} and {ignore_index}, got "
            f"{known.max()}."
        )


def classify_to_folder(
    predict: Callable[[Path, np.ndarray], Classification],
    image_path: str | Path,
    folder: str | Path,
    class_names: list[str],
) -> list[str]:
    """Write `overlay/<name>.png` with the class below the picture, and `predictions.json`: class,
    its number, its probability and the five likeliest classes of every picture.

    Args:
        predict: `(path, pixels) -> Classification`.
        image_path, folder: as `predict_to_folder`.
        class_names: empty for numbers.

    Returns:
        One line for every picture that could not be read or predicted.
    """

    def named(class_id: int) -> str:
        return class_names[class_id] if class_names else str(class_id)

    def write(path: Path, name: str, image: np.ndarray, found: Classification) -> dict[str, object]:
        entry = {"class": named(found.class_id), "class_id": found.class_id}
        if found.probabilities is not None:
            likeliest = np.argsort(-found.probabilities, kind="stable")[:5]
            shares = {named(int(k)): round(float(found.probabilities[k]), 6) for k in likeliest}
            entry |= {"probability": shares[entry["class"]], "top5": shares}
        shown = labelled(image, CLASSIFIED_SIDE, "", entry["class"])
        save_picture(shown, Path(folder) / "overlay", name)
        return entry

    report, failures = _for_every_picture(list_images(image_path), predict, write)
    _write_report(folder, report)
    return failures


def detect_to_folder(
    predict: Callable[[Path, np.ndarray], Detections],
    image_path: str | Path,
    folder: str | Path,
    score: float = DRAWN_SCORE,
) -> list[str]:
    """Write `overlay/<name>.png` with what was found, and `predictions.json`: class, score, box
    (left, top, right, bottom in pixels) and mask (COCO's run lengths) of every object.

    Args:
        predict: `(path, pixels) -> Detections`.
        image_path, folder: as `predict_to_folder`.
        score: lowest of an object that is drawn; the JSON has all. Default 0.5.

    Returns:
        One line for every picture that could not be read or predicted.
    """

    def write(path: Path, name: str, image: np.ndarray, found: Detections) -> list[dict]:
        save_picture(detected(image, found.above(score)), Path(folder) / "overlay", name)
        return [_described(found, place) for place in range(len(found))]

    report, failures = _for_every_picture(list_images(image_path), predict, write)
    _write_report(folder, report)
    return failures


def _described(found: Detections, place: int) -> dict[str, object]:
    class_id = int(found.class_ids[place])
    entry = {
        "class": str(class_id) if found.names is None else found.names[place],
        "class_id": class_id,
        "score": round(float(found.scores[place]), 6),
        "box": [round(float(x), 2) for x in found.boxes[place]],
    }
    if found.masks is not None:
        run_lengths = mask_utils.encode(np.asfortranarray(found.masks[place], np.uint8))
        entry["mask"] = {**run_lengths, "counts": run_lengths["counts"].decode()}
    return entry


def _for_every_picture(
    pictures: list[tuple[Path, str]],
    predict: Predict,
    write: Callable[[Path, str, np.ndarray, Prediction], object],
) -> tuple[dict[str, object], list[str]]:
    """Read, predict and write every picture: what `write` returned for each, by path, and a line
    for each that failed.

    The next pictures are read, and the last ones written, while the model works: decoding and
    compressing take as long as a small model does.
    """
    report, failures = {}, []
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        ahead = deque(reader.submit(read_rgb, path) for path, _ in pictures[:AHEAD])
        behind: deque[tuple[Path, Future]] = deque()

        def finish(path: Path, work: Future) -> None:
            try:
                report[str(path)] = work.result()
            except (ValueError, OSError) as error:
                text = str(error)
                failures.append(text if str(path) in text else f"{path}: {text}")

        for place, (path, name) in enumerate(
            tqdm(pictures, desc="predict", unit="img", disable=None)
        ):
            if place + AHEAD < len(pictures):
                ahead.append(reader.submit(read_rgb, pictures[place + AHEAD][0]))
            work: Future = Future()
            try:
                image = ahead.popleft().result()
                work = writer.submit(write, path, name, image, predict(path, image))
            except (ValueError, OSError) as error:
                work.set_exception(error)
            behind.append((path, work))
            if len(behind) > AHEAD:
                finish(*behind.popleft())
        for path, work in behind:
            finish(path, work)
    return report, failures


def _write_report(folder: str | Path, report: dict) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_text(Path(folder) / "predictions.json", json.dumps(report, indent=2) + "\n")
