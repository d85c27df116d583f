"""Transform images for a detector with NumPy and OpenCV, without PaddleDetection.

Names, parameters and results are those of PaddleDetection's operators (the tests compare the
arrays), so that a `deploy.yaml` can contain the transforms of a configuration unchanged: `{Resize:
{target_size: [256, 320], keep_ratio: false}}`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from ppvision.deploy.run.transforms import (
    MAX_PIXELS,
    MAX_SIDE,
    Size,
    build_known,
    check_deviation,
    check_flag,
    check_number,
    check_size,
    check_whole,
)
from ppvision.errors import InputError, shorten

Inputs = dict[str, np.ndarray]  # image [H, W, 3] on the way, [3, H, W] at its end; im_shape [2];
# scale_factor [2]: height, width each


class Resize:
    """Resize to `target_size` (one number, or [height, width]).

    Args:
        target_size: pixels.
        keep_ratio: fit the image inside it (or its transpose).
        interp: OpenCV's number of the interpolation. Default 1, bilinear.
    """

    def __init__(
        self,
        target_size: int | Sequence[int],
        keep_ratio: bool,
        interp: int = cv2.INTER_LINEAR,
    ) -> None:
        size = [target_size] * 2 if isinstance(target_size, int) else target_size
        if not isinstance(size, (list, tuple)) or len(size) != 2:
            raise InputError(
                "Resize: expected target_size as one size or [height, width], got "
                f"{shorten(target_size)}."
            )
        self.size = [check_whole("Resize", "each value of target_size", n) for n in size]
        if self.size[0] * self.size[1] > MAX_PIXELS:
            raise InputError(
                f"Resize: expected target_size of at most {MAX_PIXELS} pixels, got {self.size}."
            )
        if isinstance(interp, bool) or not isinstance(interp, int) or interp not in range(5):
            raise InputError(
                f"Resize: expected interp from 0 to 4 (OpenCV's), got {shorten(interp)}."
            )
        # PaddleDetection's configurations also use 1 and 0.
        if not isinstance(keep_ratio, int) or keep_ratio not in (0, 1):
            raise InputError(
                f"Resize: expected keep_ratio to be true or false, got {shorten(keep_ratio)}."
            )
        self.keep_ratio, self.interp = bool(keep_ratio), interp

    def __call__(self, inputs: Inputs) -> Inputs:
        image = inputs["image"]
        height, width = image.shape[:2]
        if self.keep_ratio:
            scale = min(min(self.size) / min(height, width), max(self.size) / max(height, width))
            down = across = scale
        else:
            down, across = self.size[0] / height, self.size[1] / width
        if round(height * down) < 1 or round(width * across) < 1:
            raise InputError(
                f"image: {width}x{height} is too narrow to be resized to {self.size[1]}x"
                f"{self.size[0]} with its ratio kept. Crop or pad it first."
            )
        check_size(round(width * across), round(height * down), image)
        return self._resize(inputs, down, across)

    def _resize(self, inputs: Inputs, down: float, across: float) -> Inputs:
        image = inputs["image"]
        height, width = image.shape[:2]
        resized = cv2.resize(image, None, None, fx=across, fy=down, interpolation=self.interp)
        size = [height * down, width * across] if self.keep_ratio else self.size
        factors = inputs["scale_factor"]
        return {
            "image": resized.astype(np.float32),
            "im_shape": np.asarray(size, np.float32),
            "scale_factor": np.asarray([factors[0] * down, factors[1] * across], np.float32),
        }


class _ResizeOfPaddleX(Resize):
    """With the ratio kept, uses sizes in whole pixels, like PaddleX's sampling, `im_shape` and
    `scale_factor`. PaddleDetection uses the scale before rounding."""

    def _resize(self, inputs: Inputs, down: float, across: float) -> Inputs:
        image = inputs["image"]
        height, width = image.shape[:2]
        size = round(height * down), round(width * across)
        resized = cv2.resize(image, (size[1], size[0]), interpolation=self.interp)
        factors = size[0] / height, size[1] / width
        return {
            "image": resized.astype(np.float32),
            "im_shape": np.asarray(size, np.float32),
            "scale_factor": np.asarray(factors, np.float32),
        }


class NormalizeImage:
    """`(x / 255 - mean) / std`, channel by channel.

    Args:
        mean, std: three numbers each. Default ImageNet's.
        is_scale: whether to divide by 255. Default True.
        norm_type: "mean_std" (default), or "none" for no mean and std.
    """

    def __init__(
        self,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        is_scale: bool = True,
        norm_type: str = "mean_std",
    ) -> None:
        for name, values in (("mean", mean), ("std", std)):
            if not isinstance(values, (list, tuple)) or len(values) != 3:
                raise InputError(
                    f"NormalizeImage: expected {name} to be a list of three numbers, got "
                    f"{shorten(values)}."
                )
        for value in mean:
            check_number("NormalizeImage", "each value of mean", value)
        for value in std:
            check_deviation("NormalizeImage", value)
        check_flag("NormalizeImage", "is_scale", is_scale)
        if not isinstance(norm_type, str) or norm_type not in ("mean_std", "none"):
            raise InputError(
                f"NormalizeImage: expected norm_type mean_std or none, got {shorten(norm_type)}."
            )
        self.mean, self.std = np.array(mean, np.float64), np.array(std, np.float64)
        self.is_scale, self.norm_type = is_scale, norm_type

    def __call__(self, inputs: Inputs) -> Inputs:
        # In place on float32 with float64 constants, as PaddleDetection does: the same rounding.
        image = inputs["image"].astype(np.float32)
        if self.is_scale:
            image *= 1.0 / 255.0
        if self.norm_type == "mean_std":
            image -= self.mean
            image /= self.std
        return inputs | {"image": image}


class Permute:
    """Channels first."""

    def __call__(self, inputs: Inputs) -> Inputs:
        return inputs | {"image": np.ascontiguousarray(inputs["image"].transpose(2, 0, 1))}


class PadBatch:
    """Zeros at the bottom and on the right, to a multiple of a stride; channels first.

    Args:
        pad_to_stride: pixels; 0 leaves the image as it is.
    """

    def __init__(self, pad_to_stride: int = 0) -> None:
        # PaddleDetection treats a negative stride as none.
        self.stride = check_whole("PadBatch", "pad_to_stride", pad_to_stride, lowest=-MAX_SIDE)

    def __call__(self, inputs: Inputs) -> Inputs:
        if self.stride <= 0:
            return inputs
        height, width = inputs["image"].shape[1:]
        down, across = (math.ceil(n / self.stride) * self.stride - n for n in (height, width))
        check_size(width + across, height + down, inputs["image"].transpose(1, 2, 0))
        padded = np.pad(inputs["image"], ((0, 0), (0, down), (0, across)))
        return inputs | {"image": padded}


KNOWN: dict[str, Callable[..., Any]] = {
    known.__name__: known for known in (Resize, NormalizeImage, Permute, PadBatch)
}
# Transforms that PaddleX 3.7 computes in another way under the same name.
_OF_PADDLEX: dict[str, Callable[..., Any]] = {"Resize": _ResizeOfPaddleX}
_READING = "Decode"  # the image is read already


class DetectionTransforms:
    """The transforms of a detector's `deploy.yaml`, ready to use.

    Args:
        specs: of a reader's `sample_transforms` and `batch_transforms`, one after the other.
        as_paddlex: compute them like PaddleX 3.7 with an export for it: resized images and scales
            differ if the ratio is kept. Default False.

    Raises:
        ValueError: an unknown or random transform, an unknown argument, a value out of range, or
            no Permute.
    """

    def __init__(self, specs: Sequence[Mapping[str, Any]], *, as_paddlex: bool = False) -> None:
        if isinstance(specs, (str, Mapping)) or not isinstance(specs, Sequence):
            raise InputError(
                f"transforms: expected a list of {{NAME: {{...}}}}, got {shorten(specs)}."
            )
        known = KNOWN | (_OF_PADDLEX if as_paddlex else {})
        built = [_build(spec, known) for spec in specs]
        self.transforms = [transform for transform in built if transform is not None]
        places = [n for n, t in enumerate(self.transforms) if isinstance(t, Permute)]
        if len(places) != 1:
            raise InputError(
                "transforms: a detector takes its channels first; expected one Permute, got "
                f"{len(places)}."
            )
        for place, transform in enumerate(self.transforms):
            is_batch = isinstance(transform, PadBatch)
            if not isinstance(transform, Permute) and is_batch != (place > places[0]):
                raise InputError(
                    f"transforms: expected {type(transform).__name__} "
                    f"{'after' if is_batch else 'before'} Permute."
                )

    @property
    def normalize(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and std of `NormalizeImage` for values in 0..255; 0 and 1 without one."""
        for transform in self.transforms:
            if isinstance(transform, NormalizeImage) and transform.norm_type == "mean_std":
                scale = 255.0 if transform.is_scale else 1.0
                return scale * transform.mean, scale * transform.std
        return np.zeros(3), np.ones(3)

    def __call__(self, image: np.ndarray) -> Inputs:
        """Transform an image `[H, W, 3]` uint8 RGB.

        Returns:
            The network's inputs of one image: `image` `[3, H', W']`, `im_shape` `[2]` (height and
            width after resizing), `scale_factor` `[2]` (by which it was resized), all float32.
        """
        inputs = {
            "image": image,
            "im_shape": np.asarray(image.shape[:2], np.float32),
            "scale_factor": np.ones(2, np.float32),
        }
        for transform in self.transforms:
            inputs = transform(inputs)
        return inputs | {"image": np.ascontiguousarray(inputs["image"], np.float32)}

    def find_output_size(self) -> Size | None:
        """Return the (height, width) that every image gets; None if it depends on the image."""
        size = None
        for transform in self.transforms:
            if isinstance(transform, Resize):
                height, width = transform.size
                size = None if transform.keep_ratio else (height, width)
            elif isinstance(transform, PadBatch) and size is not None and transform.stride > 0:
                height, width = (math.ceil(n / transform.stride) * transform.stride for n in size)
                size = height, width
        return size


def _build(
    spec: Mapping[str, Any], known: Mapping[str, Callable[..., Any]]
) -> Callable[[Inputs], Inputs] | None:
    """Make a transform; return None for the one that reads the image."""
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise InputError(f"transforms: expected {{NAME: {{...}}}}, got {shorten(spec)}.")
    ((name, options),) = spec.items()
    if name == _READING:
        return None
    if not isinstance(name, str) or name not in known:
        shown = name[:60] if isinstance(name, str) else shorten(name)
        raise InputError(
            f"transforms: {shown} cannot be reproduced in deployment; known are {_READING}, "
            f"{', '.join(known)}. Random and other training transforms belong to the TrainReader: "
            "deployment takes those of the TestReader."
        )
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise InputError(f"transforms: {name}: expected options by name, got {shorten(options)}.")
    return build_known(known[name], name, options)
