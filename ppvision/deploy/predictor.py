"""From a picture to a prediction, with an exported folder and nothing of the training code."""

import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F

from ppvision.data.pictures import read_picture, scale_to_bytes
from ppvision.deploy.composition import PARAMETERS, compose
from ppvision.deploy.detection_transforms import DetectionTransforms
from ppvision.deploy.detections import Detections, detections_of
from ppvision.deploy.manifest import read_manifest, sha256_of
from ppvision.deploy.parity import softmax
from ppvision.deploy.runtime import (
    ONE_PIXEL,
    Batch,
    Engine,
    OnnxRuntime,
    PaddleRuntime,
    enlarges,
    has_openvino,
    in_one_line,
    open_runtime,
)
from ppvision.deploy.transforms import Step, Transforms
from ppvision.errors import EngineError, InputError
from ppvision.quant.layered_model import LayeredModel, load_layered

Picture = str | os.PathLike | np.ndarray


@dataclass(frozen=True)
class Classification:
    """The class of one picture."""

    class_id: int
    name: str | None  # None when the export names no classes
    probabilities: np.ndarray | None  # [K], float64; None when the graph gives the class alone


Prediction = np.ndarray | Classification | Detections | list[np.ndarray]


@dataclass(frozen=True)
class _Prepared:
    """One picture, ready for the network."""

    place: int  # among the pictures that were given
    inputs: dict[str, np.ndarray]  # of the graph, without the batch axis
    steps: list[Step]  # what is to be undone on the prediction


class Predictor:
    """Runs a folder that `export_model` wrote.

    Args:
        folder: with `deploy.yaml`; size and sha256 of every file are verified.
        threads: CPU threads. None: the runtime's default.
        device: "cpu" or "gpu" (the first one).
        use_onednn: None takes the quickest on a CPU: OpenVINO where the export has a graph for it,
            or else oneDNN. What fails at load is warned of, and the next is taken; so is oneDNN
            that failed the comparison of the export. True insists on oneDNN; False leaves Paddle's
            own kernels alone. Only for Paddle exports.
        layered: a layered model (folder or URL) of the same architecture, whose weights go in the
            place of the folder's. Only for float exports for Paddle Inference.
        bits: width of `layered`; None takes the highest that is complete. `set_bits` changes it.

    Attributes:
        manifest: the content of `deploy.yaml`.
        bits: of the weights: 32, or the width of `layered` or of the packed codes.
        engine: of Paddle Inference: "openvino", "onednn" or "native"; None with ONNX Runtime.
        onednn: whether the engine is oneDNN.

    Raises:
        FileNotFoundError: the folder or a file of it is missing.
        ValueError: `deploy.yaml` or a file is corrupt, the device is not there, or `threads` is no
            whole number above 0.
        LayeredModelError: a layered model that does not read; a ValueError.
        RuntimeError: `use_onednn=True` and oneDNN cannot run the graph, or gave other numbers when
            it was exported.

    One object serves one thread at a time.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        threads: int | None = None,
        device: str = "cpu",
        use_onednn: bool | None = None,
        layered: str | Path | None = None,
        bits: int | None = None,
    ) -> None:
        whole = isinstance(threads, int) and not isinstance(threads, bool)
        if threads is not None and (not whole or threads < 1):
            raise InputError(
                f"threads: expected None or a whole number of at least 1, got {threads!r}."
            )
        if bits is not None and layered is None:
            raise InputError("bits: expected a layered model with it (layered=...), got none.")
        self._folder = folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.bits = self.manifest.bits
        detection = self.manifest.task == "detection"
        kind = DetectionTransforms if detection else Transforms
        self._transforms = kind(self.manifest.transforms)
        self._label_type = np.uint8 if (self.manifest.num_classes or 0) <= 256 else np.int32
        if use_onednn and (self.manifest.format == "onnx" or device == "gpu"):
            raise InputError(
                "use_onednn: oneDNN belongs to Paddle Inference on a CPU, got "
                f"format={self.manifest.format!r}, device={device!r}. Leave it at None."
            )

        self._how = {"threads": threads, "device": device}
        self._use_onednn = use_onednn
        self._layered = layered
        self._weights: LayeredModel | None = None  # in the place of the folder's
        self._kept: dict[str, PaddleRuntime] = {}  # OpenVINO's, by the sha256 of their weights
        if layered is None:
            self._open()
        else:
            self.set_bits(bits)

    def set_bits(self, bits: int | None) -> None:
        """Take the weights of another width of the layered model; None: of the highest complete.

        In OpenVINO the widths that were taken before stay loaded, since Paddle keeps their memory
        in any case: to go back to one is quick, and each takes its memory once.

        Raises:
            ValueError: made without a layered model; a width that it has not; another architecture.
        """
        if self._layered is None:
            raise InputError("set_bits: expected a Predictor with a layered model (layered=...).")
        before, self._weights = self._weights, load_layered(self._layered, bits)
        try:
            self._open()
        except Exception:
            self._weights = before
            raise
        self.bits = self._weights.bits

    @contextmanager
    def _model_files(self) -> Iterator[Path]:
        """The folder with the export, or with its graph and other weights."""
        if self._weights is None:
            yield self._folder
            return
        with tempfile.TemporaryDirectory(prefix="ppvision-") as work:
            compose(self._folder, self.manifest, self._weights, Path(work))
            yield Path(work)

    def _opened(self, folder: Path, engine: Engine) -> PaddleRuntime | OnnxRuntime:
        def opened() -> PaddleRuntime | OnnxRuntime:
            return open_runtime(folder, self.manifest.format, engine=engine, **self._how)

        if engine != "openvino" or self._weights is None:
            return opened()
        weights = sha256_of(folder / PARAMETERS)
        if weights not in self._kept:
            self._kept[weights] = opened()
        return self._kept[weights]

    def _tried(self, folder: Path, engine: Engine, *, insist: bool) -> PaddleRuntime | None:
        """A runtime that has run once, or None and a warning."""
        try:
            if engine == "onednn" and self.manifest.onednn is False:
                raise EngineError("it failed or gave other numbers when this was exported")
            runtime = self._opened(folder, engine)
            smallest = min(self.manifest.checked_shapes, key=np.prod)
            runtime.run(_zeros(self.manifest.task, smallest))
        except Exception as error:  # Paddle raises many kinds for what an engine cannot run
            name = {"openvino": "OpenVINO", "onednn": "oneDNN"}[engine]
            reason = f"{self.manifest.name}: {name} cannot run it here ({in_one_line(error)})."
            if insist:
                raise EngineError(f"{reason} Pass use_onednn=None or False.") from error
            warnings.warn(f"{reason} Going on without {name}, which is slower.", stacklevel=4)
            return None
        return runtime

    def _open(self) -> None:
        """Load the model files, in the quickest engine that is wanted and works."""
        manifest, wanted = self.manifest, self._use_onednn
        on_cpu = manifest.format == "paddle" and self._how["device"] == "cpu"
        runtime, name = None, None if manifest.format == "onnx" else "native"
        with self._model_files() as folder:
            if on_cpu and wanted is None and manifest.openvino and has_openvino():
                runtime = self._tried(folder, "openvino", insist=False)
                name = "openvino" if runtime else name
            if runtime is None and on_cpu and wanted is not False:
                runtime = self._tried(folder, "onednn", insist=bool(wanted))
                name = "onednn" if runtime else name
            self._runtime = runtime or self._opened(folder, "native")
        self.engine = name
        self.onednn = self.engine == "onednn"
        # An export of one size was compared at it.
        free = self.onednn and None in manifest.input_shape[2:]
        self._one_pixel = free and enlarges(self._folder)
        self._without_onednn: PaddleRuntime | None = None

    def _runtime_for(self, height: int, width: int) -> PaddleRuntime | OnnxRuntime:
        """Without oneDNN where a feature map that is enlarged may be one pixel."""
        if not (self._one_pixel and max(height, width) <= ONE_PIXEL):
            return self._runtime
        if self._without_onednn is None:
            with self._model_files() as folder:
                self._without_onednn = self._opened(folder, "native")
        return self._without_onednn

    def __call__(
        self, images: Picture | Sequence[Picture], batch_size: int = 1
    ) -> Prediction | list[Prediction]:
        """Predict one picture or a list of them.

        Args:
            images: a path, or an array `[H, W, 3]` of uint8, RGB; or a list of either. Files are
                read as in training (`ppvision.data.pictures.read_picture`). Where `deploy.yaml`
                has a `max_value`, files and arrays of uint16 are scaled by it.
            batch_size: with a list, pictures that have the same size after the transforms run up to
                so many together (an export of a fixed batch runs in that batch).

        Returns:
            For one picture, and for a list a list in its order:
            segmentation: classes `[H, W]` at the picture's own size, uint8 (int32 above 256
            classes). Resizing and padding are undone as PaddleSeg does: logits and probabilities
            by bilinear interpolation before the highest is taken, the classes of an "argmax"
            export by the nearest one;
            classification: a `Classification`;
            detection: a `Detections`, its boxes and masks in pixels of the picture;
            features: the list of feature maps, each `[C, H', W']`.

        Raises:
            FileNotFoundError: no such picture.
            ValueError: a file that is no picture, cut off, damaged, too large or of more than 8
                bits (a `DataError`), an array of another shape or type, a picture that does not fit
                the export's fixed size.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size: expected a whole number above 0, got {batch_size!r}.")
        if not isinstance(images, (list, tuple)):
            return self([images])[0]
        if self.manifest.input_shape[1] != 3:
            raise InputError(
                f"images: this export takes {self.manifest.input_shape[1]} channels, not RGB "
                "pictures. Prepare the input yourself and call run."
            )
        batch_size = self.manifest.input_shape[0] or batch_size
        results: list[Prediction | None] = [None] * len(images)
        waiting: dict[tuple[int, ...], list[_Prepared]] = {}
        for place, image in enumerate(images):
            prepared = self._prepared(place, _read(image, self.manifest.max_value))
            shape = prepared.inputs["image"].shape
            group = waiting.setdefault(shape, [])
            group.append(prepared)
            if len(group) == batch_size:
                self._finish(waiting.pop(shape), results)
        for group in waiting.values():
            self._finish(group, results)
        return results

    def _prepared(self, place: int, image: np.ndarray) -> _Prepared:
        if isinstance(self._transforms, DetectionTransforms):
            return _Prepared(place, self._transforms(image), [])
        x, steps = self._transforms(image)
        return _Prepared(place, {"image": x}, steps)

    def run(
        self, batch: np.ndarray, sizes: Mapping[str, np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """Run the graph alone.

        Args:
            batch: `[B, C, H, W]`, float32, already transformed.
            sizes: of a detector: `im_shape` `[B, 2]`, the pictures' heights and widths inside of
                the batch, and `scale_factor` `[B, 2]`, by which they were resized. Default: whole
                pictures at their own size.

        Returns:
            The graph's outputs: one for segmentation and classification, behind `output_op`; all
            feature maps for "features"; of a detector rows `[N, 6]` of class, score and box, counts
            `[B]`, and masks `[N, H, W]` where it has any.

        Raises:
            ValueError: another type or shape than the export takes.
        """
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
                "Set transforms at export so that every picture gets this size."
            )
        count, _, height, width = batch.shape
        runtime = self._runtime_for(height, width)
        if self.manifest.task != "detection":
            return runtime.run(batch)
        whole = {
            "im_shape": np.full((count, 2), (height, width), np.float32),
            "scale_factor": np.ones((count, 2), np.float32),
        }
        return runtime.run({"image": batch, **whole, **(sizes or {})})

    def _finish(self, group: list[_Prepared], results: list[Prediction | None]) -> None:
        missing = (self.manifest.input_shape[0] or len(group)) - len(group)
        # Fill an export's fixed batch; the copies' results are dropped.
        filled = group + group[-1:] * missing
        sizes = {
            name: _stacked([prepared.inputs[name] for prepared in filled])
            for name in group[0].inputs
        }
        batch = sizes.pop("image")
        outputs = self.run(batch, sizes) if sizes else self.run(batch)
        if self.manifest.task == "detection":
            rows, counts, *masks = outputs
            ends = np.cumsum(counts.reshape(-1))
            for prepared, end, n in zip(group, ends, counts.reshape(-1), strict=False):
                own = masks[0][end - n : end] if masks else None
                found = detections_of(rows[end - n : end], own, self.manifest.classes)
                results[prepared.place] = found
            return
        for row, prepared in enumerate(group):
            own = [o[row : row + 1] for o in outputs]
            results[prepared.place] = self._prediction(own, prepared.steps)

    def _prediction(self, outputs: list[np.ndarray], steps: list[Step]) -> Prediction:
        """From the outputs `[1, ...]` of one picture."""
        task, output_op = self.manifest.task, self.manifest.output_op
        if task == "features":
            return [o[0] for o in outputs]
        (output,) = outputs
        if task == "classification":
            return self._classification(output)
        if output_op == "argmax":
            classes = _undo(output[:, None].astype(np.float32), steps, "nearest")[0, 0]
            return classes.astype(self._label_type)
        scores = output
        if output_op == "softmax":
            # Logits but for a number per pixel, which all classes share: after interpolation the
            # same class is highest as with the logits, and as in PaddleSeg.
            scores = np.log(np.maximum(output, np.finfo(np.float32).tiny))
        return _undo(scores, steps, "bilinear")[0].argmax(axis=0).astype(self._label_type)

    def _classification(self, output: np.ndarray) -> Classification:
        probabilities = None
        if self.manifest.output_op == "argmax":
            class_id = int(output[0])
        else:
            if self.manifest.output_op == "none":
                output = softmax(output)
            probabilities = output[0].astype(np.float64)
            class_id = int(probabilities.argmax())
        names = self.manifest.classes
        return Classification(class_id, names[class_id] if names else None, probabilities)


def _zeros(task: str, shape: Sequence[int]) -> Batch:
    """The graph's inputs at a size: a black picture."""
    batch = np.zeros(shape, np.float32)
    if task != "detection":
        return batch
    sizes = np.full((shape[0], 2), shape[2:], np.float32)
    return {"image": batch, "im_shape": sizes, "scale_factor": np.ones_like(sizes)}


def _read(image: Picture, max_value: int | None = None) -> np.ndarray:
    """A picture `[H, W, 3]`, uint8, RGB, from a path or an array."""
    if isinstance(image, (str, os.PathLike)):
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
            "with numpy.stack([image] * 3, axis=-1), pass several pictures as a list. Arrays of "
            "uint16 need a max_value in deploy.yaml (that of the training data)."
        )
    return image if image.dtype == np.uint8 else scale_to_bytes(image, max_value, "image")


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    """A batch; of one array without a copy."""
    return np.stack(arrays) if len(arrays) > 1 else arrays[0][None]


def _undo(output: np.ndarray, steps: list[Step], mode: str) -> np.ndarray:
    """Bring a prediction `[1, C, H', W']` back to the picture's size, as PaddleSeg does."""
    for step in reversed(steps):
        height, width = step.before
        if step.kind == "padding":
            output = output[:, :, :height, :width]
        elif output.shape[2:] != step.before:
            # Paddle's own interpolation: OpenCV's rounds differently, which moves borders.
            output = F.interpolate(paddle.to_tensor(output), [height, width], mode=mode).numpy()
    return output
