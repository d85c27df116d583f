"""Make PaddleSeg's data sets read lists by `ppvision.data`, so that the check reads the same.

PaddleSeg opens a list as UTF-8 and splits every line at one separator. There a byte order mark
becomes part of the first name, an empty line or a second blank is an error, and names that are not
UTF-8 cannot be read.
"""

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path

from paddleseg import datasets
from paddleseg.datasets import ADE20K, Dataset

from ppvision.data.listing import LeftOut, is_leftover, read_pairs
from ppvision.data.text import open_lines
from ppvision.errors import DataError

_OURS = "reads_by_ppvision"  # marks a constructor that is replaced already


def read_alike() -> None:
    """Make PaddleSeg's data sets read lists as `ppvision.data.listing.read_pairs` does."""
    for component, replace in ((Dataset, _read_pairs_after), (ADE20K, _drop_leftovers_after)):
        if not hasattr(component.__init__, _OURS):
            component.__init__ = replace(component.__init__)
            setattr(component.__init__, _OURS, True)
    # The name `open` inside PaddleSeg's modules, for data sets that read their own lists.
    for component in vars(datasets).values():
        if inspect.ismodule(component) and component.__name__.startswith(datasets.__name__):
            component.open = open_lines


def _read_pairs_after(init: Callable) -> Callable:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def __init__(self: Dataset, *args: object, **kwargs: object) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        mode = str(given["mode"]).lower()
        path = given.get(f"{mode}_path")
        if path is None or not Path(path).is_file():
            init(*bound.args, **bound.kwargs)  # its error says what is missing
            return
        given[f"{mode}_path"] = os.devnull  # a list without a line
        init(*bound.args, **bound.kwargs)
        pairs, problems = read_pairs(
            path, given["dataset_root"], given["separator"], need_labels=mode != "test"
        )
        if problems:
            kind, text = problems[0]
            raise DataError(
                f"{path}: {len(problems)} lines do not have the form of a list; {kind}: {text}. "
                "`ppvision train` and `ppvision eval` report all of them."
            )
        self.file_list = [
            [str(image), None if label is None else str(label)] for _, image, label in pairs
        ]

    return __init__


def _drop_leftovers_after(init: Callable) -> Callable:
    """Filter files, because ADE20K treats every file of a folder as an image."""

    @functools.wraps(init)
    def __init__(self: ADE20K, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)
        left_out = LeftOut()
        names = [os.path.basename(image) for image, _ in self.file_list]
        left_out.leftovers.update(name for name in names if is_leftover(name))
        self.file_list = [
            pair for pair, name in zip(self.file_list, names, strict=True) if not is_leftover(name)
        ]
        left_out.log(self.dataset_root)

    return __init__
