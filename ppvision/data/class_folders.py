"""Images with one class each, from folders or from a list file."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import paddle

from ppvision.data.class_zip import ZipPath, open_root, read_sample
from ppvision.data.listing import (
    READABLE_SUFFIXES,
    LeftOut,
    find_pictures,
    is_leftover,
    locate,
    log_once,
)
from ppvision.data.text import read_lines, read_names, shorten
from ppvision.errors import DataError

# Class numbers are below this. A much larger one would create that many class names.
MOST_CLASSES = 2**18
_CLASS_LINE = re.compile(r"(?P<name>.*[^ \t])[ \t]+(?P<label>[0-9]{1,9})", re.DOTALL)


class ClassFolders(paddle.io.Dataset):
    """Images and class numbers.

    Args:
        root: a folder with one sub-folder per class, in the order of their sorted names; or the
            folder that the paths of `list_path` start from. It may be a zip file (`train.zip`), or
            a folder in one (`data.zip//train`): images are read in place.
        transforms: applied in turn to a `[H, W, 3]` uint8 RGB array; the last one gives
            `[H', W', 3]`, which becomes `[3, H', W']` float32.
        list_path: a file with `image class-number` lines, instead of sub-folders. If its folder
            has a file `classes.txt` with one name per line, the classes get these names.
        num_classes: number of classes of the model, or None.
        max_value: of images of more than 8 bits per channel; see `read_picture`. Default None:
            they are refused.
        class_path: a file that gives the order of the classes: a line per class, its folder and,
            after a space or tab, the name to show (`n01443537 goldfish`). With `list_path` the
            names of the classes, instead of `classes.txt`. Default None.

    Attributes:
        samples: `(path, class number)` pairs.
        classes: names of the classes; numbers where a list has none.
        folders: names of the class folders, in the order of the classes; empty with a list.

    Raises:
        DataError: no such folder or list, no image, a class without one, a line that is not
            `image number`, a class out of range, or classes that differ from `class_path`.
    """

    def __init__(
        self,
        root: str | Path,
        transforms: Sequence[Callable[[np.ndarray], np.ndarray]] = (),
        list_path: str | Path | None = None,
        num_classes: int | None = None,
        max_value: int | None = None,
        class_path: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.max_value = max_value
        self.root = open_root(root)
        self.transforms = list(transforms)
        self.folders: list[str] = []
        if list_path is None:
            self.samples, self.classes = self._from_folders()
            self.folders = self.classes
            if class_path is not None:
                self._reorder(Path(class_path))
        else:
            names_path = class_path or Path(list_path).parent / "classes.txt"
            self.samples, self.classes = self._from_list(Path(list_path), Path(names_path))
        if num_classes is None:
            return
        # A missing folder would change the numbers of the classes after it.
        wrong = len(self.classes) != num_classes if list_path is None else None
        if wrong or len(self.classes) > num_classes:
            advice = "Set num_classes of the model, or complete the folders (without images of "
            advice += "a class use a list file)."
            if isinstance(self.root, ZipPath) and len(self.classes) == 1:
                inner = self.root / self.classes[0]
                advice = f"Are they in {inner.archive.path}//{inner.name}?"
            raise DataError(
                f"num_classes: the model has {num_classes}, and {list_path or self.root} has "
                f"{len(self.classes)} classes. {advice}"
            )

    def _from_folders(self) -> tuple[list[tuple[Path | ZipPath, int]], list[str]]:
        if isinstance(self.root, ZipPath):
            folders = self.root.pictures_by_class()
        else:
            folders = _pictures_by_class(self.root)
        samples = [(path, k) for k, found in enumerate(folders.values()) for path in found]
        empty = [name for name, found in folders.items() if not found]
        if not samples:
            raise DataError(
                f"root: expected images in {self.root}/CLASS/, found none "
                f"({', '.join(sorted(READABLE_SUFFIXES))}). Is it the folder above the classes?"
            )
        if empty:
            raise DataError(
                f"root: found no image in {len(empty)} of the {len(folders)} class folders of "
                f"{self.root}: {', '.join(empty[:10])}. Fill or remove them: every folder is a "
                "class."
            )
        return samples, list(folders)

    def _reorder(self, class_path: Path) -> None:
        """Number the classes in the order of `class_path`."""
        places = {folder: number for number, folder in enumerate(self.folders)}
        order, names = [], []
        for number, line in read_lines(class_path):
            # A folder's name may contain spaces: it may be the whole line.
            folder, *name = [line] if line in places else line.split(None, 1)
            if folder not in places or folder in order:
                found = "is listed twice" if folder in order else f"is not in {self.root}"
                raise DataError(
                    f"{class_path}:{number}: expected each class folder once, but "
                    f"{shorten(folder)} {found}."
                )
            order.append(folder)
            names.append(name[0] if name else folder)
        absent = [folder for folder in self.folders if folder not in order]
        if absent:
            raise DataError(
                f"{class_path}: expected every class folder of {self.root}, found no line for "
                f"{', '.join(absent[:10])}."
            )
        numbers = {places[folder]: number for number, folder in enumerate(order)}
        self.samples = [(path, numbers[label]) for path, label in self.samples]
        self.samples.sort(key=lambda sample: sample[1])  # a stable sort: images keep their order
        self.folders, self.classes = order, names

    def _from_list(
        self, list_path: Path, names_path: Path
    ) -> tuple[list[tuple[Path | ZipPath, int]], list[str]]:
        if not list_path.is_file():
            raise DataError(f"{list_path}: expected a list file, found none. Check the path.")
        samples = []
        left_out = LeftOut()
        for number, line in read_lines(list_path, file_names=True):
            found = _CLASS_LINE.fullmatch(line)
            if found is None or int(found["label"]) >= MOST_CLASSES:
                raise DataError(
                    f"{list_path}:{number}: expected `image class-number` with a number below "
                    f"{MOST_CLASSES}, got {shorten(line)}."
                )
            if is_leftover(found["name"]):
                left_out.leftovers[Path(found["name"]).name] += 1
                continue
            name = found["name"]
            if isinstance(self.root, Path):  # the file may exist under another spelling
                name = locate(self.root, name)
            samples.append((self.root / name, int(found["label"])))
        left_out.log(list_path)
        if repeated := len(samples) - len(set(samples)):
            log_once(f"{list_path}: {repeated} lines repeat an earlier one")
        if not samples:
            raise DataError(f"{list_path}: expected `image class-number` lines, found none.")
        count = 1 + max(label for _, label in samples)
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
        image = read_sample(path, self.max_value)
        for transform in self.transforms:
            image = transform(image)
        image = np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32)
        return image, np.int64(label)

    def __len__(self) -> int:
        return len(self.samples)


def _pictures_by_class(root: Path) -> dict[str, list[Path]]:
    """Return the images of each class folder, both sorted. The log counts omitted files."""
    left_out = LeftOut()
    folders = []
    for path in sorted(root.iterdir()):
        if path.name[0] == "." or is_leftover(path.name):
            left_out.leftovers[path.name] += 1
        elif path.is_dir():
            folders.append(path)
    found = {folder.name: find_pictures(folder, left_out) for folder in folders}
    left_out.log(root)
    return found
