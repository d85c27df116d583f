"""Classification under our engine: class folders or lists, and the recipe of the Pale paper.

Its config: `ppvision/tasks/classification/config.py`.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ppvision.console import track
from ppvision.data.augment import MixBatch
from ppvision.data.check.segmentation import check_pairs
from ppvision.data.check.summary import DataSummary
from ppvision.data.class_folders import ClassFolders
from ppvision.data.class_zip import ZipPath, check_zip, has_root, read_sample
from ppvision.data.training_pictures import TrainingPictures
from ppvision.deploy import Predictor, export_model
from ppvision.deploy.run import transforms as deployed
from ppvision.deploy.run.predictor import Classification as Predicted
from ppvision.deploy.write.integers import IntegerOptions, make_integer_arguments
from ppvision.deploy.write.paddlex import choose_default_name
from ppvision.engine.optimization import make_cosine_schedule, make_parameter_groups
from ppvision.engine.reading import read_in_order
from ppvision.environment import count_usable_cpus
from ppvision.errors import DataError, InputError
from ppvision.safe_yaml import Located, drop_places
from ppvision.tables import format_table
from ppvision.tasks.classification.config import (
    OPTIMIZERS,
    build_taught_transform,
    build_transform,
    check_config,
)
from ppvision.tasks.classification.teacher import Teacher, distillation_loss
from ppvision.tasks.config import ConfigError
from ppvision.tasks.job import Job
from ppvision.tasks.pictures import draw_label
from ppvision.tasks.prediction import Picture, classify_to_folder, read_pixels
from ppvision.tasks.scores import make_class_rows, replace_non_finite
from ppvision.tasks.training import count_steps
from ppvision.zoo import create_model

logger = logging.getLogger("ppvision")

EXAMPLE_SIDE = 224  # pixels of an image that represents those of a data set
PICTURES = 8  # validation samples shown in the dashboard
PICTURES_A_ROW = 4
PICTURE_SIDE = 160  # side in pixels of a shown sample


@dataclass(frozen=True)
class Scores:
    """The result of an evaluation."""

    top1: float
    top5: float | None  # 1 with five classes or fewer
    loss: float | None  # cross entropy, without label smoothing
    confusion: np.ndarray  # [K, K]: true class, predicted class

    def by_tag(self) -> dict[str, float]:
        """Return `Evaluate/top1`, ...; unknown scores are omitted."""
        found = {"top1": self.top1, "top5": self.top5, "loss": self.loss}
        return {f"Evaluate/{name}": value for name, value in found.items() if value is not None}

    def as_dict(self, names: list[str]) -> dict[str, object]:
        """Return `scores` by name and `classes`, each with its `name`, `pictures`, `recall` and
        `precision`; None for unknown values. `names` may be empty."""
        true, predicted = self.confusion.sum(1), self.confusion.sum(0)
        hits = np.diag(self.confusion)
        with np.errstate(invalid="ignore"):  # nan for a class that does not occur
            rows = make_class_rows({"recall": hits / true, "precision": hits / predicted}, names)
        means = {"top1": self.top1, "top5": self.top5, "loss": self.loss}
        return {
            "scores": {k: None if v is None else replace_non_finite(v) for k, v in means.items()},
            "classes": [
                {"name": row.pop("name"), "pictures": int(count), **row}
                for row, count in zip(rows, true, strict=True)
            ],
        }

    def table(self, names: list[str]) -> str:
        """Format the scores as text; `names` are those of the classes, or empty for numbers."""
        names = names or [str(index) for index in range(len(self.confusion))]
        true, predicted = self.confusion.sum(1), self.confusion.sum(0)
        rows: list[tuple[object, ...]] = [("class", "pictures", "recall", "precision")]
        for k, name in enumerate(names):
            recall, precision = (
                self.confusion[k, k] / total[k] if total[k] else None for total in (true, predicted)
            )
            rows.append((name, true[k], recall, precision))
        lines = [format_table(rows, "<><<")]
        if self.loss is None:
            lines.append(
                f"top1 {self.top1:.4f} (the model gives the class alone: no top5, no loss)"
            )
        else:
            lines.append(f"top1 {self.top1:.4f}  top5 {self.top5:.4f}  loss {self.loss:.4f}")
        return "\n".join(lines)


class Classification(Job):
    """One configured job.

    Args:
        content: the config, read, merged and overridden (`ppvision.tasks.open_job`).
        name: name of the config.
        allow_download: no effect, because weights are files and names of the zoo.

    Raises:
        ConfigError: an unknown key, type or argument, with the nearest valid name and its place.
    """

    task = "classification"
    content: dict
    override_keys: ClassVar[Mapping[str, str]] = {
        "batch_size": "batch_size",
        "iters": "iters",
        "epochs": "epochs",
        "learning_rate": "lr_scheduler.learning_rate",
    }
    score_tags = ("Evaluate/top1", "Evaluate/top5", "Evaluate/loss")

    def __init__(self, content: Located, name: str, *, allow_download: bool = False) -> None:
        super().__init__(name, allow_download=allow_download)
        self.config = check_config(content)
        self.content = drop_places(content)

    # -- what the config names -----------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return self.content["batch_size"]

    @cached_property
    def iters(self) -> int:
        if "iters" in self.content:
            return self.content["iters"]
        return count_steps(self.content["epochs"], self.train_dataset, self.content)

    @cached_property
    def num_classes(self) -> int:
        return self.content["model"].get("num_classes", 1000)

    @cached_property
    def float_model(self) -> nn.Layer:
        options = dict(self.content["model"])
        return create_model(options.pop("type"), **options)

    @property
    def example(self) -> Tensor:
        """Return the first image of the val split (grey if it is not on disk), in the size of the
        model's input."""
        picture = np.full((EXAMPLE_SIDE, EXAMPLE_SIDE, 3), 128, np.uint8)
        known = self.content.get("val_dataset")
        if known is not None and has_root(known["root"]):
            picture = read_sample(self.val_dataset.samples[0][0], self.max_value)
        image, _ = self._deployed(picture)  # [3, H, W]
        return paddle.to_tensor(image[None])

    @cached_property
    def _deployed(self) -> deployed.Transforms:
        return deployed.Transforms(self.content.get("val_dataset", {}).get("transforms", []))

    def make_optimizer(self, model: nn.Layer) -> paddle.optimizer.Optimizer:
        options = dict(self.content.get("optimizer", {}))
        make = OPTIMIZERS[options.pop("type", "AdamW")]
        groups = make_parameter_groups(
            model, options.pop("weight_decay", 0.0), options.pop("layer_decay", None)
        )
        schedule = asdict(self.config.lr_scheduler)
        epochs = schedule.pop("warmup_epochs")
        warmup = count_steps(epochs, self.train_dataset, self.content) if epochs else 0
        rate = make_cosine_schedule(self.iters, warmup, **schedule)
        return make(learning_rate=rate, parameters=groups, **options)

    @cached_property
    def train_dataset(self) -> TrainingPictures:
        options = self._options("train_dataset")
        build = build_taught_transform if "teacher" in self.content else build_transform
        transforms = [build(t) for t in options.pop("transforms", [])]
        side_at = self._side_at if "sizes" in self.content else None
        return TrainingPictures(
            side_at=side_at, transforms=transforms, num_classes=self.num_classes, **options
        )

    def _side_at(self, epoch: int) -> int:
        """Return the side of the images of an epoch: that of the last entry of `sizes` that has
        begun by the epoch's first step. It depends only on the config, so that a resumed run has
        the same."""
        share = epoch / self._epochs
        # Fractions such as 1/3 are rounded in a config.
        return [side for begin, side in self.content["sizes"] if begin <= share + 1e-6][-1]

    @cached_property
    def _epochs(self) -> float:
        """Return the number of passes over the training set in the whole run."""
        ranks = paddle.distributed.get_world_size()
        batches = max(1, len(self.train_dataset) // (self.batch_size * ranks))
        return self.iters * self.content.get("accumulate", 1) / batches

    @cached_property
    def teacher(self) -> Teacher | None:
        """Return the config's teacher, opened and compared with the classes of the training set."""
        if "teacher" not in self.content:
            return None
        data = self.train_dataset
        self._try_transforms()
        return Teacher(self.content["teacher"], data.classes, data.folders)

    def prepare_training(self) -> None:
        """Let the teacher answer for every training image, unless the answers exist."""
        if self.teacher is not None:
            self.train_dataset.answers = self.teacher.answers(self.train_dataset)

    def _try_transforms(self) -> None:
        """Transform the first training image, so that a crop which the teacher does not allow is an
        error before it answers for hours."""
        try:
            self.train_dataset[0]
        except DataError:
            pass  # the check of the data names every image that cannot be read
        except Exception as error:  # a transform may raise anything
            said = error if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            raise ConfigError(f"config: train_dataset.transforms: {said}") from error

    @cached_property
    def val_dataset(self) -> ClassFolders:
        """Return images as in deployment: read and transformed by the same code."""
        options = self._options("val_dataset")
        transforms = [_float, *(build_transform(t) for t in options.pop("transforms", []))]
        return ClassFolders(transforms=transforms, num_classes=self.num_classes, **options)

    def _options(self, part: str) -> dict:
        if part not in self.content:
            raise ConfigError(f"config: expected a {part}, got none.")
        return dict(self.content[part])

    @cached_property
    def class_names(self) -> list[str]:
        """Return the names of the validation or training classes, one per output; empty if the data
        are not on disk."""
        part = "val_dataset" if "val_dataset" in self.content else "train_dataset"
        if not has_root(self.content[part]["root"]):
            logger.warning(
                f"class names: no folder {self.content[part]['root']}; numbers are used instead"
            )
            return []
        names = getattr(self, part).classes
        return names if len(names) == self.num_classes else []

    @property
    def max_value(self) -> int | None:
        """Return the `max_value` of the data set for images of more than 8 bits per channel; see
        `read_picture`."""
        part = "val_dataset" if "val_dataset" in self.content else "train_dataset"
        return self.content[part].get("max_value")

    def check_data(self, *parts: str) -> dict[str, DataSummary]:
        """Decode every image of `train_dataset` / `val_dataset`.

        Returns:
            The contents of each part.

        Raises:
            DataError: there are problems (one report of all), or the classes differ.
            ConfigError: the teacher does not fit; see `Teacher`.
        """
        if "train_dataset" in parts:
            _ = self.teacher  # reports its problems before anything else takes time
        found = {}
        for part in parts:
            dataset = getattr(self, part)
            paths = [path for path, _ in dataset.samples]
            if isinstance(paths[0], ZipPath):
                checked = check_zip(part, paths, dataset.max_value)
            else:
                pairs = [(str(path), None) for path in paths]
                checked = check_pairs(part, pairs, dataset.max_value)
            pictures = Counter(label for _, label in dataset.samples)
            names = dataset.classes
            counts = [pictures[label] for label in range(max(len(names), max(pictures) + 1))]
            found[part] = DataSummary(
                checked["images"],
                checked["sizes"],
                "pictures",
                counts,
                names if len(names) == len(counts) else [],
            )
        if {"train_dataset", "val_dataset"} <= set(parts):
            ours, theirs = self.train_dataset.classes, self.val_dataset.classes
            named = "list_path" not in self.content["train_dataset"]
            if named and "list_path" not in self.content["val_dataset"] and ours != theirs:
                differ = sorted(set(ours) ^ set(theirs))
                raise ConfigError(
                    f"config: val_dataset: expected the classes of train_dataset, but "
                    f"{', '.join(differ[:10])} are in only one of the two. A class's number is "
                    "its place among the sorted folders."
                )
        return found

    # -- train ---------------------------------------------------------------------------------

    @cached_property
    def batched(self) -> MixBatch:
        temperature = 1.0 if self.teacher is None else self.teacher.temperature
        return MixBatch(self.num_classes, temperature=temperature, **asdict(self.config.loss))

    def forward(self, network: nn.Layer, batch: list[Tensor]) -> Tensor:
        return network(batch[0])

    def losses_of(self, model: nn.Layer, outputs: Tensor, batch: list[Tensor]) -> list[Tensor]:
        """Return the cross entropy with the targets `[B, K]` of `MixBatch`; with a teacher, its
        weighted part and the divergence from the teacher's answers `[B, K]`."""
        _, targets, *answers = batch
        losses = [F.cross_entropy(outputs, targets, soft_label=True)]
        if answers:
            assert self.teacher is not None  # the answers are from the teacher
            weight = self.teacher.weight
            (answer,) = answers
            distilled = distillation_loss(outputs, answer, self.teacher.temperature)
            losses = [(1 - weight) * losses[0], weight * distilled]
        return losses

    def pictures(self, model: nn.Layer) -> dict[str, np.ndarray]:
        """Return one panel: fixed validation samples with their class and the predicted class."""
        chosen = np.linspace(0, len(self.val_dataset) - 1, min(PICTURES, len(self.val_dataset)))
        names = self.val_dataset.classes
        tiles = []
        for index in chosen.astype(int):
            path, label = self.val_dataset.samples[index]
            image = read_sample(path, self.max_value)
            predicted = self.predict_image(model, image).class_id
            shown = names[predicted] if predicted < len(names) else str(predicted)
            tiles.append(draw_label(image, PICTURE_SIDE, names[label], shown))
        tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % PICTURES_A_ROW)
        rows = [
            np.concatenate(tiles[k : k + PICTURES_A_ROW], axis=1)
            for k in range(0, len(tiles), PICTURES_A_ROW)
        ]
        return {"samples": np.concatenate(rows, axis=0)}

    # -- evaluate ------------------------------------------------------------------------------

    @paddle.no_grad()
    def evaluate(self, model: nn.Layer, *, num_workers: int = 0) -> Scores:
        """Score a model on the val split; several ranks share the images and sum the results.

        Args:
            model: gives logits `[B, K]`.
            num_workers: processes that read images; 0 reads in this one.

        Raises:
            ConfigError: images of different sizes in one batch.
        """
        model.eval()
        rank, world = paddle.distributed.get_rank(), paddle.distributed.get_world_size()
        mine = range(rank, len(self.val_dataset), world)
        totals = _Totals(self.num_classes)
        # Not Paddle's loader, because it hangs when a sample raises.
        starts = range(0, len(mine), self.batch_size)
        with read_in_order(self.val_dataset.__getitem__, mine, num_workers) as samples:
            for _ in track(starts, "eval", unit="batch", hidden=rank > 0):
                batch = list(itertools.islice(samples, self.batch_size))
                shapes = {image.shape for image, _ in batch}
                if len(shapes) > 1:
                    raise ConfigError(
                        "config: val_dataset.transforms: expected images of one size, got "
                        f"{' and '.join(f'{s[2]}x{s[1]}' for s in sorted(shapes)[:2])} (width x "
                        "height). End with Resize, or ResizeByShort and CenterCrop."
                    )
                images, labels = (np.stack(part) for part in zip(*batch, strict=True))
                totals.add(model(paddle.to_tensor(images)), paddle.to_tensor(labels))
        return totals.over_ranks().scores()

    def calibration_pictures(self) -> list[Path | ZipPath]:
        return [path for path, _ in self.train_dataset.samples]

    def evaluate_exported(
        self, model_dir: str | Path, *, device: str = "cpu", precision: str = "auto"
    ) -> Scores:
        """Score an exported model on the val split, through Paddle Inference.

        Raises:
            ConfigError: the export has another task or number of classes.

        An "argmax" export gives only the class: then only top1 is known.
        """
        predictor = Predictor(
            model_dir, threads=count_usable_cpus(), device=device, precision=precision
        )
        manifest = predictor.manifest
        if (manifest.task, manifest.num_classes) != (self.task, self.num_classes):
            raise ConfigError(
                f"eval --model_dir: expected a classification model of {self.num_classes} classes, "
                f"got {manifest.task} of {manifest.num_classes} in {model_dir}."
            )
        totals = _Totals(self.num_classes)
        for path, label in track(self.val_dataset.samples, "eval"):
            found = predictor(read_sample(path, self.max_value))
            if found.probabilities is None:
                totals.confusion[label, found.class_id] += 1
            else:
                scores = np.log(np.maximum(found.probabilities, np.finfo(np.float32).tiny))
                totals.add(paddle.to_tensor(scores[None], "float32"), paddle.to_tensor([label]))
        scores = totals.scores()
        if manifest.output_op == "argmax":
            return replace(scores, top5=None, loss=None)
        return scores

    # -- predict and export --------------------------------------------------------------------

    @paddle.no_grad()
    def predict_image(self, model: nn.Layer, picture: Picture) -> Predicted:
        """Return the class of one image, with the transforms of `evaluate`.

        Args:
            model: gives logits `[B, K]`.
            picture: a path, or pixels `[H, W, 3]` uint8 RGB.

        Raises:
            DataError: the file cannot be read.
        """
        image, _ = self._deployed(read_pixels(picture, self.max_value))  # [3, H, W]
        model.eval()
        shares = F.softmax(model(paddle.to_tensor(image[None])), axis=-1).numpy()[0]
        k = int(shares.argmax())
        names = self.class_names
        return Predicted(k, names[k] if names else None, shares.astype(np.float64))

    @property
    def writer(self) -> Callable[..., list[str]]:
        return partial(classify_to_folder, class_names=self.class_names)

    def export(
        self,
        model: nn.Layer,
        folder: str | Path,
        *,
        input_shape: list[int | None],
        output_op: str | None,
        model_format: str,
        bits: int = 32,
        integers: IntegerOptions | None = None,
        paddlex_name: str | None = None,
    ) -> Path:
        """Write the model for deployment; see `ppvision.deploy.export_model`."""
        return export_model(
            model,
            folder,
            input_shape=input_shape,
            output_op=output_op or ("argmax" if paddlex_name is None else "softmax"),
            format=model_format,
            transforms=self._options("val_dataset").get("transforms", []),
            classes=self.class_names,
            task=self.task,
            bits=bits,
            max_value=self.max_value,
            paddlex_name=paddlex_name,
            **make_integer_arguments(integers),
        )

    @property
    def paddlex_name(self) -> str:
        return choose_default_name("classification", self.content["model"]["type"])


class _Totals:
    """The sums over the images of an evaluation.

    Args:
        num_classes: number of classes K.
    """

    def __init__(self, num_classes: int) -> None:
        self.confusion = np.zeros((num_classes, num_classes), np.float64)
        self.in_top5 = 0.0
        self.loss = 0.0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: `[B, K]` and `[B]`."""
        ranked = logits.topk(min(5, logits.shape[1]), axis=1)[1]  # [B, 5]
        self.in_top5 += float((ranked == labels.unsqueeze(1)).astype("int64").sum())
        self.loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        np.add.at(self.confusion, (labels.numpy(), ranked[:, 0].numpy()), 1)

    def over_ranks(self) -> "_Totals":
        """Sum over all ranks."""
        if paddle.distributed.get_world_size() > 1:
            flat = paddle.to_tensor([self.in_top5, self.loss, *self.confusion.ravel()], "float64")
            paddle.distributed.all_reduce(flat)
            self.in_top5, self.loss, *confusion = flat.tolist()
            self.confusion = np.reshape(confusion, self.confusion.shape)
        return self

    def scores(self) -> Scores:
        count = max(1.0, self.confusion.sum())
        return Scores(
            top1=float(np.trace(self.confusion) / count),
            top5=self.in_top5 / count,
            loss=self.loss / count,
            confusion=self.confusion.astype(np.int64),
        )


def _float(image: np.ndarray) -> np.ndarray:
    """Convert to float32 before the first transform, as in deployment."""
    return image.astype(np.float32)
