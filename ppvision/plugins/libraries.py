"""PaddleSeg's and PaddleDetection's code under `ppvision`: its errors, and how it loads weights.

Their components load `pretrained` by `paddle.load`, which executes code in a pickle. They download
from URLs without asking, and execute some texts of a config as code. In `load_safely` they use our
reader, download on request only, and treat such texts as names. Their own tools keep their loaders.
"""

import contextlib
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import paddle
from paddle import Tensor

from ppvision.errors import (
    ConfigError,
    DataError,
    LibraryError,
    MissingFileError,
    PpvisionError,
    WeightsError,
    shorten,
    shorten_text,
)
from ppvision.zoo.fetching import fetch_weights
from ppvision.zoo.weights import read_weights

logger = logging.getLogger("ppvision")

_LIBRARIES = {"paddleseg": "PaddleSeg", "ppdet": "PaddleDetection", "pycocotools": "pycocotools"}

# -- errors ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def wrap_errors(what: str) -> Iterator[None]:
    """Raise errors of PaddleSeg or PaddleDetection in the block as `LibraryError`, with the cause.

    Errors of our own code are not wrapped, even if these libraries call it; errors of the system
    (`OSError` with a number) are not wrapped either.

    Args:
        what: text before the message that says what was done.
    """
    try:
        yield
    except PpvisionError:
        raise
    except Exception as error:
        inner = _unwrap(error)
        library = _find_library(inner)
        refused = isinstance(inner, OSError) and inner.errno is not None
        if isinstance(inner, PpvisionError) or library is None or refused:
            if inner is error:
                raise
            raise inner from None
        place = traceback.extract_tb(inner.__traceback__)[-1]
        raise LibraryError(
            f"{what}: {library} raised {type(inner).__name__}: {shorten_text(str(inner), 600)} "
            f"({Path(place.filename).name}:{place.lineno}). Compare what the config gives to its "
            "components with their documentation. PPVISION_TRACEBACK=1 shows where it comes from."
        ) from inner


def _unwrap(error: Exception) -> Exception:
    """Return the original of an error that PaddleSeg's builder wraps in `Tried to create ...`; it
    may be our error."""
    while isinstance(error.__context__, Exception) and _module(error) == "paddleseg.cvlibs.builder":
        error = error.__context__
    return error


def _module(error: Exception) -> str:
    """Return the name of the module where an error was raised."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "")


def _find_library(error: Exception) -> str | None:
    """Return the library whose code raised an error, by the innermost frame of theirs or ours; None
    for ours."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        module = frame.f_globals.get("__name__", "")
        package = module.partition(".")[0]
        if module.startswith("ppvision.plugins.shims"):  # they replace functions of the libraries
            continue
        if package == "ppvision":
            return None
        if package in _LIBRARIES:
            return _LIBRARIES[package]
    return None


# -- weights ---------------------------------------------------------------------------------------

_SAID = "expected the name of a layer or function of Paddle's or its toolkits'"
_searched = 0  # number of modules when names were last installed


def _restrict_eval() -> None:
    """Let components look up names instead of executing code.

    Some components pass a text of the config (`norm_layer`, `act_fn`, `block_fn`) to `eval`. In the
    modules of PaddleSeg and PaddleDetection `eval` now only looks up names.
    """
    global _searched
    if len(sys.modules) == _searched:
        return
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _LIBRARIES and module is not None:
            vars(module)["eval"] = _look_up
    _searched = len(sys.modules)


def _look_up(text: object, *_: object) -> object:
    """Return the object of a dotted name in the calling module; with `()` after it, an object of
    the class.

    Raises:
        ConfigError: the text is not a name, or names something that builds no layer.
    """
    pattern = r"([A-Za-z]\w*)((?:\.[A-Za-z]\w*)*)(\(\))?"  # no name that begins with an underscore
    found = re.fullmatch(pattern, text, re.ASCII) if isinstance(text, str) else None
    if found is None:
        raise ConfigError(f"config: {_SAID}, got {shorten(text)}, which would run code.")
    first, others, called = found.groups()
    frame = sys._getframe(1)
    try:
        value = (frame.f_globals | frame.f_locals)[first]
        for name in others.split(".")[1:]:
            value = getattr(value, name)
    except (KeyError, AttributeError) as error:
        raise ConfigError(f"config: {_SAID}, got {shorten(text)}, which is none.") from error
    package = (getattr(value, "__module__", None) or "").partition(".")[0]
    if not callable(value) or package not in ("paddle", *_LIBRARIES):
        raise ConfigError(f"config: {_SAID}, got {shorten(text)}, which builds no layer.")
    return value() if called else value


_lock = threading.RLock()  # the names below are global to the process


@contextlib.contextmanager
def load_safely(allow_download: bool) -> Iterator[None]:
    """Let components in the block read weights by `read_weights`, and download them only if it is
    allowed. Data sets are never downloaded, and texts of a config are not executed.

    Other threads are not affected, but wait if they also enter this block.

    Raises:
        MissingFileError: PaddleSeg's component names a file that does not exist.
        WeightsError: the weights cannot be read, or are at a URL without `allow_download`.
        DataError: a data set would be downloaded.
    """
    _restrict_eval()
    owner = threading.get_ident()

    def replace(original: Callable, ours: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            mine = threading.get_ident() == owner
            return ours(*args, **kwargs) if mine else original(*args, **kwargs)

        return call

    def fetch(url: str, *_: object, **__: object) -> str:
        return str(fetch_weights(url, allow_download))

    with _lock, contextlib.ExitStack() as stack:
        for module, name, ours in (
            ("paddle", "load", _load),
            ("paddle.utils.download", "get_path_from_url", fetch),
            ("paddleseg.utils.utils", "download_pretrained_model", fetch),
            ("paddleseg.utils", "download_pretrained_model", fetch),
            ("paddleseg.utils.download", "_download_file", _refuse_data),
            ("ppdet.utils.checkpoint", "get_weights_path", fetch),
            ("ppdet.utils.download", "_download", _refuse_data),
        ):
            found = sys.modules.get(module)  # only if the framework is in use
            if found is not None:
                original = getattr(found, name)
                setattr(found, name, replace(original, ours))
                stack.callback(setattr, found, name, original)
        utils = sys.modules.get("paddleseg.utils.utils")
        if utils is not None:
            original = utils.load_pretrained_model
            utils.load_pretrained_model = replace(original, _checking_file(original))
            stack.callback(setattr, utils, "load_pretrained_model", original)
        yield


def _checking_file(load: Callable) -> Callable:
    """Replaces PaddleSeg's `load_pretrained_model`, whose error calls a missing file a missing
    directory."""

    def call(model: object, pretrained_model: Any) -> object:
        is_path = isinstance(pretrained_model, str) and not urlparse(pretrained_model).netloc
        if is_path and not os.path.exists(pretrained_model):
            raise MissingFileError(
                "pretrained: expected a file of weights, found none at "
                f"{shorten_text(pretrained_model, 200)!r}. Give a path (without file://) or an "
                "address (https://...)."
            )
        return load(model, pretrained_model)

    return call


def _load(path: object, **options: object) -> dict[str, Tensor]:
    """Replaces `paddle.load` for weights."""
    if not isinstance(path, str | Path):
        raise WeightsError(f"weights: expected a path, got {shorten(path)}.")
    return {name: paddle.to_tensor(array) for name, array in read_weights(path).items()}


def _refuse_data(url: str, *_: object, **__: object) -> None:
    raise DataError(
        f"{shorten_text(str(url), 200)}: would be downloaded. ppvision does not download data "
        "sets. Download it yourself, and name its folder in the config."
    )
