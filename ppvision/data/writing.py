"""Write the files of a data set."""

import json
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write `[H, W]` or `[H, W, 3]` (RGB) uint8 as PNG or JPEG (quality 95), by the suffix.

    If a disk is full, `cv2.imwrite` only returns False; this function raises the system's error.
    """
    if picture.ndim == 3:
        picture = np.ascontiguousarray(picture[:, :, ::-1])  # OpenCV's order is BGR
    options = [] if path.suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, 95]
    _, encoded = cv2.imencode(path.suffix, picture, options)
    path.write_bytes(encoded.tobytes())


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file, one line each."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_description(folder: Path, summary: dict) -> None:
    """Write `classes.txt` (from `summary["classes"]`) and `dataset.json` (all of it)."""
    write_lines(folder / "classes.txt", summary["classes"])
    write_lines(folder / "dataset.json", [json.dumps(summary, indent=2)])
