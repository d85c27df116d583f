"""Pictures with boxes on a GPU: one file that travels, and random views of them.

`pack` writes the file from a folder that `ppvision data bccd` made: JPEG bytes as they are, boxes,
classes. `Views` draws a batch on the device: parts of pictures at random scales, mirrored, other
colours, four pictures in one. Pictures are sampled between pixels as OpenCV resizes them for the
evaluation (bilinear, without smoothing), so that training sees what the evaluation shows.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark.gpu.detection_losses import Targets

SPLITS = ("train", "val")
LEAST_SIDE = 2.0  # pixels of a box that is still an object


def pack(folder: Path, target: Path) -> None:
    """Write pictures and boxes of COCO's form (`annotations/instances_{train,val}.json` and
    `images/`) as one NumPy file.

    Arrays: `SPLIT_jpeg` (bytes of all pictures), `SPLIT_ends` (where each ends), `SPLIT_boxes`
    `[N, 4]`, `SPLIT_classes` `[N]`, `SPLIT_picture` `[N]` (the number of the picture), `names`.
    """
    arrays: dict[str, np.ndarray] = {}
    for split in SPLITS:
        path = folder / "annotations" / f"instances_{split}.json"
        coco = json.loads(path.read_text(encoding="utf-8"))
        files = [(folder / "images" / image["file_name"]).read_bytes() for image in coco["images"]]
        numbers = {image["id"]: number for number, image in enumerate(coco["images"])}
        categories = sorted(coco["categories"], key=lambda category: category["id"])
        classes = {category["id"]: number for number, category in enumerate(categories)}
        boxes = np.array([a["bbox"] for a in coco["annotations"]], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        arrays |= {
            f"{split}_jpeg": np.frombuffer(b"".join(files), np.uint8),
            f"{split}_ends": np.cumsum([len(file) for file in files]),
            f"{split}_boxes": boxes,
            f"{split}_classes": np.array([classes[a["category_id"]] for a in coco["annotations"]]),
            f"{split}_picture": np.array([numbers[a["image_id"]] for a in coco["annotations"]]),
            "names": np.array([category["name"] for category in categories]),
        }
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        np.savez(file, **arrays)


@dataclass(frozen=True)
class Split:
    """Pictures of one size and their objects.

    Attributes:
        pictures: `[N, H, W, 3]` uint8 RGB.
        boxes, classes: of each picture: `[n, 4]` left, top, right, bottom in pixels; `[n]`.
    """

    pictures: np.ndarray
    boxes: list[np.ndarray]
    classes: list[np.ndarray]

    def first(self, count: int) -> "Split":
        """The first pictures alone, for a trial."""
        return Split(self.pictures[:count], self.boxes[:count], self.classes[:count])


def read_pack(path: Path) -> tuple[dict[str, Split], list[str]]:
    """What `pack` wrote: the splits, and the names of the classes.

    Raises:
        ValueError: pictures of several sizes.
    """
    import cv2  # the twin's tests go without it

    splits = {}
    with np.load(path) as arrays:
        names = [str(name) for name in arrays["names"]]
        for split in SPLITS:
            ends, jpeg = arrays[f"{split}_ends"], arrays[f"{split}_jpeg"]
            parts = np.split(jpeg, ends[:-1])
            pictures = [cv2.imdecode(part, cv2.IMREAD_COLOR)[:, :, ::-1] for part in parts]
            if len({picture.shape for picture in pictures}) != 1:
                raise ValueError(f"{path}: expected pictures of one size in {split}, got several")
            owner = arrays[f"{split}_picture"]
            chosen = [owner == number for number in range(len(pictures))]
            boxes, classes = arrays[f"{split}_boxes"], arrays[f"{split}_classes"]
            splits[split] = Split(
                np.stack(pictures), [boxes[c] for c in chosen], [classes[c] for c in chosen]
            )
    return splits, names


def resized(pictures: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pictures as the config's EvalReader shows them: `[N, H, W, 3]` uint8 -> `[N, 3, *size]`."""
    import cv2

    height, width = pictures.shape[1:3]
    down, across = size[0] / height, size[1] / width
    shown = [cv2.resize(p, None, None, fx=across, fy=down, interpolation=1) for p in pictures]
    return np.ascontiguousarray(np.stack(shown).transpose(0, 3, 1, 2))


def normalised(pictures: Tensor) -> Tensor:
    """uint8 -> float32 from -1 to 1: the config's mean and std of 0.5."""
    return pictures.float() / 127.5 - 1.0


@dataclass(frozen=True)
class Looks:
    """How much views differ from the pictures. The numbers are our choice.

    Attributes:
        whole: share of views that show the whole picture, as the evaluation does.
        zoom: least and most enlargement of the others.
        stretch: most change of the ratio of width and height, as a logarithm.
        mosaic: share of views that are made of four pictures.
        brightness, contrast, saturation: most change of each, as a share.
        hue: most turn of the colours, in radians.
        visible: least share of a box that has to be seen.
    """

    whole: float = 0.25
    zoom: tuple[float, float] = (0.75, 1.6)
    stretch: float = 0.15
    mosaic: float = 0.5
    brightness: float = 0.2
    contrast: float = 0.25
    saturation: float = 0.4
    hue: float = 0.2
    visible: float = 0.3

    def without_mosaic(self) -> "Looks":
        return replace(self, mosaic=0.0)


class Views:
    """Random views of a split's pictures.

    Args:
        split: pictures and objects.
        size: height and width of a view, in pixels.
        device: where the pictures stay, and where views are drawn.
        seed: of the random numbers.
        most: objects of a view; further ones are left out.
    """

    def __init__(
        self, split: Split, size: tuple[int, int], device: torch.device, seed: int, most: int = 64
    ) -> None:
        self.size, self.device, self.most = size, device, most
        pictures = np.ascontiguousarray(split.pictures.transpose(0, 3, 1, 2))
        self.pictures = torch.from_numpy(pictures).to(device)
        # At least `most`, so that views of one picture and of four have as many places.
        count = max(most, max(len(boxes) for boxes in split.boxes))
        boxes = np.zeros((len(split.boxes), count, 4), np.float32)
        classes = np.zeros((len(split.boxes), count), np.int64)
        real = np.zeros((len(split.boxes), count), bool)
        for number, (own, kinds) in enumerate(zip(split.boxes, split.classes, strict=True)):
            boxes[number, : len(own)] = own
            classes[number, : len(own)] = kinds
            real[number, : len(own)] = True
        self.boxes = torch.from_numpy(boxes).to(device)
        self.classes = torch.from_numpy(classes).to(device)
        self.real = torch.from_numpy(real).to(device)
        self.random = torch.Generator(device).manual_seed(seed)
        # Constants are made once: copying them to a GPU would wait for all that it has to do.
        height, width = split.pictures.shape[1:3]
        self._own = torch.tensor([width, height], device=device, dtype=torch.float32)
        self._view = torch.tensor([size[1], size[0]], device=device, dtype=torch.float32)
        y, x = ((torch.arange(n, device=device) + 0.5) / n * 2 - 1 for n in size)
        self._grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2)  # [H, W, 2]
        self._grey = torch.full((3, 3), 1 / 3, device=device)
        self._colour = torch.eye(3, device=device) - self._grey  # what differs from grey
        turn = [[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]  # around grey
        self._turn = torch.tensor(turn, device=device) / math.sqrt(3)

    def draw(self, batch: int, looks: Looks) -> tuple[Tensor, Targets]:
        """Views `[batch, 3, H, W]` float32 from -1 to 1, and their objects."""
        parts = 4 if looks.mosaic else 1
        index = torch.randint(
            len(self.pictures), (batch * parts,), device=self.device, generator=self.random
        )
        scale, shift = self._windows(batch * parts, looks)
        regions = self._regions(batch, parts, looks)  # [batch, parts, 4] from 0 to 1
        x = normalised(self.pictures[index])
        # In float32: as a product of matrices a GPU would round it to TF32.
        grid = self._grid * scale[:, None, None] + shift[:, None, None]  # [count, H, W, 2]
        x = F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)  # 0 is grey
        x = self._composed(x.unflatten(0, (batch, parts)), regions)
        targets = self._objects(index.reshape(batch, parts), scale, shift, regions, looks)
        return self._coloured(x, looks), targets

    def _uniform(self, count: int, low: float, high: float) -> Tensor:
        drawn = torch.rand(count, device=self.device, generator=self.random)
        return low + (high - low) * drawn

    def _windows(self, count: int, looks: Looks) -> tuple[Tensor, Tensor]:
        """Which part of its picture each view shows: a view's x in -1 .. 1 is the picture's
        `scale * x + shift`; a negative scale mirrors. `[count, 2]` each, for x and y."""
        zoom = self._uniform(count, *map(math.log, looks.zoom))
        stretch = self._uniform(count, -looks.stretch, looks.stretch) / 2
        part = torch.stack([-zoom - stretch, -zoom + stretch], dim=1).exp()
        whole = self._uniform(count, 0, 1) < looks.whole
        part = torch.where(whole.unsqueeze(1), torch.ones_like(part), part)
        place = self._uniform(2 * count, -1, 1).reshape(count, 2)
        mirrored = self._uniform(2 * count, 0, 1).reshape(count, 2) < 0.5
        # The window stays inside of the picture, or the picture inside of the window.
        return torch.where(mirrored, -part, part), place * (1 - part)

    def _regions(self, batch: int, parts: int, looks: Looks) -> Tensor:
        """Where in a view each of its pictures is: `[batch, parts, 4]`, from 0 to 1."""
        one, zero = torch.ones(batch, device=self.device), torch.zeros(batch, device=self.device)
        if parts == 1:
            return torch.stack([zero, zero, one, one], dim=1).unsqueeze(1)
        mixed = self._uniform(batch, 0, 1) < looks.mosaic
        x = torch.where(mixed, self._uniform(batch, 0.25, 0.75), one)
        y = torch.where(mixed, self._uniform(batch, 0.25, 0.75), one)
        corners = [(zero, zero, x, y), (x, zero, one, y), (zero, y, x, one), (x, y, one, one)]
        return torch.stack([torch.stack(corner, dim=1) for corner in corners], dim=1)

    def _composed(self, x: Tensor, regions: Tensor) -> Tensor:
        """One picture of several: `[batch, parts, 3, H, W]` -> `[batch, 3, H, W]`."""
        height, width = self.size
        across = (torch.arange(width, device=self.device) + 0.5) / width
        down = (torch.arange(height, device=self.device) + 0.5) / height
        left, top, right, bottom = regions[..., None].unbind(2)  # [batch, parts, 1] each
        columns = (across >= left) & (across < right)  # [batch, parts, W]
        rows = (down >= top) & (down < bottom)
        mask = rows[..., :, None] & columns[..., None, :]  # [batch, parts, H, W]
        return (x * mask.unsqueeze(2)).sum(dim=1)

    def _objects(
        self, index: Tensor, scale: Tensor, shift: Tensor, regions: Tensor, looks: Looks
    ) -> Targets:
        batch, parts = index.shape
        corners = self.boxes[index].unflatten(3, (2, 2))  # [batch, parts, n, 2 corners, x y]
        scale = scale.reshape(batch, parts, 1, 1, 2)
        shift = shift.reshape(batch, parts, 1, 1, 2)
        seen = (2 * corners / self._own - 1 - shift) / scale  # from -1 to 1
        seen = (seen + 1) / 2 * self._view
        boxes = torch.cat([seen.amin(dim=3), seen.amax(dim=3)], dim=3)  # [batch, parts, n, 4]
        limits = (regions * torch.cat([self._view] * 2)).unsqueeze(2)  # [batch, parts, 1, 4]
        low, high = torch.cat([limits[..., :2]] * 2, dim=3), torch.cat([limits[..., 2:]] * 2, dim=3)
        cut = torch.minimum(torch.maximum(boxes, low), high)
        sides, before = cut[..., 2:] - cut[..., :2], boxes[..., 2:] - boxes[..., :2]
        share = sides.prod(dim=3) / before.prod(dim=3).clamp(min=1e-6)
        kept = self.real[index] & (share >= looks.visible) & (sides.amin(dim=3) >= LEAST_SIDE)
        kept = kept.flatten(1)  # [batch, parts * n]
        first = kept.int().argsort(dim=1, descending=True, stable=True)[:, : self.most]
        real = kept.gather(1, first)
        cut = cut.flatten(1, 2).gather(1, first.unsqueeze(2).expand(-1, -1, 4))
        classes = self.classes[index].flatten(1).gather(1, first)
        return Targets(cut * real.unsqueeze(2), classes * real, real)

    def _coloured(self, x: Tensor, looks: Looks) -> Tensor:
        """Brightness, contrast, saturation and hue of every view, each drawn for itself."""
        count = len(x)
        angle = self._uniform(count, -looks.hue, looks.hue).reshape(-1, 1, 1)
        gain = 1 + self._uniform(count, -looks.saturation, looks.saturation).reshape(-1, 1, 1)
        mix = self._grey + gain * (angle.cos() * self._colour + angle.sin() * self._turn)
        contrast = 1 + self._uniform(count, -looks.contrast, looks.contrast)
        light = self._uniform(count, -looks.brightness, looks.brightness)
        mixed = torch.einsum("bij,bjhw->bihw", mix * contrast.reshape(-1, 1, 1), x)
        return (mixed + light.reshape(-1, 1, 1, 1)).clamp(-1, 1)
