"""How every data writer leaves a folder: complete, or not there."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm


@contextmanager
def complete_folder(output: str | Path) -> Iterator[Path]:
    """Yield a folder beside `output` that takes its name once the block has ended without error.

    Until then it is called `.NAME.ppvision-partial`; what a killed run left there is removed.

    Raises:
        FileExistsError: `output` exists and is not an empty folder.
    """
    target = Path(output).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        held = "which holds files" if target.is_dir() else "which is a file"
        raise FileExistsError(
            f"output: expected a new or empty folder, got {output}, {held}. "
            "Name another one or remove it."
        )
    partial = target.with_name(f".{target.name}.ppvision-partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if target.is_dir():
        target.rmdir()
    partial.replace(target)


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write `[H, W]` or `[H, W, 3]` (RGB) uint8 as PNG or JPEG (quality 95), by the suffix.

    `cv2.imwrite` only returns False when a disk is full; here the system's error is raised.
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


def progress(items: Iterable, what: str, total: int | None = None) -> Iterable:
    """A bar with speed and time left; silent where the output is not a terminal."""
    return tqdm(items, desc=what, unit="img", total=total, disable=None)
