"""Draw results of models: overlays, panels and boxes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from zlib import Z_RLE

import cv2
import numpy as np
from PIL import Image

from ppvision.deploy.run.detections import Detections
from ppvision.files import replace_file
from ppvision.metrics.boundary import boundary_depth, other_class_near

GAP = 4  # pixels of white between the parts of a panel
CAPTION = 20  # height in pixels of a line of text
# For class maps: the fastest of PNG's nine levels, and zlib's strategy for runs.
COMPRESSION = {"compress_level": 1, "compress_type": Z_RLE}
WRONG, WRONG_FAR, IGNORED = (255, 40, 40), (150, 30, 60), (235, 235, 235)
BOUNDARY = (255, 235, 60)


def make_voc_palette() -> np.ndarray:
    """Return the 256 colours of PASCAL VOC, `[256, 3]` uint8 RGB; class 0 is black."""
    palette = np.zeros((256, 3), np.uint8)
    for index in range(256):
        for bit in range(8):
            for channel in range(3):
                palette[index, channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
    return palette


PALETTE = make_voc_palette()


def draw_overlay(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Draw the classes `[H, W]` in colour over an image `[H, W, 3]` uint8. There are 256 colours;
    more classes share them."""
    colours = PALETTE.take(label & 255, axis=0)
    return _half_of_each(image, colours)


def _half_of_each(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the mean of two uint8 images, rounded down."""
    return (a & b) + ((a ^ b) >> 1)  # common bits, plus half of the others: fits a byte


def find_outline(label: np.ndarray, ignore_index: int) -> np.ndarray:
    """Return `[H, W]` bool: a line of one pixel where the class to the right or below differs."""
    line = np.zeros(label.shape, bool)
    known = label != ignore_index
    line[:, :-1] |= (label[:, :-1] != label[:, 1:]) & known[:, :-1] & known[:, 1:]
    line[:-1] |= (label[:-1] != label[1:]) & known[:-1] & known[1:]
    return line


def draw_errors(
    image: np.ndarray, label: np.ndarray, prediction: np.ndarray, ignore_index: int
) -> np.ndarray:
    """Draw the image in grey, the true boundary as a line, and over it wrong pixels in red: dark
    red outside the band of Boundary IoU. Ignored pixels are nearly white."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    shown = np.repeat(grey[..., None] // 2 + 64, 3, axis=2)
    ignored = label == ignore_index
    wrong = (label != prediction) & ~ignored
    classes = np.where(ignored, -1, label.astype(np.int16)).astype(np.int16)
    band = other_class_near(classes, boundary_depth(*label.shape), beyond_edge=True)
    shown[find_outline(label, ignore_index)] = BOUNDARY
    shown[wrong] = WRONG_FAR
    shown[wrong & band] = WRONG
    shown[ignored] = IGNORED
    return shown


def draw_panel(
    image: np.ndarray, label: np.ndarray, prediction: np.ndarray, ignore_index: int
) -> np.ndarray:
    """Draw `input | label | prediction | errors` next to each other, `[H, 4W + gaps, 3]` uint8 RGB.

    The true boundary is drawn over the prediction, and under the errors.

    Args:
        image: `[H, W, 3]` uint8 RGB.
        label: `[H, W]` classes.
        prediction: `[H, W]` classes.
        ignore_index: the label that does not count.
    """
    shown = np.where(label == ignore_index, 0, label)
    predicted = draw_overlay(image, prediction)
    predicted[find_outline(label, ignore_index)] = BOUNDARY
    parts = [
        image,
        draw_overlay(image, shown),
        predicted,
        draw_errors(image, label, prediction, ignore_index),
    ]
    return join_side_by_side(parts)


def join_side_by_side(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Join images `[H, W, 3]` of one height in a row, with white between them."""
    gap = np.full((pictures[0].shape[0], GAP, 3), 255, np.uint8)
    row = [part for picture in pictures for part in (picture, gap)][:-1]
    return np.concatenate(row, axis=1)


def draw_detections(image: np.ndarray, found: Detections) -> np.ndarray:
    """Draw boxes, masks, classes and scores over an image `[H, W, 3]` uint8 RGB."""
    shown = image.copy()
    line = max(1, round(min(image.shape[:2]) / 250))
    size = max(0.35, min(image.shape[:2]) / 900)
    for place in reversed(range(len(found))):  # the highest score on top
        class_id = int(found.class_ids[place])
        colour = PALETTE[class_id % 255 + 1]
        if found.masks is not None:
            inside = found.masks[place]
            shown[inside] = _half_of_each(shown[inside], colour)
        left, top, right, bottom = (round(float(x)) for x in found.boxes[place])
        ink = tuple(int(c) for c in colour)
        cv2.rectangle(shown, (left, top), (right, bottom), ink, line)
        name = str(class_id) if found.names is None else found.names[place]
        text = f"{name} {found.scores[place]:.2f}"
        (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, 1)
        top = max(top, height + below)  # the text stays inside the image
        cv2.rectangle(shown, (left, top - height - below), (left + width, top), ink, -1)
        shade = (0, 0, 0) if colour.astype(int).sum() > 380 else (255, 255, 255)
        place_of_text = (left, top - below // 2)
        cv2.putText(
            shown, text, place_of_text, cv2.FONT_HERSHEY_SIMPLEX, size, shade, 1, cv2.LINE_AA
        )
    return shown


def draw_label(image: np.ndarray, side: int, label: str, prediction: str) -> np.ndarray:
    """Draw an image with its class above it and the predicted class below it, in red if they
    differ.

    Args:
        image: `[H, W, 3]` uint8 RGB.
        side: side in pixels of the square into which the image is fitted.
        label, prediction: names of classes.

    Returns:
        `[side + 40, side + gap, 3]` uint8 RGB.
    """
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    fitted = cv2.resize(
        image, size, interpolation=cv2.INTER_NEAREST if scale > 1 else cv2.INTER_AREA
    )
    tile = np.full((side + 2 * CAPTION, side + GAP, 3), 255, np.uint8)
    tile[CAPTION : CAPTION + size[1], : size[0]] = fitted
    colour = (0, 120, 0) if label == prediction else WRONG
    for text, bottom in ((label, CAPTION - 6), (prediction, side + 2 * CAPTION - 6)):
        shade = (0, 0, 0) if bottom < CAPTION else colour
        cv2.putText(
            tile, text[:16], (2, bottom), cv2.FONT_HERSHEY_SIMPLEX, 0.45, shade, 1, cv2.LINE_AA
        )
    return tile


def save_comparison(
    image: np.ndarray,
    label: np.ndarray,
    prediction: np.ndarray,
    ignore_index: int,
    folder: Path,
    name: str,
) -> None:
    """Write `compared/<name>.png`, the `draw_panel` of an image with a known label."""
    save_picture(draw_panel(image, label, prediction, ignore_index), folder / "compared", name)


def save_prediction(image: np.ndarray, prediction: np.ndarray, folder: Path, name: str) -> None:
    """Write `overlay/<name>.png` and the class map `labels/<name>.png`: a palette PNG, or one of 16
    bits if a class is above 255."""
    save_picture(draw_overlay(image, prediction), folder / "overlay", name)
    if prediction.max() > 255:
        classes = Image.fromarray(prediction.astype(np.uint16))
    else:
        classes = Image.fromarray(prediction.astype(np.uint8), mode="P")
        classes.putpalette(PALETTE.ravel().tolist())
    with _new_picture(folder / "labels", name) as path:
        classes.save(path, format="PNG", **COMPRESSION)


def save_picture(picture: np.ndarray, folder: Path, name: str) -> None:
    """Write an image `[H, W, 3]` uint8 RGB as `<name>.png`."""
    # OpenCV writes PNG faster than PIL, because it uses a faster compression.
    ordered = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".png", ordered)
    with _new_picture(folder, name) as path:
        path.write_bytes(encoded.data)


@contextmanager
def _new_picture(folder: Path, name: str) -> Iterator[Path]:
    """Yield a path for writing `<name>.png`; the file gets its name when it is complete."""
    target = folder / f"{name}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(target, sweep=False) as path:
        yield path
