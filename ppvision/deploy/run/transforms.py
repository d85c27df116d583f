"""Transform images for a network with NumPy and OpenCV, without PaddleSeg.

The names, parameters and results are those of PaddleSeg's `paddleseg.transforms` and, for
CenterCrop, of `paddle.vision` (the tests compare the arrays), so that a `deploy.yaml` can contain
the validation transforms of a configuration unchanged. This module has only transforms that give
the same result for the same image. Random transforms belong to training and are refused by name.
`register_transform` adds a transform of your own.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np

from ppvision.errors import InputError, InputTypeError, shorten

Size = tuple[int, int]  # (height, width)

_INTERPOLATIONS = {
    "NEAREST": cv2.INTER_NEAREST,
    "LINEAR": cv2.INTER_LINEAR,
    "CUBIC": cv2.INTER_CUBIC,
    "AREA": cv2.INTER_AREA,
    "LANCZOS4": cv2.INTER_LANCZOS4,
}


# Limits for an image that a transform makes: longest side and number of pixels. 2^28 pixels are 3
# GiB in float32; readers of images have the same limit.
MAX_SIDE = 2**16
MAX_PIXELS = 2**28

# Larger means, deviations and padding values do not occur in images, and overflow float32.
_LARGEST, _SMALLEST = 1e6, 1e-6


class Step(NamedTuple):
    """One change of size. The changes are undone on the prediction in reverse order."""

    kind: str  # "resize", "padding" or "crop" (which cannot be undone)
    before: Size


def check_size(width: int, height: int, before: np.ndarray) -> None:
    """Raise `InputError` if an image `[H, W, 3]` would become larger than the limits."""
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise InputError(
            f"image: {before.shape[1]}x{before.shape[0]} would become {width}x{height}; expected "
            f"at most {MAX_SIDE} pixels per side and {MAX_PIXELS} in all. Ask the transforms for a "
            "smaller size."
        )


def _resized(
    image: np.ndarray, width: int, height: int, interp: int = cv2.INTER_LINEAR
) -> np.ndarray:
    if width < 1 or height < 1:
        raise InputError(
            f"image: {image.shape[1]}x{image.shape[0]} would be resized to {width}x{height}; it "
            "is too narrow for the size that the transforms ask for. Crop or pad it first."
        )
    check_size(width, height, image)
    return cv2.resize(image, (width, height), interpolation=interp)


def _resized_by(image: np.ndarray, scale: float) -> np.ndarray:
    height, width = image.shape[:2]
    return _resized(image, round(width * scale), round(height * scale))


def check_whole(owner: str, name: str, value: object, *, lowest: int = 1) -> int:
    """Return a whole number from `lowest` to `MAX_SIDE`; `owner` and `name` are for the error."""
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= MAX_SIDE:
        raise InputError(
            f"{owner}: expected {name} to be a whole number of at least {lowest} and at most "
            f"{MAX_SIDE}, got {shorten(value)}."
        )
    return value


def _width_height(owner: str, value: object) -> tuple[int, int]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise InputError(f"{owner}: expected target_size [width, height], got {shorten(value)}.")
    width, height = (check_whole(owner, "each value of target_size", n) for n in value)
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{owner}: expected target_size of at most {MAX_PIXELS} pixels, got {width}x{height}."
        )
    return width, height


def check_number(
    owner: str, name: str, value: object, lowest: float = -_LARGEST, highest: float = _LARGEST
) -> float:
    """Return a finite number in a range; `owner` and `name` are for the error."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    number: Any = value if is_number else math.nan
    if not lowest <= number <= highest:  # comparisons with NaN are false
        raise InputError(
            f"{owner}: expected {name} to be a number from {lowest:g} to {highest:g}, got "
            f"{shorten(value)}."
        )
    return float(number)


def check_deviation(owner: str, value: object) -> float:
    """Return a number that is used as a divisor; see `check_number`."""
    number = check_number(owner, "each value of std", value)
    if abs(number) < _SMALLEST:
        raise InputError(
            f"{owner}: expected std without zeros (at least {_SMALLEST:g}), got {number!r}."
        )
    return number


def check_flag(owner: str, name: str, value: object) -> bool:
    """Return True or False; `owner` and `name` are for the error."""
    if not isinstance(value, bool):
        raise InputError(f"{owner}: expected {name} to be true or false, got {shorten(value)}.")
    return value


class Resize:
    """Resize to `target_size` [width, height].

    Args:
        target_size: default (512, 512).
        keep_ratio: fit the image inside `target_size` (or its transpose) instead. Default False.
        size_divisor: round the new width and height up to multiples of this. Default None.
        interp: NEAREST, LINEAR, CUBIC, AREA or LANCZOS4. Default LINEAR. (RANDOM is refused.)
    """

    def __init__(
        self,
        target_size: Sequence[int] = (512, 512),
        keep_ratio: bool = False,
        size_divisor: int | None = None,
        interp: str = "LINEAR",
    ) -> None:
        self.target_size = _width_height("Resize", target_size)
        self.keep_ratio = check_flag("Resize", "keep_ratio", keep_ratio)
        if size_divisor is not None:
            check_whole("Resize", "size_divisor", size_divisor)
        self.size_divisor = size_divisor
        if not isinstance(interp, str) or interp not in _INTERPOLATIONS:
            raise InputError(
                f"Resize: expected interp to be one of {list(_INTERPOLATIONS)}, got "
                f"{shorten(interp)}. A random interpolation cannot be deployed."
            )
        self.interp = _INTERPOLATIONS[interp]

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, Step]:
        height, width = image.shape[:2]
        new_width, new_height = self.target_size
        if self.keep_ratio:
            scale = min(
                max(self.target_size) / max(width, height),
                min(self.target_size) / min(width, height),
            )
            new_width, new_height = round(width * scale), round(height * scale)
        if self.size_divisor is not None:
            new_width, new_height = (
                math.ceil(n / self.size_divisor) * self.size_divisor
                for n in (new_width, new_height)
            )
        resized = _resized(image, new_width, new_height, self.interp)
        return resized, Step("resize", (height, width))


class ResizeByLong:
    """Resize the longer side to `long_size`, keeping the aspect ratio."""

    def __init__(self, long_size: int) -> None:
        self.long_size = check_whole("ResizeByLong", "long_size", long_size)

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, Step]:
        height, width = image.shape[:2]
        resized = _resized_by(image, self.long_size / max(height, width))
        return resized, Step("resize", (height, width))


class ResizeByShort:
    """Resize the shorter side to `short_size`, keeping the aspect ratio.

    Args:
        short_size: new length of the shorter side. (PaddleSeg draws one from a list; here a list is
            refused.)
        max_size: if the longer side would exceed this, it becomes about `max_size` instead.
            Default: no limit.

    PaddleSeg's object keeps the lowered `short_size` for later images; here every image is treated
    as by a new object.
    """

    def __init__(self, short_size: int, max_size: float = 1e10) -> None:
        self.short_size = check_whole("ResizeByShort", "short_size", short_size)
        self.max_size = check_number("ResizeByShort", "max_size", max_size, 1, 1e12)

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, Step]:
        height, width = image.shape[:2]
        short, long = min(height, width), max(height, width)
        short_size = self.short_size
        if short_size / short * long > self.max_size:
            short_size = int((self.max_size / long) * short)
        return _resized_by(image, short_size / short), Step("resize", (height, width))


class LimitLong:
    """Reduce the longer side to `max_long` or enlarge it to `min_long`, keeping the aspect
    ratio."""

    def __init__(self, max_long: int | None = None, min_long: int | None = None) -> None:
        for name, value in (("max_long", max_long), ("min_long", min_long)):
            if value is not None:
                check_whole("LimitLong", name, value)
        if max_long is not None and min_long is not None and min_long > max_long:
            raise InputError(
                f"LimitLong: expected min_long <= max_long, got {min_long} and {max_long}."
            )
        self.max_long, self.min_long = max_long, min_long

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, Step]:
        height, width = image.shape[:2]
        long = target = max(height, width)
        if self.max_long is not None and long > self.max_long:
            target = self.max_long
        elif self.min_long is not None and long < self.min_long:
            target = self.min_long
        resized = image if target == long else _resized_by(image, target / long)
        return resized, Step("resize", (height, width))


class Padding:
    """Pad at the bottom and on the right to `target_size` [width, height].

    Args:
        target_size: at least the image's size.
        im_padding_value: value of the border, in the image's units at that point. Default 127.5.
        label_padding_value: for training; no effect here.
    """

    def __init__(
        self,
        target_size: Sequence[int],
        im_padding_value: float = 127.5,
        label_padding_value: float = 255,
    ) -> None:
        self.target_size = _width_height("Padding", target_size)
        self.value = check_number("Padding", "im_padding_value", im_padding_value)
        check_number("Padding", "label_padding_value", label_padding_value)

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, Step]:
        height, width = image.shape[:2]
        new_width, new_height = self.target_size
        if new_width < width or new_height < height:
            raise InputError(
                f"Padding: expected an image of at most {new_width}x{new_height} (width x "
                f"height), got {width}x{height}. Put a resize before Padding."
            )
        check_size(new_width, new_height, image)
        padded = cv2.copyMakeBorder(
            image,
            0,
            new_height - height,
            0,
            new_width - width,
            cv2.BORDER_CONSTANT,
            value=(self.value,) * 3,
        )
        return padded, Step("padding", (height, width))


class PaddingByAspectRatio:
    """Pad at the bottom or on the right until width / height is `aspect_ratio`.

    Args:
        aspect_ratio: default 1.
        im_padding_value, label_padding_value: see `Padding`.
    """

    def __init__(
        self,
        aspect_ratio: float = 1,
        im_padding_value: float = 127.5,
        label_padding_value: float = 255,
    ) -> None:
        owner = "PaddingByAspectRatio"
        # A ratio above that of the longest side to one pixel pads every image beyond the longest
        # side.
        self.aspect_ratio = check_number(
            owner, "aspect_ratio", aspect_ratio, 1 / MAX_SIDE, MAX_SIDE
        )
        self.value = check_number(owner, "im_padding_value", im_padding_value)
        check_number(owner, "label_padding_value", label_padding_value)

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, Step | None]:
        height, width = image.shape[:2]
        ratio = width / height
        if ratio == self.aspect_ratio:
            return image, None
        if ratio > self.aspect_ratio:
            height = int(width / self.aspect_ratio)
        else:
            width = int(height * self.aspect_ratio)
        check_size(width, height, image)
        return Padding((width, height), self.value)(image)


class CenterCrop:
    """Cut out the middle, as `paddle.vision` does. It is for classification, which undoes no
    change.

    Args:
        target_size: [width, height], at most the image's size.
    """

    def __init__(self, target_size: Sequence[int]) -> None:
        self.target_size = _width_height("CenterCrop", target_size)

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, Step]:
        height, width = image.shape[:2]
        new_width, new_height = self.target_size
        if new_width > width or new_height > height:
            raise InputError(
                f"CenterCrop: expected an image of at least {new_width}x{new_height} (width x "
                f"height), got {width}x{height}. Put a resize before CenterCrop."
            )
        top, left = self._start(height - new_height), self._start(width - new_width)
        cut = image[top : top + new_height, left : left + new_width]
        return cut, Step("crop", (height, width))

    @staticmethod
    def _start(rest: int) -> int:
        """Return how many of the pixels that are cut off are before the middle."""
        return round(rest / 2)


class _CenterCropOfPaddleX(CenterCrop):
    @staticmethod
    def _start(rest: int) -> int:
        return rest // 2  # of 3: 1, where `paddle.vision` has 2


class Normalize:
    """`(x / 255 - mean) / std`, per channel or with one value for all.

    Args:
        mean, std: one or three numbers, for values in [0, 1]. Default 0.5.
    """

    def __init__(self, mean: Sequence[float] = (0.5,), std: Sequence[float] = (0.5,)) -> None:
        for name, values in (("mean", mean), ("std", std)):
            if not isinstance(values, (list, tuple)) or len(values) not in (1, 3):
                raise InputError(
                    f"Normalize: expected {name} to be a list of 1 or 3 numbers, got "
                    f"{shorten(values)}."
                )
        for value in mean:
            check_number("Normalize", "each value of mean", value)
        for value in std:
            check_deviation("Normalize", value)
        self.mean, self.std = np.array(mean, "float64"), np.array(std, "float64")
        every_byte = np.arange(256, dtype=np.uint8).reshape(256, 1, 1).repeat(3, axis=2)
        self._of_bytes = np.ascontiguousarray(self._computed(every_byte).T)  # [3, 1, 256]

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, None]:
        return (self._looked_up if image.dtype == np.uint8 else self._computed)(image), None

    def _looked_up(self, image: np.ndarray) -> np.ndarray:
        """Look up the result of `_computed` for each byte: the same numbers in a tenth of the time,
        and already channels-first in memory, as the network needs them."""
        planes = np.empty((3, *image.shape[:2]), np.float32)
        for channel, (plane, of_bytes) in enumerate(zip(planes, self._of_bytes, strict=True)):
            cv2.LUT(cv2.extractChannel(image, channel), of_bytes, dst=plane)
        return planes.transpose(1, 2, 0)

    def _computed(self, image: np.ndarray) -> np.ndarray:
        # In place on float32 with float64 constants, as PaddleSeg does: the same rounding.
        image = image.astype(np.float32, copy=False) / 255.0
        image -= self.mean
        image /= self.std
        return image


KNOWN: dict[str, Callable[..., Any]] = {
    transform.__name__: transform
    for transform in (
        Resize,
        ResizeByLong,
        ResizeByShort,
        LimitLong,
        Padding,
        PaddingByAspectRatio,
        CenterCrop,
        Normalize,
    )
}

# Transforms that PaddleX 3.7 computes in another way under the same name.
_OF_PADDLEX: dict[str, Callable[..., Any]] = {"CenterCrop": _CenterCropOfPaddleX}

# -- transforms of others --------------------------------------------------------------------------

_registered: dict[str, type] = {}
_followers: dict[str, Callable[[str], None]] = {}

T = TypeVar("T", bound=type)


def register_transform(transform: T) -> T:
    """Decorator: register your own transform under the name of its class.

        @register_transform
        class Gamma:
            def __init__(self, gamma: float = 1.0) -> None:
                self.gamma = gamma

            def __call__(self, image: np.ndarray) -> np.ndarray:
                return 255 * (image / 255) ** self.gamma

    A config of segmentation or classification may then name it in the transforms of its training
    and validation data, an export writes its name and options into `deploy.yaml`, and `Predictor`
    applies it. Import the module that registers it first: name it under `imports:` in the config,
    and import it in the program that opens the export.

    Args:
        transform: a class. Its options must be values that YAML can store. Its objects take an
            image `[H, W, 3]`, RGB, float32 (0 to 255 before `Normalize`), and return an image of
            the same size. They must give the same result for the same image, and must not change
            the array that they get.

    Returns:
        The class.

    Raises:
        TypeError: not a class.
        ValueError: the name is taken.
    """
    if not isinstance(transform, type):
        raise InputTypeError(f"register_transform: expected a class, got {shorten(transform)}.")
    name = transform.__name__
    known = _registered.get(name, KNOWN.get(name))
    if known is not None and _origin(known) != _origin(transform):
        raise InputError(
            f"register_transform: {shorten(name)} is taken by {_origin(known)}; expected a new "
            "name. Rename the class."
        )

    @functools.wraps(transform, updated=())
    def build(*values: object, **options: object) -> _SameSize:
        return _SameSize(name, transform(*values, **options))

    _registered[name], KNOWN[name] = transform, build
    try:
        for follow in _followers.values():
            follow(name)
    except InputError:  # a framework has another transform with this name
        if known is None:
            del _registered[name], KNOWN[name]
        raise
    return transform


def _origin(transform: Callable[..., Any]) -> str:
    """Return an identity of a class that stays the same after a reload of its module."""
    return f"{transform.__module__}.{transform.__qualname__}"


def follow_transforms(follow: Callable[[str], None]) -> None:
    """Call a function with the name of every registered transform, also of later ones. A module has
    one such function; after a reload, the new function replaces the earlier one."""
    _followers[follow.__module__] = follow
    for name in list(_registered):
        follow(name)


class _SameSize:
    """Wraps a registered transform for this module; it changes no size, so nothing is undone
    later."""

    def __init__(self, name: str, transform: Callable[[np.ndarray], np.ndarray]) -> None:
        self._name, self._transform = name, transform

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, None]:
        found = self._transform(image)
        shape = getattr(found, "shape", None)
        if shape != image.shape:
            got = type(found).__name__ if shape is None else list(shape)
            raise InputError(
                f"transforms: expected {self._name} to return an image {list(image.shape)}, as it "
                f"was given, got {got}. Change sizes with a transform of ppvision."
            )
        return np.asarray(found, np.float32), None


# -- all of a deploy.yaml --------------------------------------------------------------------------


class Transforms:
    """The transforms of a `deploy.yaml`.

    Args:
        specs: as in a PaddleSeg configuration, for example
            `[{"type": "Resize", "target_size": [512, 512]}, {"type": "Normalize"}]`. An empty list
            only turns the image channel-first.
        as_paddlex: compute them like PaddleX 3.7 with an export for it: sizes change in bytes, not
            in float32 (up to half a grey level of difference), and CenterCrop rounds the place of
            the cut down. Default False.

    Raises:
        ValueError: an unknown or random transform, an unknown parameter, a value out of range.
    """

    def __init__(self, specs: Sequence[Mapping[str, Any]], *, as_paddlex: bool = False) -> None:
        if isinstance(specs, (str, Mapping)) or not isinstance(specs, Sequence):
            raise InputError(
                f"transforms: expected a list of {{type: ..., ...}}, got {type(specs).__name__}."
            )
        others = _OF_PADDLEX if as_paddlex else {}
        self.transforms = [_build(spec, others) for spec in specs]
        self._resize_bytes = as_paddlex

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, list[Step]]:
        """Transform an image `[H, W, 3]`, RGB, any number type with values in 0..255.

        Returns:
            The network's input `[3, H', W']`, float32, and the size changes made, in order.
        """
        # Sizes change in float32, as in PaddleSeg; only Normalize gives the same for bytes.
        normalizes_first = bool(self.transforms) and isinstance(self.transforms[0], Normalize)
        if not (normalizes_first or self._resize_bytes):
            image = image.astype(np.float32)
        steps = []
        for transform in self.transforms:
            image, step = transform(image)
            if step is not None:
                steps.append(step)
        return np.ascontiguousarray(image.transpose(2, 0, 1), np.float32), steps

    def find_output_size(self) -> Size | None:
        """Return the (height, width) that every image gets; None if it depends on the image."""
        size = None
        for transform in self.transforms:
            if isinstance(transform, (Normalize, _SameSize)):
                continue
            size = None
            if isinstance(transform, (Padding, CenterCrop)) or (
                isinstance(transform, Resize) and not transform.keep_ratio
            ):
                width, height = transform.target_size
                divisor = getattr(transform, "size_divisor", None) or 1
                size = math.ceil(height / divisor) * divisor, math.ceil(width / divisor) * divisor
        return size


def _build(
    spec: Mapping[str, Any], others: Mapping[str, Callable[..., Any]]
) -> Callable[[np.ndarray], tuple[np.ndarray, Step | None]]:
    if not isinstance(spec, Mapping) or not isinstance(spec.get("type"), str):
        raise InputError(f"transforms: expected {{type: NAME, ...}}, got {shorten(spec)}.")
    name = spec["type"]
    if name not in KNOWN:
        raise InputError(
            f"transforms: {name[:60]} cannot be reproduced in deployment; known are "
            f"{', '.join(KNOWN)}. Random and other training transforms belong to the training data "
            "only: give the transforms of the validation data. For one of your own, import the "
            "module that registers it (register_transform) first."
        )
    transform = others.get(name, KNOWN[name])
    return build_known(transform, name, {k: v for k, v in spec.items() if k != "type"})


def build_known(transform: Callable[..., Any], name: str, options: Mapping[Any, Any]) -> Any:
    """Make a transform with its options; they may be of any type.

    Raises:
        InputError: an option that it does not know or needs, or that is out of range.
    """
    given = ", ".join(shorten(key) if not isinstance(key, str) else key[:60] for key in options)
    try:
        inspect.signature(transform).bind(**options)
    except TypeError as error:
        parameters = ", ".join(inspect.signature(transform).parameters)
        raise InputError(
            f"transforms: {name} takes {parameters or 'nothing'}; got {given[:300] or 'nothing'} "
            f"({str(error)[:200]})."
        ) from error
    return transform(**options)
