"""Pictures with one class each, from folders or from a list file."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import paddle

from ppvision.data.listing import (
    READABLE_SUFFIXES,
    LeftOut,
    find_pictures,
    is_leftover,
    locate,
    log_once,
)
from ppvision.data.pictures import read_picture
from ppvision.data.text import read_lines, read_names, shorten
from ppvision.errors import DataError

# A number that is far beyond any data set would name as many classes as it says.
MOST_CLASSES = 2**18
_CLASS_LINE = re.compile(r"(?P<name>.*[^ \t])[ \t]+(?P<label>[0-9]{1,9})", re.DOTALL)


class ClassFolders(paddle.io.Dataset):
    """Pictures and class numbers.

    Args:
        root: a folder with one sub-folder per class, in the order of their sorted names; or the
            folder that the paths of `list_path` start from.
        transforms: applied in turn to a `[H, W, 3]` uint8 RGB array; the last one gives
            `[H', W', 3]`, which becomes `[3, H', W']` float32.
        list_path: a file with `picture class-number` lines, in place of sub-folders. Names of the
            classes come from `classes.txt` beside it, one a line, where there is one.
        num_classes: classes that the model tells apart, or None.
        max_value: of pictures of more than 8 bits a channel; see `read_picture`. Default None: they
            are refused.

    Attributes:
        samples: `(path, class number)` pairs.
        classes: names of the classes; numbers where a list has none.

    Raises:
        DataError: no such folder or list, no picture, a class without one, a line that is not
            `picture number`, or a class out of range.
    """

    def __init__(
        self,
        root: str | Path,
        transforms: Sequence[Callable[[np.ndarray], np.ndarray]] = (),
        list_path: str | Path | None = None,
        num_classes: int | None = None,
        max_value: int | None = None,
    ) -> None:
        super().__init__()
        self.max_value = max_value
        self.root = Path(root)
        self.transforms = list(transforms)
        if not self.root.is_dir():
            raise DataError(f"root: expected a folder of pictures, found none at {self.root}.")
        if list_path is None:
            self.samples, self.classes = self._from_folders()
        else:
            self.samples, self.classes = self._from_list(Path(list_path))
        if num_classes is None:
            return
        # A folder that is missing would renumber the classes behind it.
        wrong = len(self.classes) != num_classes if list_path is None else None
        if wrong or len(self.classes) > num_classes:
            raise DataError(
                f"num_classes: the model has {num_classes}, and {list_path or self.root} has "
                f"{len(self.classes)} classes. Set num_classes of the model, or complete the "
                "folders (without pictures of a class use a list file)."
            )

    def _from_folders(self) -> tuple[list[tuple[Path, int]], list[str]]:
        left_out = LeftOut()
        folders = []
        for path in sorted(self.root.iterdir()):
            if path.name[0] == "." or is_leftover(path.name):
                left_out.leftovers[path.name] += 1
            elif path.is_dir():
                folders.append(path)
        samples, empty = [], []
        for number, folder in enumerate(folders):
            found = find_pictures(folder, left_out)
            samples += [(path, number) for path in found]
            if not found:
                empty.append(folder.name)
        left_out.log(self.root)
        if not samples:
            raise DataError(
                f"root: expected pictures in {self.root}/CLASS/, found none "
                f"({', '.join(sorted(READABLE_SUFFIXES))}). Is it the folder above the classes?"
            )
        if empty:
            raise DataError(
                f"root: found no picture in {len(empty)} of the {len(folders)} class folders of "
                f"{self.root}: {', '.join(empty[:10])}. Fill or remove them: every folder is a "
                "class."
            )
        return samples, [folder.name for folder in folders]

    def _from_list(self, list_path: Path) -> tuple[list[tuple[Path, int]], list[str]]:
        if not list_path.is_file():
            raise DataError(f"{list_path}: expected a list file, found none. Check the path.")
        samples = []
        left_out = LeftOut()
        for number, line in read_lines(list_path, file_names=True):
            found = _CLASS_LINE.fullmatch(line)
            if found is None or int(found["label"]) >= MOST_CLASSES:
                raise DataError(
                    f"{list_path}:{number}: expected `picture class-number` with a number below "
                    f"{MOST_CLASSES}, got {shorten(line)}."
                )
            if is_leftover(found["name"]):
                left_out.leftovers[Path(found["name"]).name] += 1
                continue
            samples.append((self.root / locate(self.root, found["name"]), int(found["label"])))
        left_out.log(list_path)
        if repeated := len(samples) - len(set(samples)):
            log_once(f"{list_path}: {repeated} lines repeat an earlier one")
        if not samples:
            raise DataError(f"{list_path}: expected `picture class-number` lines, found none.")
        count = 1 + max(label for _, label in samples)
        names_path = list_path.parent / "classes.txt"
        if not names_path.is_file():
            return samples, [str(index) for index in range(count)]
        names = read_names(names_path)
        if len(names) < count:
            raise DataError(
                f"{list_path}: expected classes below {len(names)}, as {names_path} has names, got "
                f"{count - 1}."
            )
        return samples, names

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.int64]:
        path, label = self.samples[index]
        image = read_picture(path, max_value=self.max_value)
        for transform in self.transforms:
            image = transform(image)
        image = np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32)
        return image, np.int64(label)

    def __len__(self) -> int:
        return len(self.samples)
