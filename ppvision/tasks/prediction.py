"""Predict images on disk and write the results.

A result folder has `predictions.json`, which names every image that was predicted or failed, and
`overlay/`, `labels/` and `compared/`, whose files get their names when they are complete.
"""

import contextlib
import errno
import json
import logging
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ppvision.console import track
from ppvision.data.listing import list_images, list_labels
from ppvision.data.pictures import read_label, read_picture
from ppvision.deploy.run.detections import Detections
from ppvision.deploy.run.engines import join_error_lines
from ppvision.deploy.run.manifest import Manifest
from ppvision.deploy.run.predictor import Classification, Predictor
from ppvision.errors import (
    DataError,
    EngineError,
    FolderInUseError,
    InputError,
    PpvisionError,
    StorageError,
    show_path,
)
from ppvision.files import lock_folder, remove_partials, write_text
from ppvision.tasks.pictures import (
    draw_detections,
    draw_label,
    save_comparison,
    save_picture,
    save_prediction,
)

logger = logging.getLogger("ppvision")

Picture = str | os.PathLike | np.ndarray  # a path, or pixels [H, W, 3] uint8 RGB
Prediction = np.ndarray | Classification | Detections
Predict = Callable[[Path, np.ndarray], Prediction]  # arguments: path and pixels of an image
Write = Callable[[Path, str, np.ndarray, Any], object]  # path, name, pixels, prediction

AHEAD = 4  # images that are read before, or written after, the image in the model
# No further image is read while decoded images and predictions of more bytes than this wait. An
# image of 2^28 pixels takes 800 MB, and four would wait before and after the model.
AHEAD_BYTES = 1 << 29
DRAWN_SCORE = 0.5  # lowest score of an object that is drawn
CLASSIFIED_SIDE = 224  # side in pixels of a classified image in the results

REPORT = "predictions.json"
RESERVE = ".predictions.json.reserve"  # disk space for the report while results are written
RESERVED = 1 << 16  # at least this many bytes
RESULT_FOLDERS = ("overlay", "labels", "compared")  # folders in a result folder
# Seconds between reports during a run, so that a killed run has one. If writing takes long, reports
# are so rare that they take a twentieth of the time.
REPORT_SECONDS, REPORT_SHARE = 60.0, 0.05
REASON_LENGTH = 500  # largest number of characters of an engine's message
# These are more likely faults of ppvision or of a library than errors of an engine: one traceback
# is logged.
FAULTS = (AssertionError, AttributeError, LookupError, NameError, TypeError)
# After these errors no file can be written; other errors may concern only one name.
NO_MORE_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


def read_pixels(picture: Picture, max_value: int | None = None) -> np.ndarray:
    """Return the pixels `[H, W, 3]` uint8 RGB of a path, or pixels unchanged.

    Args:
        picture: see `Picture`.
        max_value: of files of more than 8 bits per channel; see `read_picture`.

    Raises:
        DataError: see `read_picture`.
    """
    if isinstance(picture, np.ndarray):
        return picture
    return read_picture(picture, max_value=max_value)


def predict_to_folder(
    predict: Callable[[Path, np.ndarray], np.ndarray],
    image_path: str | Path,
    folder: str | Path,
    class_names: list[str],
    ignore_index: int | None = 255,
    num_classes: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
    max_value: int | None = None,
) -> list[str]:
    """Write overlays, class maps and `predictions.json` for every image, and comparisons with
    the labels that a list names: `overlay/`, `labels/` and `compared/<name>.png`.

    Args:
        predict: `(path, pixels) -> [H, W]` classes; pixels are `[H, W, 3]` uint8 RGB.
        image_path: see `list_images`.
        folder: folder for the results.
        class_names: names for the fractions of pixels in the JSON; empty for numbers.
        ignore_index: label of pixels that do not count. Default 255; None for no comparisons.
        num_classes: number of classes of the labels; labels with other classes are not compared.
            Default None: any.
        stopped: function that is called before every image; if it returns true, no further image is
            predicted. Default: never.
        max_value: of images of more than 8 bits per channel; see `read_picture`.

    Returns:
        One line for every image that could not be read, predicted or written.

    Raises:
        EngineError: the model failed, and no image was predicted.
        FolderInUseError: another process predicts into the folder, or files that are not from an
            earlier prediction would be replaced.
        InputError: no images, or a result would replace one of them.
        StorageError: the folder cannot be written, or its disk is full.

    All errors except those about the folder itself are raised after `predictions.json` is written.
    Every image that was tried has an entry in it, by path; the entry of a failed image is
    `{"error": ...}`.
    """
    pictures = list_images(image_path)
    labels = {} if ignore_index is None else list_labels(image_path)

    def write(path: Path, name: str, image: np.ndarray, prediction: np.ndarray) -> dict[str, float]:
        save_prediction(image, prediction, Path(folder), name)
        if path in labels and ignore_index is not None:
            try:
                label = _read_label(labels[path], prediction.shape)
                _check_range(labels[path], label, ignore_index, num_classes)
                save_comparison(image, label, prediction, ignore_index, Path(folder), name)
            except DataError as error:  # the image is predicted anyway
                logger.warning(f"no comparison: {error}")
        counts = np.bincount(prediction.ravel())
        return {
            class_names[i] if class_names else str(i): round(int(n) / prediction.size, 6)
            for i, n in enumerate(counts)
            if n
        }

    sources = [*labels, *labels.values()]
    return _predict_pictures(pictures, predict, write, Path(folder), stopped, max_value, sources)


def _read_label(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Return the classes `[H, W]` of a label map, with the numbers of the file.

    Raises:
        DataError: the map cannot be read, or has another size.
    """
    label = read_label(path, f"label {path}")
    if label.shape != shape:
        raise DataError(
            f"label {path}: expected one class number per pixel, {list(shape)} like the "
            f"prediction, got {list(label.shape)}."
        )
    return label


def _check_range(path: Path, label: np.ndarray, ignore_index: int, num_classes: int | None) -> None:
    known = label[label != ignore_index]
    if num_classes is not None and known.size and known.max() >= num_classes:
        raise DataError(
            f"label {path}: expected classes from 0 to {num_classes - 1} and {ignore_index}, got "
            f"{known.max()}."
        )


def classify_to_folder(
    predict: Callable[[Path, np.ndarray], Classification],
    image_path: str | Path,
    folder: str | Path,
    class_names: list[str],
    stopped: Callable[[], bool] = lambda: False,
    max_value: int | None = None,
) -> list[str]:
    """Write `overlay/<name>.png` with the class below the image, and `predictions.json`: class, its
    number, its probability and the five most probable classes of every image.

    Args:
        predict: `(path, pixels) -> Classification`.
        image_path, folder: as `predict_to_folder`.
        class_names: empty for numbers.
        stopped, max_value: as `predict_to_folder`.

    Returns:
        One line for every image that could not be read, predicted or written.

    Raises:
        PpvisionError: as `predict_to_folder`.
    """

    def named(class_id: int) -> str:
        return class_names[class_id] if class_names else str(class_id)

    def write(path: Path, name: str, image: np.ndarray, found: Classification) -> dict[str, object]:
        label = named(found.class_id)
        entry: dict[str, object] = {"class": label, "class_id": found.class_id}
        if found.probabilities is not None:
            likeliest = np.argsort(-found.probabilities, kind="stable")[:5]
            shares = {named(int(k)): round(float(found.probabilities[k]), 6) for k in likeliest}
            entry |= {"probability": shares[label], "top5": shares}
        shown = draw_label(image, CLASSIFIED_SIDE, "", label)
        save_picture(shown, Path(folder) / "overlay", name)
        return entry

    pictures = list_images(image_path)
    return _predict_pictures(pictures, predict, write, Path(folder), stopped, max_value)


def detect_to_folder(
    predict: Callable[[Path, np.ndarray], Detections],
    image_path: str | Path,
    folder: str | Path,
    score: float = DRAWN_SCORE,
    stopped: Callable[[], bool] = lambda: False,
    max_value: int | None = None,
) -> list[str]:
    """Write `overlay/<name>.png` with the found objects, and `predictions.json`: class, score, box
    (left, top, right, bottom in pixels) and mask (COCO's run lengths) of every object.

    Args:
        predict: `(path, pixels) -> Detections`.
        image_path, folder: as `predict_to_folder`.
        score: lowest score of an object that is drawn; the JSON has all objects. Default 0.5.
        stopped, max_value: as `predict_to_folder`.

    Returns:
        One line for every image that could not be read, predicted or written.

    Raises:
        PpvisionError: as `predict_to_folder`.
    """

    def write(path: Path, name: str, image: np.ndarray, found: Detections) -> list[dict]:
        save_picture(draw_detections(image, found.above(score)), Path(folder) / "overlay", name)
        return [_described(found, place) for place in range(len(found))]

    pictures = list_images(image_path)
    return _predict_pictures(pictures, predict, write, Path(folder), stopped, max_value)


# Functions that write the predictions of an exported folder, by task. They get its deploy.yaml and
# the label of pixels that do not count.
WRITERS: dict[str, Callable[[Manifest, int | None], Callable[..., list[str]]]] = {
    "segmentation": lambda manifest, ignore_index: partial(
        predict_to_folder,
        class_names=manifest.classes,
        ignore_index=ignore_index,
        num_classes=manifest.num_classes,
    ),
    "classification": lambda manifest, _: partial(classify_to_folder, class_names=manifest.classes),
    "detection": lambda *_: detect_to_folder,
}


def predict_exported(
    predictor: Predictor,
    image_path: str | Path,
    folder: str | Path,
    *,
    ignore_index: int | None = 255,
    stopped: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Write the predictions of an exported folder in the form of its task.

    Args:
        predictor: predictor of the folder; its deploy.yaml has the task and the classes.
        image_path, folder: as `predict_to_folder`.
        ignore_index: ignored label of a segmentation, which deploy.yaml does not contain; as
            `predict_to_folder`.
        stopped: as `predict_to_folder`.

    Returns:
        One line for every image that could not be read, predicted or written.

    Raises:
        InputError: the folder gives features, which are not predictions.
        PpvisionError: as `predict_to_folder`.
    """
    manifest = predictor.manifest
    if manifest.task not in WRITERS:
        raise InputError(
            f"predict: expected an exported folder of one of {', '.join(WRITERS)}, got one of "
            f"{manifest.task}. Use ppvision.Predictor in Python."
        )
    write = WRITERS[manifest.task](manifest, ignore_index)
    return write(
        lambda path, image: predictor(image),
        image_path,
        folder,
        stopped=stopped,
        max_value=manifest.max_value,
    )


def _described(found: Detections, place: int) -> dict[str, object]:
    class_id = int(found.class_ids[place])
    entry = {
        "class": str(class_id) if found.names is None else found.names[place],
        "class_id": class_id,
        "score": round(float(found.scores[place]), 6),
        "box": [round(float(x), 2) for x in found.boxes[place]],
    }
    if found.masks is not None:
        from pycocotools import mask as mask_utils  # installed with PaddleDetection

        run_lengths = mask_utils.encode(np.asfortranarray(found.masks[place], np.uint8))
        entry["mask"] = {**run_lengths, "counts": run_lengths["counts"].decode()}
    return entry


# -- every image -------------------------------------------------------------------------------


def _predict_pictures(
    pictures: list[tuple[Path, str]],
    predict: Predict,
    write: Write,
    folder: Path,
    stopped: Callable[[], bool],
    max_value: int | None,
    sources: Sequence[Path] = (),
) -> list[str]:
    """Read, predict and write every image, and write `predictions.json` in every case.

    Args:
        pictures: `(path, name)` of each image, from `list_images`.
        predict: function that gives the prediction of an image.
        write: function that writes the results of an image and returns its entry in the report.
        folder: folder for the results.
        stopped, max_value: see `predict_to_folder`.
        sources: other files that no result may replace.

    Returns and raises: see `predict_to_folder`.
    """
    outcomes = _Outcomes(pictures)
    with _held(folder):
        _prepare(folder, pictures, sources)
        with _Reserve(folder / RESERVE) as reserve:
            try:
                _run(pictures, predict, write, folder, stopped, max_value, outcomes, reserve)
            finally:
                reserve.release()
                _write_report(folder, outcomes)
    if not stopped():
        outcomes.raise_fatal(folder)
    return outcomes.failures


class _Outcomes:
    """The outcome of every image. Each place is written by one thread at a time.

    Args:
        pictures: `(path, name)` of each image.

    Attributes:
        model_error: the first error of the model that is not due to a single image.
        storage_error: an error after which nothing can be written.
    """

    def __init__(self, pictures: list[tuple[Path, str]]) -> None:
        self._pictures = pictures
        self._entries: dict[int, str] = {}  # JSON, by the image's place
        self._reasons: dict[int, str] = {}
        self._fault_shown = False
        self._size = 0
        self.model_error: Exception | None = None
        self.storage_error: OSError | None = None

    def keep(self, place: int, entry: object) -> None:
        """Store the report's entry for an image with results.

        Raises:
            EngineError: scores are NaN or infinite, which JSON cannot express.
        """
        try:
            text = json.dumps(entry, indent=2, allow_nan=False)
        except ValueError as error:
            raise EngineError("the model gave scores that are not finite numbers.") from error
        self._entries[place] = text
        self._size += 2 * len(text) + 2 * len(str(self._pictures[place][0]))  # including blanks

    def fail(self, place: int, error: Exception) -> None:
        """Store the reason why an image has no result."""
        path = show_path(self._pictures[place][0])
        if isinstance(error, FAULTS) and not self._fault_shown:
            logger.error(f"{path}: unexpected {type(error).__name__}", exc_info=error)
            self._fault_shown = True
        reason = _reason(error)
        self._reasons[place] = reason if path in reason else f"{path}: {reason}"
        self.keep(place, {"error": self._reasons[place]})

    def fail_in_model(self, place: int, error: Exception) -> None:
        """Call `fail`; an error that is not due to the image is also stored."""
        self.fail(place, error)
        if not isinstance(error, (DataError, InputError)) and self.model_error is None:
            self.model_error = error

    def fail_in_writing(self, place: int, error: Exception) -> None:
        """Call `fail`; if nothing can be written any more, the other images are not tried."""
        if isinstance(error, EngineError):
            self.fail_in_model(place, error)
            return
        self.fail(place, error)
        if isinstance(error, OSError) and error.errno in NO_MORE_WRITING:
            self.storage_error = error

    def release_pictures(self) -> None:
        """Release the images in the frames of the stored error, for frames that have returned; the
        traceback keeps their places in the code."""
        error: BaseException | None = self.model_error
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__

    @property
    def report(self) -> str:
        """Return JSON: the entries by the images' paths, in order."""
        paths = {str(self._pictures[k][0]): self._entries[k] for k in sorted(self._entries)}
        # JSON has no line break inside a text.
        lines = [
            f"{json.dumps(path)}: {text}".replace("\n", "\n  ") for path, text in paths.items()
        ]
        return "{\n  " + ",\n  ".join(lines) + "\n}\n" if lines else "{}\n"

    @property
    def size(self) -> int:
        """Return the approximate number of bytes of the report."""
        return self._size

    @property
    def failures(self) -> list[str]:
        """Return one line per failed image."""
        return [self._reasons[place] for place in sorted(self._reasons)]

    @property
    def progress(self) -> str:
        """Say in words how many images have results."""
        done = len(self._entries) - len(self._reasons)
        return f"{done} of {len(self._pictures)} images"

    def raise_fatal(self, folder: Path) -> None:
        """Raise errors that concern more than single images."""
        if self.storage_error is not None:
            raise StorageError(
                f"predict: {folder} accepts no more files ({self.storage_error.strerror}): "
                f"{self.progress} are complete, and {REPORT} names them. "
                f"{_remedy(self.storage_error)}"
            ) from self.storage_error
        if self.model_error is not None and len(self._reasons) == len(self._entries):
            raise EngineError(
                f"predict: the model predicted none of {len(self._entries)} images; {REPORT} "
                f"says why for each. First: {_reason(self.model_error)}"
            ) from self.model_error


def _reason(error: Exception) -> str:
    """Return an error as one line of a report."""
    if isinstance(error, PpvisionError):
        return str(error)
    if isinstance(error, MemoryError):
        said = f" ({error})" if str(error) else ""
        return f"not enough memory{said}. Make the image smaller, or use a larger machine."
    if isinstance(error, OSError) and error.strerror:
        name = f": {os.fsdecode(error.filename)}" if error.filename is not None else ""
        return f"{error.strerror}{name}"
    line = join_error_lines(error)
    return line if len(line) <= REASON_LENGTH else f"{line[:REASON_LENGTH]} ..."


def _remedy(error: OSError) -> str:
    return (
        "Name another folder."
        if error.errno == errno.EROFS
        else "Make room, or name another folder, and predict the others again."
    )


class _Waiting:
    """Counts the bytes of images and results that wait before and after the model.

    Args:
        limit: number of bytes above which `wait` waits.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._held, self._closed = limit, 0, False
        self._changed = threading.Condition()

    @property
    def full(self) -> bool:
        return self._held >= self._limit

    def add(self, size: int) -> None:
        """Add bytes that wait; a negative number removes them."""
        with self._changed:
            self._held += size
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until the number is below the limit.

        Raises:
            CancelledError: it was closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self.full)
        if self._closed:
            raise CancelledError

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _run(
    pictures: list[tuple[Path, str]],
    predict: Predict,
    write: Write,
    folder: Path,
    stopped: Callable[[], bool],
    max_value: int | None,
    outcomes: _Outcomes,
    reserve: "_Reserve",
) -> None:
    """Read, predict and write every image.

    While the model works, the next images are read and the last ones are written: decoding and
    compressing take as long as a small model.
    """
    waiting = _Waiting(AHEAD_BYTES)
    write_report = _RegularReport(folder, outcomes)

    def read(path: Path) -> np.ndarray:
        waiting.wait()
        if path.exists() and not path.is_file():  # reading a pipe would wait forever
            raise DataError(f"{path}: expected an image file, got another kind of file.")
        image = read_picture(path, max_value=max_value)
        waiting.add(image.nbytes)
        return image

    def finish(place: int, image: np.ndarray, prediction: Prediction, size: int) -> None:
        path, name = pictures[place]
        try:
            reserve.hold(outcomes.size)
            outcomes.keep(place, write(path, name, image, prediction))
        except Exception as error:  # from the PNG encoder, the disk, or memory
            outcomes.fail_in_writing(place, error)
            for result in _results(folder, name):  # some of them may be complete
                result.unlink(missing_ok=True)
        finally:
            waiting.add(-size)
        write_report()

    def handle(place: int, reading: "Future[np.ndarray]") -> Future | None:
        """Predict an image and pass it to the writer; no variable keeps it longer."""
        try:
            image = reading.result()
        except Exception as error:  # no memory, or an error of the reader
            outcomes.fail(place, error)
            return None
        size = image.nbytes
        if stopped():
            return None
        try:
            prediction = predict(pictures[place][0], image)
        except Exception as error:  # engines raise anything; other images continue
            outcomes.fail_in_model(place, error)
            waiting.add(-size)
            return None
        waiting.add(_bytes_of(prediction))
        size += _bytes_of(prediction)
        return writer.submit(finish, place, image, prediction, size)

    with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as reader:
        try:
            ahead = deque(reader.submit(read, path) for path, _ in pictures[:AHEAD])
            behind: deque[Future] = deque()
            for place in track(range(len(pictures)), "predict"):
                if place + AHEAD < len(pictures):
                    ahead.append(reader.submit(read, pictures[place + AHEAD][0]))
                work = handle(place, ahead.popleft())
                outcomes.release_pictures()
                if work is not None:
                    behind.append(work)
                while behind and (len(behind) > AHEAD or waiting.full):
                    behind.popleft().result()
                if stopped() or outcomes.storage_error is not None:
                    break
        finally:
            waiting.close()
            reader.shutdown(cancel_futures=True)
    if stopped():
        logger.warning(f"predict: stopped: {outcomes.progress} are complete; {REPORT} names them")


def _bytes_of(prediction: Prediction) -> int:
    if isinstance(prediction, np.ndarray):
        return prediction.nbytes
    masks = prediction.masks if isinstance(prediction, Detections) else None
    return 0 if masks is None else masks.nbytes


# -- the folder ------------------------------------------------------------------------------------


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Lock the result folder against other processes; make it if it does not exist.

    Raises:
        FolderInUseError: another process predicts into it.
        StorageError: the folder cannot be made.
    """
    busy = f"save_dir: another process is predicting into {folder}. Wait for it, or name another."
    with contextlib.ExitStack() as stack:
        with _explained(folder):
            stack.enter_context(lock_folder(folder, busy))
        yield


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Raise errors of the system inside the block as `StorageError`."""
    try:
        yield
    except PpvisionError:
        raise
    except OSError as error:
        raise StorageError(
            f"save_dir: expected a folder that can be written, got {folder} ({_reason(error)}). "
            "Name another folder."
        ) from error


def _prepare(folder: Path, pictures: list[tuple[Path, str]], sources: Sequence[Path]) -> None:
    """Check that results can be written, and remove results of an earlier run with the same names.

    So a file with the name of one of the images is always from this run. Files with other names
    stay.

    Raises:
        FolderInUseError: files that are not from an earlier run would be replaced.
        InputError: a result would replace one of the images or sources.
        StorageError: the folder cannot be written.
    """
    earlier = (folder / REPORT).is_file()
    there = [kind for kind in RESULT_FOLDERS if (folder / kind).is_dir()]
    found = [
        result
        for _, name in pictures
        for result in _results(folder, name, there)
        if os.path.lexists(result)
    ]
    if found:
        _check_sources(found, [*(path for path, _ in pictures), *sources])
    if found and not earlier:
        raise FolderInUseError(
            f"save_dir: expected a new folder, or one of an earlier prediction, got {folder} "
            f"without a {REPORT}, where {found[0]} would be replaced. Name another folder."
        )
    with _explained(folder):
        # An empty report until the end. It shows that the disk accepts one; an earlier report would
        # name results that are removed now.
        write_text(folder / REPORT, "{}\n")
        for result in found:
            if not result.is_dir():
                result.unlink()
        for kind in RESULT_FOLDERS:
            if os.path.lexists(folder / kind):
                remove_partials(folder / kind)
                _check_writable(folder / kind)
    others = sum(1 for kind in there for _ in (folder / kind).rglob("*.png")) if earlier else 0
    if others:
        logger.warning(
            f"save_dir: {others} files of earlier predictions stay in {folder}; {REPORT} names "
            "those of this one"
        )


def _results(folder: Path, name: str, kinds: Sequence[str] = RESULT_FOLDERS) -> list[Path]:
    """Return the possible files of an image's results."""
    return [folder / kind / f"{name}.png" for kind in kinds]


def _check_sources(results: Sequence[Path], sources: Sequence[Path]) -> None:
    """Raise an `InputError` if a result is one of the sources, or the target of a link among
    them."""
    known = {os.path.realpath(path) for path in sources}
    known |= {os.path.join(os.path.realpath(p.parent), p.name) for p in sources}
    for result in results:
        if os.path.join(os.path.realpath(result.parent), result.name) in known:
            raise InputError(
                f"save_dir: the result {result} would replace an image or label that is to be "
                "read. Name another folder."
            )


def _check_writable(folder: Path) -> None:
    probe = folder / f".ppvision-{os.getpid()}"
    try:
        probe.touch()
    finally:
        probe.unlink(missing_ok=True)


class _Reserve:
    """Disk space that is reserved for the report, in case the results fill the disk.

    Args:
        path: path of the file that reserves the space.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held = 0  # bytes

    def __enter__(self) -> "_Reserve":
        self.hold(0)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def hold(self, size: int) -> None:
        """Make sure that there is space for a report of `size` bytes, and `RESERVED` more.

        Raises:
            OSError: the disk is full.
        """
        if size + RESERVED // 2 <= self._held:
            return
        wanted = 2 * size + RESERVED
        with self._path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, wanted)
        self._held = wanted

    def release(self) -> None:
        self._path.unlink(missing_ok=True)


class _RegularReport:
    """Writes the report when it is called, if the last one is old.

    Args:
        folder, outcomes: see `_write_report`.
    """

    def __init__(self, folder: Path, outcomes: _Outcomes) -> None:
        self._folder, self._outcomes = folder, outcomes
        self._due = time.monotonic() + REPORT_SECONDS

    def __call__(self) -> None:
        start = time.monotonic()
        if start < self._due:
            return
        with contextlib.suppress(StorageError):  # the last report raises it
            _write_report(self._folder, self._outcomes)
        end = time.monotonic()
        self._due = end + max(REPORT_SECONDS, (end - start) / REPORT_SHARE)


def _write_report(folder: Path, outcomes: _Outcomes) -> None:
    """Write `predictions.json`.

    Names that are not UTF-8 are written as Python's surrogates, escaped: `json.loads` and
    `os.fsencode` restore the file's name.
    """
    try:
        write_text(folder / REPORT, outcomes.report)
    except OSError as error:
        raise StorageError(
            f"predict: {REPORT} cannot be written into {folder} ({_reason(error)}). The results of "
            f"{outcomes.progress} are complete in {folder}, but nothing names them. "
            f"{_remedy(error)}"
        ) from error
