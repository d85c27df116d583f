"""Check whether an exported graph gives the same numbers as its model.

The rule, on logits (or features), before `output_op`: `max|a - b| / max(1, max|a|)` is at most
1e-3, or 1e-4 for packed codes; `a` is the model in eager mode. A class may differ only if the two
highest logits are closer than that limit.

A model that rounds activations is not a smooth function: an error in the last digit can move a
value between two codes to the other code. If it is larger, its limit is twice the change of its own
outputs in eager mode when its input, and the input of each rounding, changes by the fraction
`LAST_DIGITS`.
"""

from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from ppvision.errors import PpvisionError

FLOAT_TOLERANCE = 1e-3
PACKED_TOLERANCE = 1e-4  # for packed codes, compared with the same width in eager mode
LAST_DIGITS = 1e-5  # fraction of a value: another order of additions, a few layers deep

# Two odd sizes if height and width are free: neither is a multiple of a stride or of a pale size.
# Then sizes for models that need multiples of 32, or more pixels.
ODD_SIZES = ((97, 131), (112, 137))
EVEN_SIZES = ((96, 128), (128, 160))
LARGE_SIZES = ((256, 320), (512, 640))


class ParityError(PpvisionError, RuntimeError):
    """The exported graph gives other numbers than the model.

    Attributes:
        error: the measured `max|a - b| / max(1, max|a|)`; infinite when shapes or classes differ.
        tolerance: the limit.
    """

    def __init__(self, message: str, error: float, tolerance: float) -> None:
        super().__init__(message)
        self.error = error
        self.tolerance = tolerance


def relative_error(eager: np.ndarray, exported: np.ndarray) -> float:
    """Return `max|a - b| / max(1, max|a|)`; infinite if shapes differ or numbers are not finite."""
    if eager.shape != exported.shape:
        return float("inf")
    a, b = eager.astype(np.float64), exported.astype(np.float64)
    if a.size == 0:
        return 0.0
    error = np.abs(a - b).max() / max(1.0, np.abs(a).max())
    return float(error) if np.isfinite(error) else float("inf")


def check_close(
    eager: Sequence[np.ndarray], exported: Sequence[np.ndarray], tolerance: float, where: str
) -> float:
    """Apply the rule to every output.

    Args:
        eager, exported: outputs in the same order.
        tolerance: the limit.
        where: runtime and input, for the message.

    Returns:
        The largest error.

    Raises:
        ParityError: the error is above the limit, or shapes or the number of outputs differ.
    """
    if len(eager) != len(exported):
        raise ParityError(
            f"{where}: expected {len(eager)} outputs as in eager mode, got {len(exported)}.",
            float("inf"),
            tolerance,
        )
    worst = 0.0
    for index, (a, b) in enumerate(zip(eager, exported, strict=True)):
        error = relative_error(a, b)
        if error > tolerance:
            shapes = f" Shapes: {list(a.shape)} eager, {list(b.shape)} exported."
            raise ParityError(
                f"{where}: output {index} differs from eager mode by {error:.3g}, allowed is "
                f"{tolerance:.3g} (max|a-b| / max(1, max|a|)).{shapes} Usual causes: a size "
                "computed with float arithmetic or int(), or a branch on tensor values, which the "
                "export freezes.",
                error,
                tolerance,
            )
        worst = max(worst, error)
    return worst


def check_classes(logits: np.ndarray, classes: np.ndarray, tolerance: float, where: str) -> None:
    """Compare exported classes with the highest of the eager logits `[B, K, ...]`.

    Raises:
        ParityError: the classes have another shape, or differ although the two highest logits are
            further apart than `tolerance * max(1, max|logits|)`.
    """
    expected = logits.argmax(axis=1)
    if expected.shape != classes.shape:
        raise ParityError(
            f"{where}: expected classes of shape {list(expected.shape)}, got "
            f"{list(classes.shape)}.",
            float("inf"),
            tolerance,
        )
    second, first = np.moveaxis(np.partition(logits, -2, axis=1)[:, -2:], 1, 0)
    clear = first - second >= tolerance * max(1.0, np.abs(logits).max())
    wrong = int(((expected != classes) & clear).sum())
    if wrong:
        raise ParityError(
            f"{where}: {wrong} of {classes.size} classes differ from eager mode although the two "
            f"highest logits are further apart than {tolerance:.3g}.",
            float("inf"),
            tolerance,
        )


def probe_shapes(input_shape: Sequence[int | None]) -> Iterator[list[tuple[int, int, int, int]]]:
    """Yield sets of input shapes for the comparison, the best test first.

    With a free batch every size is tried with 1 and with 2 images. With a free height or width,
    later sets are for models that do not accept the sizes of earlier ones.
    """
    batch, channels, height, width = input_shape
    assert channels is not None  # see `check_shape`
    batches = (1, 2) if batch is None else (batch,)
    seen = []
    for sizes in (ODD_SIZES, EVEN_SIZES, LARGE_SIZES):
        # Both sets are equal if the size is fixed: one is enough.
        filled = dict.fromkeys((height or h, width or w) for h, w in sizes)
        shapes = [(b, channels, h, w) for h, w in filled for b in batches]
        if shapes not in seen:
            seen.append(shapes)
            yield shapes


def probe_batches(
    shape: tuple[int, int, int, int], mean: np.ndarray, std: np.ndarray
) -> list[np.ndarray]:
    """Make float32 inputs of one shape, the same at every call: images and noise, in turn.

    Images are smooth shades, edges and grain in 0..255, normalised by `mean` and `std`. They have
    the magnitudes and the flat regions of photographs. Noise is standard normal, so that every
    pixel differs. A batch of one gives two inputs, one of each kind.

    Args:
        shape: `(B, C, H, W)`.
        mean, std: those of `Normalize`, in 0..255; one number or one per channel.
    """
    batch, channels, height, width = shape
    random = np.random.default_rng((height, width))
    picture = np.stack(
        [cv2.resize(coarse, (width, height)) for coarse in random.uniform(0, 255, (channels, 4, 4))]
    )
    picture[:, height // 4 : height // 2, width // 4 : width // 2] = 255
    picture[:, height // 2 :, : width // 3] = 0
    picture = (picture + random.normal(0, 4, picture.shape)).clip(0, 255).round()
    picture = ((picture.transpose(1, 2, 0) - mean) / std).transpose(2, 0, 1)
    noise = random.standard_normal(picture.shape)
    pair = np.stack([picture, noise]).astype(np.float32)
    if batch == 1:
        return [pair[:1], pair[1:]]
    return [np.concatenate([pair] * (batch // 2 + 1))[:batch]]
