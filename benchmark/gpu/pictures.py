"""Pictures that `benchmark.gpu.data` packed: decoded on all cores, and augmented on the GPU."""

import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 500  # pictures that a thread decodes at once


def read_pictures(path: Path, per_class: int | None = None) -> tuple[Tensor, Tensor]:
    """Decode a file of `pack_pictures`.

    Args:
        path: `.npz`.
        per_class: of each class only so many; None for all.

    Returns:
        Pictures `[N, H, W, 3]` uint8 RGB, and class numbers `[N]` int64.
    """
    with np.load(path) as file:
        packed = {name: file[name] for name in file.files}
    labels = packed["label"].astype(np.int64)
    chosen = np.arange(len(labels))
    if per_class is not None:
        chosen = np.sort(
            np.concatenate([np.flatnonzero(labels == k)[:per_class] for k in np.unique(labels)])
        )
    heads = np.split(packed["heads"], np.cumsum(packed["head_sizes"])[:-1])
    ends = np.cumsum(packed["size"])
    begins = ends - packed["size"]

    def decode(numbers: np.ndarray) -> np.ndarray:
        found = []
        for k in numbers:
            rest = packed["rests"][begins[k] : ends[k]]
            content = np.concatenate([heads[packed["head"][k]], rest])
            found.append(cv2.imdecode(content, cv2.IMREAD_COLOR)[:, :, ::-1])
        return np.stack(found)

    # OpenCV decodes without Python's lock.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        parts = list(pool.map(decode, _chunks(chosen)))
    return torch.from_numpy(np.concatenate(parts)), torch.from_numpy(labels[chosen])


def _chunks(numbers: np.ndarray) -> Iterable[np.ndarray]:
    return (numbers[k : k + CHUNK] for k in range(0, len(numbers), CHUNK))


# Columns of the random numbers that `augment` takes for each picture.
DRAWS = 14
# Least area of a crop: the teacher's answer is of the whole picture (`ppvision.data.augment`).
KEPT_AREA = 0.7
RATIO = 4 / 3  # greatest change of a crop's shape
DEGREES = 8.0  # greatest rotation
COLOUR = 0.3  # greatest change of brightness, contrast and saturation
ERASED = 0.1  # share of the pictures that lose a rectangle
ERASED_AREA = (0.02, 1 / 3)
GREY = (0.299, 0.587, 0.114)  # of red, green and blue in what the eye sees as brightness


def augment(pictures: Tensor, draws: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """Random crops, mirrors, small rotations, colours and erased rectangles.

    Nothing is read back from the GPU, and the same draws give the same pictures, so that it can be
    part of a CUDA graph.

    Args:
        pictures: `[B, S, S, 3]` uint8.
        draws: `[B, DRAWS]`, uniform in [0, 1).
        size: of the results. Where it is a fraction of S, pixels are averaged.
        mean, std: of the channels, `[3]`, for values from 0 to 1.

    Returns:
        `[B, 3, size, size]` float32, normalised. Pictures with `mirrored(draws)` are mirrored.
    """
    signed = 2 * draws - 1
    area = 1 - (1 - KEPT_AREA) * draws[:, 0]
    limit = torch.minimum(-area.log(), torch.full_like(area, math.log(RATIO)))
    ratio = (signed[:, 1] * limit).exp()  # both sides stay within the picture
    width, height = (area * ratio).sqrt(), (area / ratio).sqrt()
    angle = signed[:, 2] * math.radians(DEGREES)
    flip = 1 - 2 * mirrored(draws).float()
    finer = max(1, pictures.shape[1] // size)
    side = size * finer
    place = (torch.arange(side, device=draws.device) + 0.5) * (2 / side) - 1  # [S], -1 to 1
    across, down = (flip[:, None] * place)[:, None, :], place[None, :, None]  # [B, 1, S], [1, S, 1]
    sine, cosine, width, height = (
        v[:, None, None] for v in (angle.sin(), angle.cos(), width, height)
    )
    left, top = signed[:, 3, None, None] * (1 - width), signed[:, 4, None, None] * (1 - height)
    grid = torch.stack(  # [B, S, S, 2]: where each pixel of the result is in the picture
        [
            left + width * (cosine * across - sine * down),
            top + height * (sine * across + cosine * down),
        ],
        dim=3,
    )
    x = pictures.permute(0, 3, 1, 2).float() / 255.0  # [B, 3, S, S]
    x = F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    x = _recolour(F.avg_pool2d(x, finer) if finer > 1 else x, signed[:, 6:9])
    x = (x - mean[:, None, None]) / std[:, None, None]
    return x * _kept_pixels(draws[:, 9:14], size)


def mirrored(draws: Tensor) -> Tensor:
    """Which pictures `augment` mirrors: `[B]` bool."""
    return draws[:, 5] < 0.5


def _recolour(x: Tensor, signed: Tensor) -> Tensor:
    brightness, contrast, saturation = (1 + COLOUR * signed)[:, :, None, None, None].unbind(1)
    x = x * brightness
    grey = sum(x[:, k : k + 1] * share for k, share in enumerate(GREY))  # [B, 1, H, W]
    x = grey + (x - grey) * saturation
    middle = grey.mean((2, 3), keepdim=True)
    return (middle + (x - middle) * contrast).clamp(0, 1)


def _kept_pixels(draws: Tensor, size: int) -> Tensor:
    """`[B, 1, size, size]`: 0 in the erased rectangles, 1 elsewhere."""
    least, most = ERASED_AREA
    area = least + (most - least) * draws[:, 1]
    ratio = ((2 * draws[:, 2] - 1) * math.log(2)).exp()
    sides = [(area * ratio).sqrt(), (area / ratio).sqrt()]
    place = (torch.arange(size, device=draws.device) + 0.5) / size
    inside = []
    for side, draw in zip(sides, (draws[:, 3], draws[:, 4]), strict=True):
        begin = (draw * (1 - side))[:, None]
        inside.append((place >= begin) & (place < begin + side[:, None]))  # [B, size]
    erased = inside[0][:, :, None] & inside[1][:, None, :] & (draws[:, 0] < ERASED)[:, None, None]
    return (~erased)[:, None].float()
