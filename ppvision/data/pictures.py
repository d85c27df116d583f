"""Reading pictures, with errors that name the file."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile

from ppvision.errors import DataError

# What PIL calls pictures of more than 8 bits a channel.
DEEP_MODES = {"I", "F", "I;16", "I;16B", "I;16L", "I;16N"}

_truncation_lock = threading.Lock()
_strict_readers = 0
_flag_outside = False


@contextmanager
def _truncation_refused() -> Iterator[None]:
    """PIL refuses cut-off files inside the block, in whichever threads are inside at once.

    `ppdet.engine.trainer` sets `ImageFile.LOAD_TRUNCATED_IMAGES` for the whole process when it is
    imported, after which PIL fills what is missing with grey and says nothing.
    """
    global _strict_readers, _flag_outside
    with _truncation_lock:
        if _strict_readers == 0:
            _flag_outside = ImageFile.LOAD_TRUNCATED_IMAGES
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _strict_readers += 1
    try:
        yield
    finally:
        with _truncation_lock:
            _strict_readers -= 1
            if _strict_readers == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _flag_outside


def decode_picture(source: Path | BinaryIO, name: str) -> Image.Image:
    """Decode a picture to its last pixel (`verify()` does not notice a cut-off JPEG).

    Args:
        source: a file, open or by path.
        name: how the error calls it.

    Raises:
        DataError: no such file, not a picture, cut off or damaged; says why.
    """
    try:
        with _truncation_refused(), Image.open(source) as picture:
            picture.load()
            return picture
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file. Check the path and the list.") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, ...
        # PIL's own sentence for an unknown format shows the path or the file object once more.
        reason = "not a picture" if "cannot identify" in str(error) else str(error)
        raise DataError(f"{name}: does not decode ({reason}). Replace or remove it.") from error


def rgb_pixels(picture: Image.Image, name: str) -> np.ndarray:
    """`[H, W, 3]` uint8 RGB of a decoded 8-bit picture; transparency is dropped.

    Raises:
        DataError: more than 8 bits a channel, whose scale only the owner knows.
    """
    if picture.mode in DEEP_MODES:
        raise DataError(
            f"{name}: expected an 8-bit picture, got PIL mode {picture.mode}. Scale it to 8 bits."
        )
    return np.array(picture.convert("RGB"))
