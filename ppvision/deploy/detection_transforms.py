"""What happens to a picture before a detector, without PaddleDetection: numpy and OpenCV.

Names, parameters and results are those of PaddleDetection's operators (the tests compare the
arrays), so that a `deploy.yaml` can carry the transforms of a configuration as they stand:
`{Resize: {target_size: [256, 320], keep_ratio: false}}`.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from ppvision.errors import InputError

Inputs = dict[str, np.ndarray]  # image [H, W, 3] on the way, [3, H, W] at its end; im_shape [2];
# scale_factor [2]: height, width each


class Resize:
    """Resize to `target_size` (one number, or [height, width]).

    Args:
        target_size: pixels.
        keep_ratio: fit the picture inside of it (or of its transpose).
        interp: OpenCV's number. Default 1, bilinear.
    """

    def __init__(
        self,
        target_size: int | Sequence[int],
        keep_ratio: bool,
        interp: int = cv2.INTER_LINEAR,
    ) -> None:
        size = [target_size] * 2 if isinstance(target_size, int) else list(target_size)
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in size)
        if len(size) != 2 or not whole:
            raise InputError(
                f"Resize: expected target_size as one size or [height, width], got {target_size!r}."
            )
        if interp not in range(5):
            raise InputError(f"Resize: expected interp from 0 to 4 (OpenCV's), got {interp!r}.")
        self.size, self.keep_ratio, self.interp = size, bool(keep_ratio), interp

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
                f"picture: {width}x{height} is too narrow to be resized to {self.size[1]}x"
                f"{self.size[0]} with its ratio kept. Crop or pad it first."
            )
        resized = cv2.resize(image, None, None, fx=across, fy=down, interpolation=self.interp)
        size = [height * down, width * across] if self.keep_ratio else self.size
        factors = inputs["scale_factor"]
        return {
            "image": resized.astype(np.float32),
            "im_shape": np.asarray(size, np.float32),
            "scale_factor": np.asarray([factors[0] * down, factors[1] * across], np.float32),
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
        if len(mean) != 3 or len(std) != 3 or 0 in std or norm_type not in ("mean_std", "none"):
            raise InputError(
                "NormalizeImage: expected three numbers each as mean and std, none of std zero, "
                f"and norm_type mean_std or none; got {mean!r}, {std!r}, {norm_type!r}."
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
        pad_to_stride: pixels; 0 leaves the picture as it is.
    """

    def __init__(self, pad_to_stride: int = 0) -> None:
        if isinstance(pad_to_stride, bool) or not isinstance(pad_to_stride, int):
            raise InputError(f"PadBatch: expected a whole pad_to_stride, got {pad_to_stride!r}.")
        self.stride = pad_to_stride

    def __call__(self, inputs: Inputs) -> Inputs:
        if self.stride <= 0:
            return inputs
        height, width = inputs["image"].shape[1:]
        down, across = (math.ceil(n / self.stride) * self.stride - n for n in (height, width))
        padded = np.pad(inputs["image"], ((0, 0), (0, down), (0, across)))
        return inputs | {"image": padded}


KNOWN: dict[str, Callable[..., Any]] = {
    known.__name__: known for known in (Resize, NormalizeImage, Permute, PadBatch)
}
_READING = "Decode"  # the picture is read already


class DetectionTransforms:
    """The transforms of a detector's `deploy.yaml`, ready to use.

    Args:
        specs: of a reader's `sample_transforms` and `batch_transforms`, one after the other.

    Raises:
        ValueError: an unknown or random transform, an unknown argument, a value out of range, or
            no Permute.
    """

    def __init__(self, specs: Sequence[Mapping[str, Any]]) -> None:
        self.transforms = [_build(spec) for spec in specs if list(spec) != [_READING]]
        if not any(isinstance(transform, Permute) for transform in self.transforms):
            raise InputError("transforms: a detector takes its channels first; expected Permute.")

    @property
    def normalize(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and std of `NormalizeImage`, for values in 0..255; 0 and 1 without one."""
        for transform in self.transforms:
            if isinstance(transform, NormalizeImage) and transform.norm_type == "mean_std":
                scale = 255.0 if transform.is_scale else 1.0
                return scale * transform.mean, scale * transform.std
        return np.zeros(3), np.ones(3)

    def __call__(self, image: np.ndarray) -> Inputs:
        """Transform a picture `[H, W, 3]` uint8 RGB.

        Returns:
            The network's inputs of one picture: `image` `[3, H', W']`, `im_shape` `[2]` (height and
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


def _build(spec: Mapping[str, Any]) -> Callable[[Inputs], Inputs]:
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise InputError(f"transforms: expected {{NAME: {{...}}}}, got {spec!r}.")
    ((name, options),) = spec.items()
    if name not in KNOWN:
        raise InputError(
            f"transforms: {name} cannot be reproduced in deployment; known are {_READING}, "
            f"{', '.join(KNOWN)}. Random and other training transforms belong to the TrainReader: "
            "deployment takes those of the TestReader."
        )
    options = dict(options or {})
    try:
        inspect.signature(KNOWN[name]).bind(**options)
    except TypeError as error:
        parameters = ", ".join(inspect.signature(KNOWN[name]).parameters)
        raise InputError(
            f"transforms: {name} takes {parameters or 'nothing'}; got {', '.join(options)} "
            f"({error})."
        ) from error
    return KNOWN[name](**options)
