"""From pictures on disk to pictures of predictions."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from ppvision.data.files import DataError, decode_picture
from ppvision.run_folder import write_text
from ppvision.tasks.pictures import save_prediction

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def read_rgb(path: str | Path) -> np.ndarray:
    """A picture `[H, W, 3]` uint8 RGB.

    Raises:
        DataError: no such file, not a picture, or cut off (OpenCV alone would fill it with grey).
    """
    decode_picture(Path(path), str(path))
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise DataError(f"{path}: expected a picture that OpenCV reads. Save it as PNG or JPEG.")
    return np.ascontiguousarray(image[:, :, ::-1])


def list_images(image_path: str | Path) -> list[tuple[Path, str]]:
    """Pictures of `--image_path`, each with the name of its result.

    Args:
        image_path: a picture, a folder (searched deeply), or a list file: one picture a line,
            relative to the list; what follows a space, such as a label, is left out.

    Returns:
        `(path, name)` pairs. Names are relative, without `..`, and differ: pictures that would
        share one (`a.jpg`, `a.png`) keep their suffix in it, then get a number.

    Raises:
        FileNotFoundError: no such path.
        ValueError: no picture in it.
    """
    path = Path(image_path)
    if not path.exists():
        raise FileNotFoundError(f"--image_path: expected a file or folder, found none at {path}.")
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES)
        found = [(p, p.relative_to(path)) for p in files]
    elif path.suffix.lower() in PICTURE_SUFFIXES:
        found = [(path, Path(path.name))]
    else:
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--image_path: expected a picture, a folder or a text file, got {path}."
            ) from error
        whole = [line if (path.parent / line).is_file() else line.split(" ")[0] for line in lines]
        found = [(path.parent / name, Path(name)) for name in whole if name]
    if not found:
        raise ValueError(f"--image_path: expected pictures, found none in {path}.")
    return list(zip([p for p, _ in found], _result_names([n for _, n in found]), strict=True))


def _result_names(names: list[Path]) -> list[str]:
    inside = [Path(*(part for part in n.parts if part not in (n.anchor, "..", "."))) for n in names]
    stems = Counter(str(name.with_suffix("")) for name in inside)
    taken: Counter[str] = Counter()
    results = []
    for name in inside:
        stem = str(name.with_suffix(""))
        result = stem if stems[stem] == 1 else f"{stem}_{name.suffix[1:]}"
        taken[result] += 1
        results.append(result if taken[result] == 1 else f"{result}_{taken[result]}")
    return results


def predict_to_folder(
    predict: Callable[[Path], np.ndarray],
    image_path: str | Path,
    folder: str | Path,
    class_names: list[str],
) -> list[str]:
    """Write overlays, class maps and `predictions.json` for every picture.

    Args:
        predict: `(path) -> [H, W]` classes.
        image_path: see `list_images`.
        folder: where results go.
        class_names: for the JSON's shares of pixels; empty for numbers.

    Returns:
        One line for every picture that could not be read or predicted.
    """
    folder = Path(folder)
    failures, report = [], {}
    for path, name in tqdm(list_images(image_path), desc="predict", unit="img", disable=None):
        try:
            image = read_rgb(path)
            prediction = predict(path)
        except (ValueError, OSError) as error:
            text = str(error)
            failures.append(text if str(path) in text else f"{path}: {text}")
            continue
        save_prediction(image, prediction, folder, name)
        counts = np.bincount(prediction.ravel())
        report[str(path)] = {
            class_names[i] if class_names else str(i): round(int(n) / prediction.size, 6)
            for i, n in enumerate(counts)
            if n
        }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "predictions.json", json.dumps(report, indent=2) + "\n")
    return failures
