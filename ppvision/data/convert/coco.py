"""Make COCO instance files: run lengths, boxes and annotations from maps of instances."""

import json
from pathlib import Path

import numpy as np

from ppvision.errors import InputError


def encode_rle(mask: np.ndarray) -> dict:
    """Return COCO's uncompressed run lengths of a mask `[H, W]`: column by column, zeros first."""
    flat = np.asarray(mask, bool).ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    if flat.size and flat[0]:
        counts = [0, *counts]
    return {"size": list(mask.shape), "counts": counts}


def find_visible_box(mask: np.ndarray) -> list[int]:
    """Return the box `[x, y, width, height]`, in pixels, of the set pixels of a mask `[H, W]`.

    Raises:
        ValueError: no pixel is set.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        raise InputError("mask: expected at least one pixel that is set, got none.")
    return [
        int(columns[0]),
        int(rows[0]),
        int(columns[-1] - columns[0] + 1),
        int(rows[-1] - rows[0] + 1),
    ]


class CocoInstances:
    """Collects the images and instances of one split."""

    def __init__(self, categories: dict[int, str]):
        """`categories`: names by category id."""
        self.categories = categories
        self.images: list[dict] = []
        self.annotations: list[dict] = []

    def add_image(self, file_name: str, height: int, width: int) -> None:
        """Add an image, to which the annotations that follow belong."""
        image_id = len(self.images) + 1
        self.images.append(
            {"id": image_id, "file_name": file_name, "width": width, "height": height}
        )

    def add_mask(self, mask: np.ndarray, category: int) -> list[int]:
        """Add one instance of the last image by its mask `[H, W]`; returns its box."""
        box = find_visible_box(mask)
        self._add(category, box, int(np.count_nonzero(mask)), segmentation=encode_rle(mask))
        return box

    def add_box(self, box: list[int], category: int) -> None:
        """Add one instance of the last image by its box `[x, y, width, height]` only."""
        self._add(category, box, box[2] * box[3])

    def _add(self, category: int, box: list[int], area: int, **more: dict) -> None:
        self.annotations.append(
            {
                "id": len(self.annotations) + 1,
                "image_id": len(self.images),
                "category_id": category,
                "bbox": box,
                "area": area,
                "iscrowd": 0,
                **more,
            }
        )

    def write(self, path: Path) -> None:
        """Write the JSON file; its folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        categories = [{"id": number, "name": name} for number, name in self.categories.items()]
        document = {
            "images": self.images,
            "annotations": self.annotations,
            "categories": categories,
        }
        path.write_text(json.dumps(document), encoding="utf-8")
