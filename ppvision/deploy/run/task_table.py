"""The meaning of `task` in a `deploy.yaml`: the inputs and outputs of the graph, and how they are
read.

`TASKS` is the table of all tasks. A new task is a subclass of `DeployedTask` and an entry in this
table. Then `deploy.yaml` accepts its name, `Predictor` runs it, and exports name its outputs. No
other module compares names of tasks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import paddle
import paddle.nn.functional as F

from ppvision.deploy.run.detection_transforms import DetectionTransforms
from ppvision.deploy.run.detections import Detections, collect_detections
from ppvision.deploy.run.transforms import CenterCrop, Step, Transforms
from ppvision.errors import InputError, shorten

if TYPE_CHECKING:
    from ppvision.deploy.run.engines import Batch
    from ppvision.deploy.run.manifest import Manifest

Specs = Sequence[Mapping[str, Any]]  # the transforms of a `deploy.yaml`


@dataclass(frozen=True)
class Classification:
    """The class of one image."""

    class_id: int
    name: str | None  # None if the export has no names of classes
    probabilities: np.ndarray | None  # [K], float64; None if the graph gives only the class


Prediction = np.ndarray | Classification | Detections | list[np.ndarray]


class DeployedTask(ABC):
    """One task.

    Attributes:
        name: in `deploy.yaml`.
        output_ops: the operators that may end its graphs (`output_op`).
        has_classes: whether its graphs give classes, so that `deploy.yaml` says how many.
    """

    name: ClassVar[str]
    output_ops: ClassVar[tuple[str, ...]]
    has_classes: ClassVar[bool] = True

    @abstractmethod
    def name_outputs(self, output_op: str, count: int) -> list[str]:
        """Return names of a graph's `count` outputs, in order."""

    @abstractmethod
    def build_transforms(
        self, specs: Specs, *, as_paddlex: bool = False
    ) -> Transforms | DetectionTransforms:
        """Make the transforms of a `deploy.yaml`; `as_paddlex`: see `Transforms`.

        Raises:
            InputError: a transform is unknown, or does not fit the task.
        """

    @abstractmethod
    def prepare(
        self, transforms: Callable[[np.ndarray], Any], image: np.ndarray
    ) -> tuple[dict[str, np.ndarray], list[Step]]:
        """Return the graph's inputs for one image, without the batch axis, and the changes of size
        to undo on the prediction."""

    def check_sizes(self, sizes: object, batch: int) -> None:
        """Raise `InputError` for sizes of images that the graph does not accept; None always
        fits."""
        if sizes is not None:
            raise InputError(f"sizes: expected none for task {self.name}, got {shorten(sizes)}.")

    def inputs(self, batch: np.ndarray, sizes: Mapping[str, np.ndarray] | None = None) -> "Batch":
        """Return all inputs of the graph for images `[B, C, H, W]`."""
        return batch

    @abstractmethod
    def fits(self, outputs: Sequence[np.ndarray], manifest: "Manifest", batch: int) -> bool:
        """Whether outputs have the number, shapes and values that `deploy.yaml` promises."""

    @abstractmethod
    def read(
        self,
        outputs: Sequence[np.ndarray],
        steps: Sequence[list[Step]],
        manifest: "Manifest",
    ) -> Sequence[Prediction]:
        """Return the predictions for the first images of a batch, one for each entry of `steps`."""


# -- tasks of models that return tensors -----------------------------------------------------------


class TensorTask(DeployedTask):
    """A task of models that return tensors `[B, ...]`, for `export_model`.

    Attributes:
        every_output: whether a graph keeps all outputs of the model; otherwise only the first.
        client_op: the `output_op` of exports that PaddleSeg's own clients can run; None: they run
            no export of this task.
    """

    every_output: ClassVar[bool] = False
    client_op: ClassVar[str | None] = None

    def build_transforms(self, specs: Specs, *, as_paddlex: bool = False) -> Transforms:
        return Transforms(specs, as_paddlex=as_paddlex)

    def prepare(
        self, transforms: Callable[[np.ndarray], Any], image: np.ndarray
    ) -> tuple[dict[str, np.ndarray], list[Step]]:
        x, steps = transforms(image)
        return {"image": x}, steps

    def fits(self, outputs: Sequence[np.ndarray], manifest: "Manifest", batch: int) -> bool:
        return all(output.ndim and len(output) == batch for output in outputs)

    def read(
        self,
        outputs: Sequence[np.ndarray],
        steps: Sequence[list[Step]],
        manifest: "Manifest",
    ) -> Sequence[Prediction]:
        return [
            self.read_one([o[row : row + 1] for o in outputs], own, manifest)
            for row, own in enumerate(steps)
        ]

    @abstractmethod
    def read_one(
        self, outputs: list[np.ndarray], steps: list[Step], manifest: "Manifest"
    ) -> Prediction:
        """Return the prediction for one image from the outputs `[1, ...]`."""

    def check_logits(self, logits: np.ndarray, output_op: str, classes: Sequence[str]) -> None:
        """Raise `InputError` if a model's first output does not fit the arguments of the export."""


class Features(TensorTask):
    """The feature maps of a backbone."""

    name = "features"
    output_ops = ("none",)
    has_classes = False
    every_output = True

    def name_outputs(self, output_op: str, count: int) -> list[str]:
        return [f"features_{place}" for place in range(count)]

    def read_one(
        self, outputs: list[np.ndarray], steps: list[Step], manifest: "Manifest"
    ) -> list[np.ndarray]:
        return [o[0] for o in outputs]


class ClassTask(TensorTask):
    """A task with one output: the logits of classes, or the result of `output_op` on them.

    Attributes:
        logit_axes: axes of the logits, for errors.
    """

    output_ops = ("argmax", "softmax", "none")
    logit_axes: ClassVar[str]

    def name_outputs(self, output_op: str, count: int) -> list[str]:
        return [{"argmax": "labels", "softmax": "scores", "none": "logits"}[output_op]]

    @property
    def _axes(self) -> int:
        return self.logit_axes.count(",") + 1

    def fits(self, outputs: Sequence[np.ndarray], manifest: "Manifest", batch: int) -> bool:
        if len(outputs) != 1 or not super().fits(outputs, manifest, batch):
            return False
        (output,), classes = outputs, manifest.num_classes
        assert classes is not None  # `Manifest` is checked: see `has_classes`
        if manifest.output_op == "argmax":
            is_class = np.issubdtype(output.dtype, np.integer) and output.size > 0
            right = is_class and output.ndim == self._axes - 1
            return bool(right and output.min() >= 0 and output.max() < classes)
        return output.ndim == self._axes and output.shape[1] == classes

    def check_logits(self, logits: np.ndarray, output_op: str, classes: Sequence[str]) -> None:
        if logits.ndim != self._axes:
            raise InputError(
                f"model: expected logits {self.logit_axes} for task {self.name!r}, got "
                f"{list(logits.shape)}."
            )
        if output_op == "argmax" and logits.shape[1] < 2:
            raise InputError(
                "output_op: argmax needs at least 2 classes, the model has 1. Pass 'none'."
            )
        if len(classes) not in (0, logits.shape[1]):
            raise InputError(
                f"classes: expected {logits.shape[1]} names, one per logit, got {len(classes)}."
            )


class ClassifiedPicture(ClassTask):
    """One class per image."""

    name = "classification"
    logit_axes = "[B, K]"

    def read_one(
        self, outputs: list[np.ndarray], steps: list[Step], manifest: "Manifest"
    ) -> Classification:
        (output,) = outputs
        probabilities = None
        if manifest.output_op == "argmax":
            class_id = int(output[0])
        else:
            if manifest.output_op == "none":
                output = softmax(output)
            probabilities = output[0].astype(np.float64)
            class_id = int(probabilities.argmax())
        names = manifest.classes
        return Classification(class_id, names[class_id] if names else None, probabilities)


class Segmentation(ClassTask):
    """One class per pixel."""

    name = "segmentation"
    logit_axes = "[B, K, H, W]"
    client_op = "argmax"

    def build_transforms(self, specs: Specs, *, as_paddlex: bool = False) -> Transforms:
        transforms = Transforms(specs, as_paddlex=as_paddlex)
        if any(isinstance(t, CenterCrop) for t in transforms.transforms):
            raise InputError(
                "transforms: CenterCrop leaves parts of the image without a class; expected none "
                f"for {self.name}. Resize or pad instead."
            )
        return transforms

    def read_one(
        self, outputs: list[np.ndarray], steps: list[Step], manifest: "Manifest"
    ) -> np.ndarray:
        (output,) = outputs
        label_type = np.uint8 if (manifest.num_classes or 0) <= 256 else np.int32
        if manifest.output_op == "argmax":
            classes = _undo(output[:, None].astype(np.float32), steps, "nearest")[0, 0]
            return classes.astype(label_type)
        scores = output
        if manifest.output_op == "softmax":
            # These equal the logits up to a number per pixel that all classes share. After
            # interpolation the same class is highest as with the logits, and as in PaddleSeg.
            scores = np.log(np.maximum(output, np.finfo(np.float32).tiny))
        return _undo(scores, steps, "bilinear")[0].argmax(axis=0).astype(label_type)


# -- detectors -------------------------------------------------------------------------------------

_SIZES = ("im_shape", "scale_factor")  # inputs of a detector


class Detection(DeployedTask):
    """Objects with their boxes, and masks if the graph has masks."""

    name = "detection"
    output_ops = ("nms",)

    def name_outputs(self, output_op: str, count: int) -> list[str]:
        return ["boxes", "counts", "masks"][:count]

    def build_transforms(self, specs: Specs, *, as_paddlex: bool = False) -> DetectionTransforms:
        return DetectionTransforms(specs, as_paddlex=as_paddlex)

    def prepare(
        self, transforms: Callable[[np.ndarray], Any], image: np.ndarray
    ) -> tuple[dict[str, np.ndarray], list[Step]]:
        return transforms(image), []  # the graph itself scales boxes to the size of the image

    def check_sizes(self, sizes: object, batch: int) -> None:
        fits = sizes is None or (
            isinstance(sizes, Mapping)
            and all(
                name in _SIZES
                and isinstance(array, np.ndarray)
                and (array.dtype, array.shape) == (np.float32, (batch, 2))
                for name, array in sizes.items()
            )
        )
        if not fits:
            raise InputError(
                f"sizes: expected {' and '.join(_SIZES)}, float32 arrays [{batch}, 2], got "
                f"{shorten(sizes)}."
            )

    def inputs(self, batch: np.ndarray, sizes: Mapping[str, np.ndarray] | None = None) -> "Batch":
        count, _, height, width = batch.shape
        whole = {
            "im_shape": np.full((count, 2), (height, width), np.float32),
            "scale_factor": np.ones((count, 2), np.float32),
        }
        return {"image": batch, **whole, **(sizes or {})}

    def fits(self, outputs: Sequence[np.ndarray], manifest: "Manifest", batch: int) -> bool:
        if len(outputs) not in (2, 3):
            return False
        rows, counts, *masks = outputs
        return bool(
            rows.ndim == 2
            and rows.shape[1] == 6
            and counts.size == batch
            and counts.sum() == len(rows)
            and all(m.ndim == 3 and len(m) == len(rows) for m in masks)
        )

    def read(
        self,
        outputs: Sequence[np.ndarray],
        steps: Sequence[list[Step]],
        manifest: "Manifest",
    ) -> list[Detections]:
        rows, counts, *masks = outputs
        ends = np.cumsum(counts.reshape(-1))
        found = []
        for end, n in zip(ends[: len(steps)], counts.reshape(-1), strict=False):
            own = masks[0][end - n : end] if masks else None
            found.append(collect_detections(rows[end - n : end], own, manifest.classes))
        return found


TASKS: dict[str, DeployedTask] = {
    task.name: task for task in (Segmentation(), ClassifiedPicture(), Features(), Detection())
}
# The tasks of `export_model`; detectors have their own exporter.
TENSOR_TASKS = {name: task for name, task in TASKS.items() if isinstance(task, TensorTask)}


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities `[B, K, ...]` in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exponents = np.exp(shifted)
    return exponents / exponents.sum(axis=1, keepdims=True)


def _undo(output: np.ndarray, steps: list[Step], mode: str) -> np.ndarray:
    """Scale a prediction `[1, C, H', W']` back to the image's size, as PaddleSeg does."""
    for step in reversed(steps):
        height, width = step.before
        if step.kind == "padding":
            output = output[:, :, :height, :width]
        elif output.shape[2:] != step.before:
            # Paddle's own interpolation: OpenCV rounds differently, which moves borders.
            output = F.interpolate(paddle.to_tensor(output), [height, width], mode=mode).numpy()
    return output
