"""Predict images with an exported folder, without any training code."""

import logging
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, cast, overload

import numpy as np

from ppvision.arguments import (
    check_choice,
    check_count,
    check_file,
    check_flag,
    check_path,
    check_utf8,
)
from ppvision.data.limits import MAX_PIXELS, read_max_pixels
from ppvision.data.pictures import read_picture, scale_to_bytes
from ppvision.deploy.run.composition import compose
from ppvision.deploy.run.detection_transforms import DetectionTransforms
from ppvision.deploy.run.engines import (
    ONE_PIXEL,
    Engine,
    OnnxRuntime,
    PaddleRuntime,
    enlarges,
    fail_as,
    has_openvino,
    join_error_lines,
    open_runtime,
    read_declared_inputs,
)
from ppvision.deploy.run.integer_probe import find_integer_fault
from ppvision.deploy.run.isolated import IsolatedRuntime
from ppvision.deploy.run.manifest import NAME, Manifest, read_manifest, verify_files
from ppvision.deploy.run.nms import RuntimeWithNms
from ppvision.deploy.run.precision import (
    Precision,
    check_precision,
    choose_precision,
    find_integer_doubt,
    find_usable_flags,
)
from ppvision.deploy.run.task_table import TASKS, Prediction
from ppvision.deploy.run.task_table import Classification as Classification  # its earlier place
from ppvision.deploy.run.transforms import Step, Transforms
from ppvision.errors import (
    EngineError,
    InputError,
    InputTypeError,
    ManifestError,
    MissingFileError,
    shorten,
)
from ppvision.files import check_room, compute_sha256, name_flag_errors, name_storage_errors

if TYPE_CHECKING:
    from ppvision.quant.store.model import LayeredModel

logger = logging.getLogger("ppvision")

Picture = str | os.PathLike | np.ndarray
Runtime = PaddleRuntime | OnnxRuntime | IsolatedRuntime | RuntimeWithNms

# The type of a prediction depends on the folder, which a type checker does not read:
# `Predictor(folder)` gives Any, and `predictor: Predictor[Detections] = Predictor(folder)` states
# the type.
if TYPE_CHECKING:
    from typing_extensions import TypeVar

    P = TypeVar("P", default=Any)
else:  # Python has defaults of type variables from 3.13 on
    from typing import TypeVar

    P = TypeVar("P")
PictureType = TypeVar("PictureType", bound=Picture)


_MAX_THREADS = 1024  # more than any machine needs; Paddle and ONNX Runtime would start all of them


@dataclass(frozen=True)
class _Prepared:
    """One image, ready for the network."""

    place: int  # its number among the given images
    inputs: dict[str, np.ndarray]  # of the graph, without the batch axis
    steps: list[Step]  # changes of size to undo on the prediction


@dataclass
class _Opened:
    """The engines of one width. A call uses the same ones from its beginning to its end."""

    runtime: Runtime
    engine: Engine | None
    weights: "LayeredModel | None"  # instead of the folder's
    precision: Precision
    without_onednn: Runtime | None = None  # for small images; opened when the first one comes
    opening: threading.Lock = field(default_factory=threading.Lock)


class Predictor(Generic[P]):
    """Runs a folder that `export_model` wrote.

    Args:
        folder: a folder with `deploy.yaml`; size and sha256 of every file are verified. Or the name
            of a whole model of the zoo (`ppvision list`). Its folder is written into the cache
            folder at the first use. An existing folder of that name has priority.
        threads: number of CPU threads. None: the default of the engine.
        device: "cpu" or "gpu" (the first GPU).
        use_onednn: None uses the fastest engine on a CPU: OpenVINO if the export has a graph for
            it, else oneDNN. If an engine fails to load, a warning says so and the next one is used.
            oneDNN is also skipped if it failed the comparison at the export. True requires oneDNN.
            False uses Paddle's own kernels. Only for Paddle exports.
        precision: "auto" uses integers if the folder has them and the processor has VNNI or AMX
            (for an ONNX export: if ONNX Runtime was faster with them), bfloat16 if the processor
            has it and the export's check of it passed, and float32 otherwise; a log line says
            which. "float32", "bfloat16" and "int8" select one ("fp32" and "bf16" are accepted too).
            With "float32", a folder with integers computes the same codes in float32.
        layered: a layered model (folder or URL) of the same architecture. Its weights replace those
            of the folder. Only for float exports for Paddle Inference.
        bits: width of `layered`; None uses the highest complete width. `set_bits` changes it.
        isolate: run the engine in a separate process. The process ends, and frees all its memory,
            when this object is closed. Images pass through a pipe, which takes about a millisecond
            per image. Default False.

    Attributes:
        manifest: the content of `deploy.yaml`.
        bits: bit-width of the weights: 32, or the width of `layered` or of the packed codes.
        engine: engine of Paddle Inference: "openvino", "onednn" or "native"; None with ONNX
            Runtime.
        onednn: whether the engine is oneDNN.
        precision: the precision in use: "float32", "bfloat16" or "int8".

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ManifestError: `deploy.yaml` or a file is corrupt; a ValueError.
        ValueError: there is no such device, or `threads` is not a whole number above 0.
        LayeredModelError: the layered model cannot be read; a ValueError.
        RuntimeError: `use_onednn=True` and oneDNN cannot run the graph, or gave other numbers at
            the export.

    Several threads may use one object. They read and transform images at the same time. An engine
    of Paddle Inference then runs one batch at a time; ONNX Runtime runs several. `threads` is the
    number of threads of one such run (docs/deployment.md has the throughput). A process that was
    forked after the object was made cannot use it: it raises an EngineError.

    `with Predictor(folder) as predictor:` closes the object at the end; see `close`.

    For a type checker a prediction is Any, since the folder decides what it is. To have it checked,
    say which: `predictor: Predictor[Detections] = Predictor(folder)`; for segmentation
    `Predictor[np.ndarray]`, for classification `Predictor[Classification]`, for feature maps
    `Predictor[list[np.ndarray]]`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        threads: int | None = None,
        device: str = "cpu",
        use_onednn: bool | None = None,
        precision: str = "auto",
        layered: str | Path | None = None,
        bits: int | None = None,
        isolate: bool = False,
    ) -> None:
        if threads is not None:
            threads = check_count(threads, "threads", most=_MAX_THREADS)
        check_choice(device, "device", ("cpu", "gpu"))
        use_onednn = check_flag(use_onednn, "use_onednn", optional=True)
        if bits is not None and layered is None:
            raise InputError("bits: expected a layered model with it (layered=...), got none.")
        self._folder = folder = _found(folder)
        check_utf8(folder, "folder")
        self.manifest = read_manifest(folder)
        self._task = TASKS[self.manifest.task]
        self._transforms = _transforms_of(self.manifest, folder)
        if self.manifest.format == "paddle":
            _check_shapes(
                read_declared_inputs(folder / self.manifest.program), self.manifest, folder
            )
        if use_onednn and (self.manifest.format == "onnx" or device == "gpu"):
            raise InputError(
                "use_onednn: oneDNN belongs to Paddle Inference on a CPU, got "
                f"format={self.manifest.format!r}, device={shorten(device)}. Leave it at None."
            )

        self._isolate = check_flag(isolate, "isolate")
        self._threads, self._device = threads, device
        self._use_onednn = use_onednn
        self._asked = check_precision(precision)
        if self._asked in ("int8", "bfloat16") and (use_onednn is not None or device != "cpu"):
            raise InputError(
                f"precision: {self._asked} runs in OpenVINO on a CPU, got use_onednn={use_onednn}, "
                f"device={shorten(device)}. Leave them at their defaults."
            )
        self._layered = layered
        self._kept: dict[str, Runtime] = {}  # OpenVINO's, by the sha256 of their weights
        self._changing = threading.Lock()  # one change of the width at a time
        self._closed = False
        self._opened: _Opened | None = None
        self._process = os.getpid()
        if layered is None:
            self._opened = self._open(None)
        else:
            self.set_bits(bits)

    @property
    def bits(self) -> int:
        """Bit-width of the weights: 32, or the width of the layered model or the packed codes."""
        weights = self._current().weights
        return self.manifest.bits if weights is None else weights.bits

    @property
    def engine(self) -> Engine | None:
        """Engine of Paddle Inference: "openvino", "onednn" or "native"; None with ONNX Runtime."""
        return self._current().engine

    @property
    def precision(self) -> Precision:
        """The precision in use: "float32", "bfloat16" or "int8"."""
        return self._current().precision

    @property
    def onednn(self) -> bool:
        """Whether the engine is oneDNN."""
        return self.engine == "onednn"

    def _current(self) -> _Opened:
        opened = self._opened
        if opened is None:
            raise self._closed_error()
        return opened

    def _closed_error(self) -> EngineError:
        return EngineError(
            f"This Predictor of {self._folder} is closed. Make a new one to predict again."
        )

    def close(self) -> None:
        """Release the engine; a second call does nothing.

        Calls in other threads that have begun end as usual. After the last of them the memory is
        free, except that of OpenVINO, which the process keeps (docs/performance.md). Later calls
        raise an EngineError.
        """
        if os.getpid() != self._process:  # the engine is the parent's, perhaps the lock too
            return
        with self._changing:
            opened, self._closed, self._opened = self._opened, True, None
            self._kept.clear()
        if self._isolate and opened is not None:
            for runtime in (opened.runtime, opened.without_onednn):
                if isinstance(runtime, (IsolatedRuntime, RuntimeWithNms)):
                    runtime.close()

    def __enter__(self) -> "Predictor":
        self._current()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple:
        raise InputTypeError(
            "Predictor: cannot be copied or sent to another process, since its engine belongs to "
            f"this one. Send the folder, {self._folder}, and make a Predictor of it there."
        )

    def set_bits(self, bits: int | None) -> None:
        """Use another width of the layered model; None: the highest complete width.

        Calls in other threads that have begun keep the width that they began with. With OpenVINO,
        each width that was used stays loaded, because Paddle does not free its memory. The change
        back to such a width is fast, and each width needs its memory only once.

        Raises:
            ValueError: there is no layered model, it has no such width, or it belongs to another
                architecture.
            EngineError: the Predictor is closed.
        """
        if self._layered is None:
            raise InputError("set_bits: expected a Predictor with a layered model (layered=...).")
        # Imported here, because it imports the quanters, which most programs for prediction do not
        # need.
        from ppvision.quant.store.model import load_layered

        with self._changing:
            if self._closed:
                raise self._closed_error()
            self._opened = self._open(load_layered(self._layered, bits))

    @contextmanager
    def _model_files(self, weights: "LayeredModel | None") -> Iterator[Path]:
        """Yield the folder with the export, or a folder with its graph and other weights."""
        if self._opened is not None:
            # The folder may have changed since it was first read, or may be deleted.
            verify_files(self._folder, self.manifest)
        if weights is None:
            yield self._folder
            return
        with name_flag_errors("TMPDIR", Path(os.environ.get("TMPDIR", tempfile.tempdir or "/tmp"))):
            temporary = tempfile.TemporaryDirectory(prefix="ppvision-")
        with temporary as work:
            with name_storage_errors(Path(work), Path(work)):
                compose(self._folder, self.manifest, weights, Path(work))
                check_room(Path(work), Path(work))
            yield Path(work)

    def _open_runtime(
        self, folder: Path, engine: Engine, keep: bool, precision: Precision = "float32"
    ) -> Runtime:
        def opened() -> Runtime:
            manifest = self.manifest
            files = manifest.model_files
            open_engine = IsolatedRuntime if self._isolate else open_runtime
            runtime = open_engine(
                folder,
                manifest.format,
                files=files,
                engine=engine,
                bfloat16=precision == "bfloat16",
                integers=precision == "int8",
                threads=self._threads,
                device=self._device,
            )
            if engine == "openvino" and manifest.nms is not None:
                assert not isinstance(runtime, OnnxRuntime)  # OpenVINO is in Paddle Inference
                return RuntimeWithNms(runtime, manifest.nms)
            return runtime

        if engine != "openvino" or not keep or self._isolate:
            return opened()
        weights = compute_sha256(folder / self.manifest.model_files.weights_beside)
        if weights not in self._kept:
            self._kept[weights] = opened()
        return self._kept[weights]

    def _try(
        self,
        folder: Path,
        engine: Engine,
        *,
        keep: bool,
        insist: bool,
        precision: Precision = "float32",
    ) -> Runtime | None:
        """Return a runtime that has run once; or None, with a warning."""
        manifest = self.manifest
        try:
            if engine == "onednn" and manifest.onednn is False:
                raise EngineError("it failed or gave other numbers when this was exported")
            smallest = min(manifest.checked_shapes, key=np.prod)
            is_small = engine == "onednn" and max(smallest[2:]) <= ONE_PIXEL
            if is_small and enlarges(folder / manifest.program):
                raise EngineError(f"its kernels fail on images of up to {ONE_PIXEL} pixels")
            runtime = self._open_runtime(folder, engine, keep, precision)
            runtime.run(self._task.inputs(np.zeros(smallest, np.float32)))
        except Exception as error:  # Paddle raises many types of errors here
            name = {"openvino": "OpenVINO", "onednn": "oneDNN"}[engine]
            reason = f"{manifest.name}: {name} cannot run it here ({join_error_lines(error)})."
            if insist:
                other = "use_onednn=None or False" if engine == "onednn" else "precision='auto'"
                raise EngineError(f"{reason} Pass {other}.") from error
            warnings.warn(f"{reason} Continuing without {name}, which is slower.", stacklevel=4)
            return None
        return runtime

    def _open(self, weights: "LayeredModel | None") -> _Opened:
        """Load the model files in the fastest allowed engine that works."""
        manifest, wanted = self.manifest, self._use_onednn
        on_cpu = manifest.format == "paddle" and self._device == "cpu"
        runtime: Runtime | None = None
        name: Engine | None = None if manifest.format == "onnx" else "native"
        keep = weights is not None
        precision = self._choose_precision()
        in_openvino = on_cpu and wanted is None and manifest.openvino and has_openvino()
        if manifest.activations is not None and precision == "float32":
            in_openvino = False  # the graph for OpenVINO is the one in integers
        with self._model_files(weights) as folder:
            if in_openvino:
                insist = self._asked not in ("auto", "float32")
                runtime = self._try(
                    folder, "openvino", keep=keep, insist=insist, precision=precision
                )
                name = "openvino" if runtime else name
            if runtime is None and manifest.format == "paddle":
                precision = "float32"  # integers and bfloat16 run in OpenVINO
            if runtime is None and on_cpu and wanted is not False:
                runtime = self._try(folder, "onednn", keep=keep, insist=bool(wanted))
                name = "onednn" if runtime else name
            if runtime is None:
                with fail_as(f"{self._folder}: the exported graph does not load"):
                    runtime = self._open_runtime(folder, "native", keep, precision)
        if manifest.format == "onnx" and isinstance(runtime, (OnnxRuntime, IsolatedRuntime)):
            _check_shapes(runtime.input_shapes, manifest, self._folder)
        # An export of one size was compared at this size.
        free = name == "onednn" and None in manifest.input_shape[2:]
        self._one_pixel = free and enlarges(self._folder / manifest.program)
        return _Opened(runtime, name, weights, precision)

    def _choose_precision(self) -> Precision:
        manifest = self.manifest
        if self._use_onednn is not None or self._device != "cpu":
            return "float32"
        chosen, why = choose_precision(self._asked, manifest, find_usable_flags(), has_openvino())
        fault = None
        if chosen == "int8" and self._asked == "auto" and manifest.format == "paddle":
            fault = find_integer_fault(self._isolate)
        if fault is not None:
            chosen, why = "float32", f"{fault}: the same codes run in float"
        if self._asked == "int8" and (doubt := find_integer_doubt(manifest, find_usable_flags())):
            logger.warning(
                f"{manifest.name}: int8 may give wrong numbers: {doubt}. Pass precision='auto'."
            )
        if chosen == "bfloat16" and "amx_bf16" not in find_usable_flags():
            logger.warning(
                f"{manifest.name}: bfloat16 is slower than float32 here, since the processor has "
                "no amx_bf16. Pass precision='auto'."
            )
        if self._asked == "auto" and (manifest.activations is not None or chosen != "float32"):
            logger.info(f"{manifest.name}: {chosen}, since {why}")
        return chosen

    def _runtime_for(self, opened: _Opened, height: int, width: int) -> Runtime:
        """Run without oneDNN if a feature map that is enlarged may be one pixel."""
        if not (self._one_pixel and max(height, width) <= ONE_PIXEL):
            return opened.runtime
        with opened.opening:
            if opened.without_onednn is None:
                with self._model_files(opened.weights) as folder:
                    opened.without_onednn = self._open_runtime(folder, "native", False)
        return opened.without_onednn

    @overload
    def __call__(self, images: Picture, batch_size: int = 1) -> P: ...

    @overload
    def __call__(
        self, images: list[PictureType] | tuple[PictureType, ...], batch_size: int = 1
    ) -> list[P]: ...

    def __call__(
        self,
        images: Picture | list[PictureType] | tuple[PictureType, ...],
        batch_size: int = 1,
    ) -> P | list[P]:
        """Predict one image or a list of images.

        Args:
            images: a path, or an array `[H, W, 3]` of uint8, RGB; or a list of these. Files are
                read as in training (`ppvision.data.pictures.read_picture`). If `deploy.yaml` has a
                `max_value`, files and arrays of uint16 are scaled by it.
            batch_size: for a list: the largest number of images that run together. They must have
                the same size after the transforms. An export with a fixed batch uses that batch.

        Returns:
            For one image one prediction; for a list a list in the same order:
            segmentation: classes `[H, W]` at the image's own size, uint8 (int32 above 256
            classes). Resizing and padding are undone as in PaddleSeg: logits and probabilities by
            bilinear interpolation before the argmax, the classes of an "argmax" export by the
            nearest neighbour;
            classification: a `Classification`;
            detection: a `Detections`, with boxes and masks in pixels of the image;
            features: the list of feature maps, each `[C, H', W']`.

        Raises:
            FileNotFoundError: no such image.
            ValueError: a file is not an image, cut off, damaged, too large or of more than 8 bits
                (a `DataError`); an array has another shape or type; an image does not fit the fixed
                size of the export.
            EngineError: the engine cannot run it, or the Predictor is closed.
        """
        batch_size = check_count(batch_size, "batch_size")
        if not isinstance(images, (list, tuple)):
            return self([images])[0]
        opened = self._current()
        if self.manifest.input_shape[1] != 3:
            raise InputError(
                f"images: this export takes {self.manifest.input_shape[1]} channels, not RGB "
                "images. Prepare the input yourself and call run."
            )
        batch_size = self.manifest.input_shape[0] or batch_size
        results: dict[int, Prediction] = {}  # by place
        waiting: dict[tuple[int, ...], list[_Prepared]] = {}
        for place, image in enumerate(images):
            pixels = _read(image, self.manifest.max_value)
            prepared = _Prepared(place, *self._task.prepare(self._transforms, pixels))
            shape = prepared.inputs["image"].shape
            group = waiting.setdefault(shape, [])
            group.append(prepared)
            if len(group) == batch_size:
                self._finish(opened, waiting.pop(shape), results)
        for group in waiting.values():
            self._finish(opened, group, results)
        return cast(list[P], [results[place] for place in range(len(images))])

    def run(
        self, batch: np.ndarray, sizes: Mapping[str, np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """Run only the graph, without transforms.

        Args:
            batch: `[B, C, H, W]`, float32, already transformed.
            sizes: for a detector only: `im_shape` `[B, 2]`, height and width of each image inside
                the batch, and `scale_factor` `[B, 2]`, the factors of their resizing. Default: each
                image fills the batch and was not resized.

        Returns:
            The outputs of the graph. Segmentation and classification: one, after `output_op`.
            Features: all feature maps. Detection: rows `[N, 6]` of class, score and box, counts
            `[B]`, and masks `[N, H, W]` if the detector has masks.

        Raises:
            ValueError: the type or shape differs from that of the export.
            EngineError: the engine cannot run the graph, or the Predictor is closed.
        """
        return self._run(self._current(), batch, sizes)

    def _run(
        self,
        opened: _Opened,
        batch: np.ndarray,
        sizes: Mapping[str, np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        expected = self.manifest.input_shape
        fits = (
            isinstance(batch, np.ndarray)
            and batch.dtype == np.float32
            and batch.ndim == 4
            and batch.size > 0
            and all(want in (None, got) for want, got in zip(expected, batch.shape, strict=True))
        )
        if not fits:
            got = type(batch).__name__
            if isinstance(batch, np.ndarray):
                got = f"{batch.dtype} {list(batch.shape)}"
            raise InputError(
                f"batch: expected a float32 array {expected} (None: any size), got {got}. "
                "Set transforms at export so that every image gets this size."
            )
        count, _, height, width = batch.shape
        self._task.check_sizes(sizes, count)
        runtime = self._runtime_for(opened, height, width)
        inputs = self._task.inputs(batch, sizes)
        with fail_as(f"{self._folder}: the engine does not run on an input of {list(batch.shape)}"):
            outputs = runtime.run(inputs)
        if not self._task.fits(outputs, self.manifest, count):
            shapes = ", ".join(f"{o.dtype} {list(o.shape)}" for o in outputs)
            raise ManifestError(
                f"{self._folder / NAME}: task {self.manifest.task}, output_op "
                f"{self.manifest.output_op} and num_classes {self.manifest.num_classes} do not fit "
                f"what the graph gives: {shapes}. Copy or export the folder again."
            )
        return outputs

    def _finish(
        self, opened: _Opened, group: list[_Prepared], results: dict[int, Prediction]
    ) -> None:
        missing = (self.manifest.input_shape[0] or len(group)) - len(group)
        # Fill an export's fixed batch with copies; their results are dropped.
        filled = group + group[-1:] * missing
        sizes = {
            name: _stacked([prepared.inputs[name] for prepared in filled])
            for name in group[0].inputs
        }
        batch = sizes.pop("image")
        outputs = self._run(opened, batch, sizes or None)
        found = self._task.read(outputs, [prepared.steps for prepared in group], self.manifest)
        for prepared, prediction in zip(group, found, strict=True):
            results[prepared.place] = prediction


def _found(folder: str | Path) -> Path:
    """Return the folder, or the folder of the zoo's model with this name."""
    expected = "an exported folder or the name of a whole model of the zoo"
    path = check_file(folder, "folder", expected)
    if not isinstance(folder, str) or (folder and path.exists()):
        return path
    from difflib import get_close_matches

    from ppvision.deploy.run.zoo_folder import compose_zoo_folder
    from ppvision.zoo.cards import ZOO_WEIGHTS

    if (composed := compose_zoo_folder(folder)) is not None:
        return composed
    # A zoo name without a tag, such as "pale_nano", has several models; a misspelt name is similar
    # to one.
    names = [name for name, card in ZOO_WEIGHTS.items() if not card.package]
    close = [n for n in names if folder and f"{folder}." in n] or get_close_matches(
        folder, names, 1, 0.8
    )
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Names: {', '.join(names)}."
    raise MissingFileError(
        f"folder: expected {expected}, got {shorten(folder)}, which is neither. {hint}"
    )


def _transforms_of(manifest: Manifest, folder: Path) -> Transforms | DetectionTransforms:
    # For a folder that PaddleX also reads, both give the same result.
    as_paddlex = manifest.paddlex_name is not None
    try:
        build = TASKS[manifest.task].build_transforms
        return build(manifest.transforms, as_paddlex=as_paddlex)
    except InputError as error:
        raise ManifestError(f"{folder / NAME}: {error}") from error


def _check_shapes(
    declared: Mapping[str, list[int | None]], manifest: Manifest, folder: Path
) -> None:
    """Raise `ManifestError` unless the graph takes images of the size in `deploy.yaml`: engines
    read beyond the end of an input that is smaller than expected."""
    for shape in declared.values():
        if len(shape) == 4 and shape == manifest.input_shape:
            return
    raise ManifestError(
        f"{folder / NAME}: input_shape: expected one of an input of {manifest.program}, "
        f"{', '.join(map(str, declared.values()))}, got {manifest.input_shape}. Copy or export the "
        "folder again."
    )


def _read(image: Picture, max_value: int | None = None) -> np.ndarray:
    """Return an image `[H, W, 3]`, uint8, RGB, from a path or an array."""
    if isinstance(image, (str, os.PathLike)):
        check_path(image, "image")
        return read_picture(image, max_value=max_value)
    if not isinstance(image, np.ndarray):
        raise InputError(
            f"image: expected a path or a uint8 array [H, W, 3], got {type(image).__name__}."
        )
    known = (np.uint8,) if max_value is None else (np.uint8, np.uint16)
    if image.dtype not in known or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise InputError(
            f"image: expected a uint8 array [H, W, 3] (RGB, 0..255), got {image.dtype} "
            f"{list(image.shape)}. Drop an alpha channel with image[..., :3], repeat a grey one "
            "with numpy.stack([image] * 3, axis=-1), pass several images as a list. Arrays of "
            "uint16 need a max_value in deploy.yaml (that of the training data)."
        )
    count, limit = image.shape[0] * image.shape[1], read_max_pixels()
    if count > limit:  # the limit of files: transforms need many times this memory
        raise InputError(
            f"image: expected at most {limit} pixels, got {image.shape[1]}x{image.shape[0]}. If it "
            f"is meant to be that large, set {MAX_PIXELS}={count}."
        )
    if max_value is None or image.dtype == np.uint8:
        return image
    return scale_to_bytes(image, max_value, "image")


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    """Make a batch; one array is not copied."""
    return np.stack(arrays) if len(arrays) > 1 else arrays[0][None]
