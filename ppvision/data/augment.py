"""Augmentations for classification that `paddle.vision.transforms` does not have.

Random numbers come from Python's `random` and NumPy's global generator, which the engine seeds for
every sample; a batch is mixed right after its last sample was read, from the same generators.
"""

import math
import random
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from paddle.vision import transforms as vision
from paddle.vision.transforms import functional as V

from ppvision.errors import InputError
from ppvision.forms.paddle_private import collate_samples

# The strength of each operation of RandAugment at the highest magnitude.
MAGNITUDES = 10
MAX_ROTATION = 30.0  # degrees
MAX_SHEAR = 0.3
MAX_TRANSLATION = 0.45  # of the side
MAX_ENHANCEMENT = 0.9  # brightness, contrast, saturation and sharpness: factor 1 -/+ this
MAX_POSTERIZED_BITS = 4  # bits that posterize takes away

Operation = Callable[[np.ndarray, float, int], np.ndarray]


def _affine(image: np.ndarray, matrix: Sequence[Sequence[float]], fill: int) -> np.ndarray:
    height, width = image.shape[:2]
    return cv2.warpAffine(
        image, np.asarray(matrix, np.float64), (width, height), borderValue=(fill,) * 3
    )


def _rotate(image: np.ndarray, strength: float, fill: int) -> np.ndarray:
    height, width = image.shape[:2]
    center = ((width - 1) / 2, (height - 1) / 2)
    return _affine(image, cv2.getRotationMatrix2D(center, strength * MAX_ROTATION, 1.0), fill)


def _shear_x(image: np.ndarray, strength: float, fill: int) -> np.ndarray:
    shear = strength * MAX_SHEAR
    return _affine(image, [[1, shear, -shear * (image.shape[0] - 1) / 2], [0, 1, 0]], fill)


def _shear_y(image: np.ndarray, strength: float, fill: int) -> np.ndarray:
    shear = strength * MAX_SHEAR
    return _affine(image, [[1, 0, 0], [shear, 1, -shear * (image.shape[1] - 1) / 2]], fill)


def _translate_x(image: np.ndarray, strength: float, fill: int) -> np.ndarray:
    shift = strength * MAX_TRANSLATION * image.shape[1]
    return _affine(image, [[1, 0, shift], [0, 1, 0]], fill)


def _translate_y(image: np.ndarray, strength: float, fill: int) -> np.ndarray:
    shift = strength * MAX_TRANSLATION * image.shape[0]
    return _affine(image, [[1, 0, 0], [0, 1, shift]], fill)


def _brightness(image: np.ndarray, strength: float, fill: int) -> np.ndarray:
    return V.adjust_brightness(image, 1 + strength * MAX_ENHANCEMENT)


def _away_from(other: np.ndarray | np.float32, image: np.ndarray, factor: float) -> np.ndarray:
    """Blend: factor 0 gives `other`, 1 gives `image`, larger factors go beyond `image`."""
    mixed = other + (image.astype(np.float32) - other) * factor
    return mixed.round().clip(0, 255).astype(np.uint8)


def _contrast(image: np.ndarray, strength: float, fill: int) -> np.ndarray:
    # Paddle's own uses another mean than Pillow, which the papers used: up to 19 grey levels of
    # difference.
    mean = np.round(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).mean(dtype=np.float32))
    return _away_from(mean, image, 1 + strength * MAX_ENHANCEMENT)


def _saturation(image: np.ndarray, strength: float, fill: int) -> np.ndarray:
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    return _away_from(grey, image, 1 + strength * MAX_ENHANCEMENT)


def _sharpness(image: np.ndarray, strength: float, fill: int) -> np.ndarray:
    smooth = cv2.blur(image, (3, 3)).astype(np.float32)
    return _away_from(smooth, image, 1 + strength * MAX_ENHANCEMENT)


def _autocontrast(image: np.ndarray, strength: float, fill: int) -> np.ndarray:
    low = image.min(axis=(0, 1)).astype(np.float32)
    spread = np.maximum(1, image.max(axis=(0, 1)) - low)
    return ((image - low) * (255 / spread)).round().clip(0, 255).astype(np.uint8)


def _equalize(image: np.ndarray, strength: float, fill: int) -> np.ndarray:
    return np.dstack([cv2.equalizeHist(np.ascontiguousarray(c)) for c in cv2.split(image)])


def _posterize(image: np.ndarray, strength: float, fill: int) -> np.ndarray:
    gone = round(MAX_POSTERIZED_BITS * strength)
    return image & np.uint8(256 - 2**gone)


def _solarize(image: np.ndarray, strength: float, fill: int) -> np.ndarray:
    return np.where(image >= 256 - round(256 * strength), 255 - image, image)


def _invert(image: np.ndarray, strength: float, fill: int) -> np.ndarray:
    return 255 - image


def _identity(image: np.ndarray, strength: float, fill: int) -> np.ndarray:
    return image


# Operations whose strength has a sign, -1 to 1; then operations with a strength of 0 to 1 or none.
SIGNED: dict[str, Operation] = {
    "rotate": _rotate,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "sharpness": _sharpness,
}
UNSIGNED: dict[str, Operation] = {
    "identity": _identity,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "posterize": _posterize,
    "solarize": _solarize,
    "invert": _invert,
}


class RandAugment:
    """Apply `num_ops` random operations of one strength.

    Args:
        num_ops: operations per image. Default 2.
        magnitude: strength, 0 to 10. Default 9.
        magnitude_std: its spread (normal). Default 0.5, as in the recipes of Swin and CSWin.
        fill: grey level of pixels that come from outside the image. Default 128.

    Shapes: `[H, W, 3]` uint8 RGB -> the same.

    Raises:
        ValueError: a value out of its range.

    Source: Cubuk et al., "RandAugment", 2020. The maximum strengths follow the paper's lists; we
        chose `invert` and the signs.
    """

    def __init__(
        self, num_ops: int = 2, magnitude: float = 9, magnitude_std: float = 0.5, fill: int = 128
    ) -> None:
        if not 0 <= magnitude <= MAGNITUDES:
            raise InputError(f"RandAugment: expected magnitude 0 to {MAGNITUDES}, got {magnitude}.")
        if num_ops < 1 or magnitude_std < 0 or not 0 <= fill <= 255:
            raise InputError(
                "RandAugment: expected num_ops of at least 1, magnitude_std of at least 0, fill 0 "
                f"to 255, got {num_ops}, {magnitude_std}, {fill}."
            )
        self.num_ops = num_ops
        self.magnitude = magnitude
        self.magnitude_std = magnitude_std
        self.fill = fill

    def __call__(self, image: np.ndarray) -> np.ndarray:
        for _ in range(self.num_ops):
            name = random.choice([*SIGNED, *UNSIGNED])
            level = random.gauss(self.magnitude, self.magnitude_std)
            strength = min(max(level, 0.0), MAGNITUDES) / MAGNITUDES
            if name in SIGNED:
                image = SIGNED[name](image, strength * random.choice((-1, 1)), self.fill)
            else:
                image = UNSIGNED[name](image, strength, self.fill)
        return image


class RandomErasing:
    """Replace a random rectangle by normal noise, in images that are normalised already.

    `paddle.vision` has one, but its noise is meant for 0 to 255.

    Args:
        prob: fraction of the images. Default 0.25.
        scale: smallest and largest area, as a fraction of the image. Default (0.02, 1 / 3).
        ratio: smallest height / width; the largest is its inverse. Default 0.3.

    Shapes: `[H, W, 3]` float -> the same.

    Raises:
        ValueError: a value out of its range.

    Source: Zhong et al., "Random Erasing Data Augmentation", 2020; noise per pixel as in the
    recipes of Swin and CSWin.
    """

    def __init__(
        self, prob: float = 0.25, scale: Sequence[float] = (0.02, 1 / 3), ratio: float = 0.3
    ) -> None:
        if not 0 <= prob <= 1 or not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio <= 1:
            raise InputError(
                "RandomErasing: expected prob in [0, 1], 0 < scale[0] <= scale[1] <= 1 and ratio "
                f"in (0, 1], got {prob}, {list(scale)}, {ratio}."
            )
        self.prob = prob
        self.scale = tuple(scale)
        self.ratio = ratio

    def __call__(self, image: np.ndarray) -> np.ndarray:
        if not np.issubdtype(image.dtype, np.floating):
            raise InputError(
                f"RandomErasing: expected a normalised image, got {image.dtype}. Put it after "
                "Normalize."
            )
        if random.random() >= self.prob:
            return image
        height, width = image.shape[:2]
        for _ in range(10):  # the rectangle may not fit: try again, as in the paper
            area = random.uniform(*self.scale) * height * width
            ratio = math.exp(random.uniform(math.log(self.ratio), -math.log(self.ratio)))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < h < height and 0 < w < width:
                top, left = random.randint(0, height - h), random.randint(0, width - w)
                image = image.copy()
                image[top : top + h, left : left + w] = np.random.normal(size=(h, w, 3))
                break
        return image


# A teacher's answer is for the whole image. In less than this fraction of it, the student may not
# see what the teacher saw. We chose the number.
KEPT_AREA = 0.7


class RecordedFlip:
    """`paddle.vision.transforms.RandomHorizontalFlip` with the same random draws; it records what
    it did.

    Args:
        prob: fraction of the images. Default 0.5.

    Attributes:
        flipped: whether the last image was mirrored.
    """

    def __init__(self, prob: float = 0.5) -> None:
        self.prob = prob
        self.flipped = False

    def __call__(self, image: np.ndarray) -> np.ndarray:
        self.flipped = random.random() < self.prob
        return V.hflip(image) if self.flipped else image


class RandomLargeCrop(vision.RandomResizedCrop):
    """`paddle.vision.transforms.RandomResizedCrop` with the same random draws; it keeps `KEPT_AREA`
    of images of any shape. If no crop of the wanted shape is large enough, it keeps the whole
    image.

    Paddle takes the middle of a wide or high image in this case, however much this cuts off.
    """

    def _dynamic_get_param(self, image: np.ndarray, attempts: int = 10) -> tuple[int, ...]:
        top, left, height, width = super()._dynamic_get_param(image, attempts)
        whole = image.shape[0] * image.shape[1]
        # Sides are rounded to pixels.
        if (height + 1) * (width + 1) < KEPT_AREA * whole:
            return 0, 0, image.shape[0], image.shape[1]
        return top, left, height, width


class FittingCrop(vision.RandomCrop):
    """Paddle's RandomCrop, with an error that explains what is wrong with an image that is too
    small.

    Raises:
        InputError: when called with an image, with its padding, smaller than `size`.
    """

    def _get_param(self, image: np.ndarray, output_size: tuple[int, int]) -> tuple[int, ...]:
        height, width = image.shape[:2]
        if height < output_size[0] or width < output_size[1]:
            raise InputError(
                f"RandomCrop: expected an image of at least {output_size[1]} x {output_size[0]}, "
                f"got {width} x {height}, padding included. Put a Resize before it, or set "
                "pad_if_needed: true."
            )
        return super()._get_param(image, output_size)


class CheckedCrop:
    """RandomCrop or CenterCrop that refuses to cut off more than `KEPT_AREA` allows.

    Args:
        crop: the transform.
        name: for the error.
        size: height and width of the crop.
        padding: pixels that it adds around the image first.

    Raises:
        InputError: when called with an image of which too little would be left.
    """

    def __init__(self, crop: Callable, name: str, size: tuple[int, int], padding: int = 0) -> None:
        self.crop = crop
        self.name = name
        self.size = size
        self.padding = padding

    def __call__(self, image: np.ndarray) -> np.ndarray:
        # In the worst case the crop begins where the padding begins.
        kept = math.prod(
            min(side, max(0, cut - self.padding)) / side
            for side, cut in zip(image.shape[:2], self.size, strict=True)
        )
        if kept < KEPT_AREA:
            height, width = image.shape[:2]
            raise InputError(
                f"{self.name}: keeps {kept:.2f} of an image of {width} x {height}. With a "
                f"teacher, random crops must keep at least {KEPT_AREA} of the area, because its "
                "answer is for the whole image. First resize to slightly more than the crop."
            )
        return self.crop(image)


class MixBatch:
    """Collate samples, with mixup or CutMix inside the batch, and smooth the targets.

    Args:
        num_classes: K.
        mixup: alpha of mixup's beta distribution; 0 never mixes. Default 0.
        cutmix: alpha of CutMix's; 0 never cuts. Default 0.
        label_smoothing: fraction of a target that is spread evenly over all classes. Default 0.
        temperature: of a teacher's answers. Default 1.

    If both are on, one of the two is drawn for every batch, with equal probability. Shapes: samples
    `([3, H, W] float32, class number)` -> `[B, 3, H, W]` and targets `[B, K]`, both float32.
    Samples with a teacher's answer, `[K]` logits, also give the teacher's probabilities `[B, K]` at
    the temperature: first softened, then mixed like the targets.

    Raises:
        ValueError: a value out of its range.

    Source: Zhang et al., "mixup", 2018; Yun et al., "CutMix", 2019.
    """

    def __init__(
        self,
        num_classes: int,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        if mixup < 0 or cutmix < 0 or not 0 <= label_smoothing < 1:
            raise InputError(
                "expected mixup and cutmix of at least 0 and label_smoothing in [0, 1), got "
                f"{mixup}, {cutmix}, {label_smoothing}."
            )
        self.num_classes = num_classes
        self.mixup = mixup
        self.cutmix = cutmix
        self.label_smoothing = label_smoothing
        self.temperature = temperature

    def __call__(self, samples: list) -> tuple[np.ndarray, ...]:
        images, labels, *answers = (np.asarray(part) for part in collate_samples(samples))
        targets = np.full(
            (len(labels), self.num_classes), self.label_smoothing / self.num_classes, np.float32
        )
        targets[np.arange(len(labels)), labels] += 1 - self.label_smoothing
        wanted = [targets, *(_soften(logits, self.temperature) for logits in answers)]
        methods = [
            method
            for method, alpha in ((self._mix, self.mixup), (self._cut, self.cutmix))
            if alpha > 0
        ]
        if methods:
            images, kept = random.choice(methods)(images)
            wanted = [shares * kept + shares[::-1] * (1 - kept) for shares in wanted]
        return images, *(shares.astype(np.float32) for shares in wanted)

    def _mix(self, images: np.ndarray) -> tuple[np.ndarray, float]:
        """Return the mixed images and the fraction of each that is its own. The rest comes from its
        partner, the image at the same place from the end."""
        kept = float(np.random.beta(self.mixup, self.mixup))
        return (images * kept + images[::-1] * (1 - kept)).astype(np.float32), kept

    def _cut(self, images: np.ndarray) -> tuple[np.ndarray, float]:
        height, width = images.shape[2:]
        side = math.sqrt(1 - np.random.beta(self.cutmix, self.cutmix))
        row, column = np.random.randint(height), np.random.randint(width)
        half_height, half_width = int(height * side) // 2, int(width * side) // 2
        top, bottom = max(row - half_height, 0), min(row + half_height, height)
        left, right = max(column - half_width, 0), min(column + half_width, width)
        mixed = images.copy()
        mixed[:, :, top:bottom, left:right] = images[::-1, :, top:bottom, left:right]
        # The fraction after clipping at the border, as in the paper's code.
        return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _soften(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Return the probabilities `[B, K]` of the classes at a temperature."""
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)
