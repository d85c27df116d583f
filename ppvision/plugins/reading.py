"""Put our reader of images into the frameworks' own data sets and transforms.

PaddleSeg and PaddleDetection call OpenCV and PIL by the names `cv2` and `Image` inside their
modules. OpenCV fills missing data with grey and reduces 16 bits to 8. PIL also fills missing data
after `ppdet.engine` is imported. Both do this silently. So these names are replaced in the modules
that read, and `max_value` becomes an argument of the data sets.
"""

import functools
import inspect
from collections.abc import Callable
from types import ModuleType

import cv2
import numpy as np

from ppvision.data.pictures import read_label, read_like_opencv
from ppvision.errors import InputError, shorten

MAX_VALUE = "max_value"  # argument of data sets: see `ppvision.data.pictures.read_picture`


class _StrictCv2:
    """`cv2` with our reader as `imread` and `imdecode`."""

    def __getattr__(self, name: str) -> object:
        return getattr(cv2, name)

    @staticmethod
    def imread(path: str, flags: int = cv2.IMREAD_COLOR) -> np.ndarray:
        return read_like_opencv(path, flags)

    @staticmethod
    def imdecode(content: np.ndarray, flags: int) -> np.ndarray:
        return read_like_opencv(bytes(content), flags)


class _StrictImage:
    """`PIL.Image` for modules that only read label maps: `np.asarray(Image.open(path))`."""

    @staticmethod
    def open(path: str) -> np.ndarray:
        return read_label(path)


def read_strictly(*modules: ModuleType, labels: bool = False) -> None:
    """Let modules of a framework find our reader under the names of OpenCV and, for `labels`, of
    PIL. Only these modules are affected."""
    for module in modules:
        if hasattr(module, "cv2"):
            module.cv2 = _StrictCv2()
        if labels and hasattr(module, "Image"):
            module.Image = _StrictImage()


def accept_max_value(dataset: type, keep: Callable[[object, int], None]) -> None:
    """Give a class of data sets the argument `max_value`.

    Args:
        dataset: the class; its inherited parts are not changed.
        keep: function that is called with the new object and the value, if there is one.
    """
    build = vars(dataset).get("__init__")
    if build is None or getattr(build, "accepts_max_value", False):
        return

    @functools.wraps(build)
    def __init__(self, *args: object, max_value: int | None = None, **kwargs: object) -> None:
        build(self, *args, **kwargs)
        if max_value is None:
            return
        if isinstance(max_value, bool) or not isinstance(max_value, int) or max_value < 1:
            raise InputError(
                f"max_value: expected a whole number above 0, got {shorten(max_value)}."
            )
        keep(self, max_value)

    signature = inspect.signature(build)
    parameters = list(signature.parameters.values())
    rest = [parameters.pop()] if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    added = inspect.Parameter(
        MAX_VALUE, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=int | None
    )
    # The checks of configurations look up arguments here.
    __init__.__signature__ = signature.replace(parameters=[*parameters, added, *rest])
    __init__.accepts_max_value = True
    dataset.__init__ = __init__
