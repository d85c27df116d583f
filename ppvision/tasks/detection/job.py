"""Detection: PaddleDetection's architectures, data, losses and metrics under our engine.

Configs are PaddleDetection's (`ppvision.tasks.detection.config`). Training uses its data set, the
transforms of its readers, its learning rate, optimizer and losses. Scores are those of its
`Trainer`.
"""

import fnmatch
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import paddle
from paddle import Tensor, nn

from ppvision.data.check.coco import check_coco
from ppvision.data.check.summary import DataSummary
from ppvision.data.check.voc import check_voc
from ppvision.data.coco_reading import read_category_names
from ppvision.data.listing import name_results
from ppvision.data.pictures import read_picture
from ppvision.data.text import read_names
from ppvision.deploy import Predictor
from ppvision.deploy.run.detections import Detections, collect_detections
from ppvision.deploy.write.detection_export import export_detector
from ppvision.deploy.write.integers import IntegerOptions, has_integers, make_integer_arguments
from ppvision.deploy.write.paddlex import choose_default_name
from ppvision.environment import count_usable_cpus
from ppvision.errors import DataError, shorten
from ppvision.plugins.libraries import load_safely, wrap_errors
from ppvision.safe_yaml import Located, drop_places, format_yaml
from ppvision.tasks.config import ConfigError
from ppvision.tasks.detection.config import activate, check_config, list_components
from ppvision.tasks.detection.evaluation import ExportedDetector, evaluate_by_trainer
from ppvision.tasks.detection.layer import DetectorLayer
from ppvision.tasks.detection.scores import Scores
from ppvision.tasks.job import Job, drop_paths, make_example_input
from ppvision.tasks.pictures import draw_detections, join_side_by_side
from ppvision.tasks.prediction import Picture, detect_to_folder, read_pixels
from ppvision.tasks.training import count_steps
from ppvision.zoo.weights import rename_for_sdn

# isort: split
from ppdet.core.workspace import create
from ppdet.data.reader import BatchCompose, Compose
from ppdet.data.source.coco import COCODataSet
from ppdet.data.source.voc import VOCDataSet

logger = logging.getLogger("ppvision")

EXAMPLE_SIDE = 128  # pixels of the image that shows which layers run
EPOCH = "epoch_id"  # PaddleDetection's name for it in a batch
PICTURES = 4  # validation samples shown in the dashboard
SHOWN_SCORE = 0.3  # lowest score of a box that is drawn in the dashboard
# Layers in PaddleDetection's heads whose outputs are classes and boxes.
RESULT_LAYERS = (
    *("*pred_cls*", "*pred_reg*", "*bbox_score*", "*bbox_delta*", "*rpn_rois_*"),
    *("*mask_fcn_logits", "*retina_cls", "*retina_reg", "*fcos_head_cls"),
    *("*fcos_head_reg", "*fcos_head_centerness"),
)
# Steps of a TestReader that read the file; `_decoded` replaces them.
READING = (["Decode"], ["DecodeCache"])
TWO_STAGES = ("FasterRCNN", "MaskRCNN", "CascadeRCNN")
# These process images in a loop, which is unrolled when a graph is written.
ONE_BY_ONE = (*TWO_STAGES, "RetinaNet")


class Samples(paddle.io.Dataset):
    """A data set of PaddleDetection, read and transformed, with names of its files.

    Args:
        dataset: parsed data set with its transforms.

    Attributes:
        samples: `(path,)` of each sample.
    """

    def __init__(self, dataset: paddle.io.Dataset) -> None:
        super().__init__()
        self.dataset = dataset
        self.samples = [(roidb["im_file"],) for roidb in dataset.roidbs] * dataset.repeat
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, because some transforms end after a number of epochs."""
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {**self.dataset[index], EPOCH: np.int64(self.epoch)}

    def __len__(self) -> int:
        return len(self.dataset)


class Detection(Job):
    """One configured job.

    Args:
        content: the config, read, merged and overridden (`ppvision.tasks.open_job`).
        name: name of the config.
        iters: ends the training early; the learning rate follows the config's epochs. Default None.
        allow_download: download `pretrained` weights of PaddleDetection's components from a URL.

    Raises:
        ConfigError: an unknown key, component, transform or argument, with the nearest valid name
            and its place.
    """

    task = "detection"
    takes_tags = True
    content: dict
    override_keys: ClassVar[Mapping[str, str]] = {
        "batch_size": "TrainReader.batch_size",
        "epochs": "epoch",
        "learning_rate": "LearningRate.base_lr",
    }
    has_logits = False  # PaddleDetection's architectures return their losses

    def __init__(
        self,
        content: Located,
        name: str,
        *,
        iters: int | None = None,
        allow_download: bool = False,
    ) -> None:
        super().__init__(name, allow_download=allow_download)
        check_config(content)
        self.located = content
        self.content = drop_places(content)
        self._iters = iters

    # -- what the config names -----------------------------------------------------------------

    @property
    def score_tags(self) -> tuple[str, ...]:
        if self.content["metric"] == "VOC":
            return ("Evaluate/bbox_mAP",)
        kinds = ("bbox", "mask") if self._has_masks else ("bbox",)
        return tuple(f"Evaluate/{kind}_{name}" for kind in kinds for name in ("AP", "AP50", "AP75"))

    @property
    def _has_masks(self) -> bool:
        return bool(self.content.get(self.content["architecture"], {}).get("mask_head"))

    @property
    def config_text(self) -> str:
        """Return the resolved config for PaddleDetection, with its tags."""
        return format_yaml(self.located)

    def _activated(self) -> dict:
        """Return PaddleDetection's global config, activated for this job."""
        cfg = activate(self.located, self.name)
        cfg.setdefault("worker_num", 0)
        cfg.setdefault("log_iter", 50)
        cfg.setdefault("snapshot_epoch", 1)
        cfg.setdefault("map_type", "11point")
        for device in ("use_gpu", "use_npu", "use_mlu", "use_xpu"):
            cfg[device] = device == "use_gpu" and paddle.is_compiled_with_cuda()
        return cfg

    @property
    def batch_size(self) -> int:
        return self.content["TrainReader"].get("batch_size", 1)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Return the number of optimiser steps."""
        batching = {
            "batch_size": self.batch_size,
            "accumulate": self.content.get("accumulate", 1),
        }
        return count_steps(1, self.train_dataset, batching)

    @property
    def iters(self) -> int:
        return self._iters or self.content["epoch"] * self.steps_per_epoch

    @cached_property
    def float_model(self) -> nn.Layer:
        model = self._create(self.content["architecture"])
        model.load_meanstd(self._activated()["TestReader"]["sample_transforms"])
        return model

    def _create(self, name: str, *arguments: object) -> Any:
        """Build a component of the config by PaddleDetection, with `arguments` if there are any.

        Its config is a global variable, which an earlier build or another job may have changed. So
        ours is set again before each build.
        """
        self._activated()
        with load_safely(self.allow_download), wrap_errors(f"config: {name}"):
            made = create(name)
            return made(*arguments) if arguments else made

    def make_optimizer(self, model: nn.Layer) -> paddle.optimizer.Optimizer:
        rate = self._create("LearningRate", self.steps_per_epoch)
        return self._create("OptimizerBuilder", rate, model)

    @cached_property
    def _train_reader(self) -> Any:
        return self._create("TrainReader")

    @cached_property
    def train_dataset(self) -> Samples:
        return Samples(self._read_by(self._train_reader, "TrainDataset"))

    def _read_by(self, reader: Any, part: str) -> paddle.io.Dataset:
        """Make one of the config's data sets, with a reader's transforms.

        PaddleDetection's readers also have their own loader. It is not started, because it would
        draw random numbers in addition to our engine's, and hangs when a sample raises.
        """
        dataset = self._dataset(part)
        if part == "EvalDataset":
            dataset.allow_empty = True  # objects that are found in images without objects count too
        with wrap_errors(f"config: {part}"):
            dataset.parse_dataset()
        dataset.set_transform(reader._sample_transforms)
        dataset.set_kwargs(**reader.kwargs)
        return dataset

    @property
    def example(self) -> dict[str, Tensor]:
        """Return an image in the form for the architectures."""
        sizes = paddle.full([1, 2], float(EXAMPLE_SIDE))
        image = make_example_input(3, EXAMPLE_SIDE)
        return {"image": image, "im_shape": sizes, "scale_factor": paddle.ones([1, 2])}

    @property
    def result_layers(self) -> Sequence[str]:
        names = [
            name for name, layer in self.float_model.named_sublayers() if not layer.sublayers()
        ]
        return [n for n in names if any(fnmatch.fnmatch(n, known) for known in RESULT_LAYERS)]

    @property
    def constant_layers(self) -> Sequence[str]:
        """Return layers that PaddleDetection marks as not to be quantised and that do not learn:
        PP-YOLOE's `proj_conv` contains the numbers 0 to 16."""
        return [
            name
            for name, layer in self.float_model.named_sublayers()
            if getattr(layer, "skip_quant", False)
            and all(p.stop_gradient for p in layer.parameters())
        ]

    @property
    def architecture(self) -> dict[str, object]:
        known = list_components()
        readers = ("TrainReader", "EvalReader", "TrainDataset", "EvalDataset", "TestDataset")
        training = ("LearningRate", "OptimizerBuilder", *readers, "TestReader")
        parts = {k: v for k, v in self.content.items() if k in known and k not in training}
        shared = ("architecture", "num_classes", "norm_type", "depth_mult", "width_mult")
        return {
            "task": self.task,
            "model": drop_paths(parts | {k: self.content[k] for k in shared if k in self.content}),
            "transforms": self._transforms(),
            "classes": list(self.class_names),
        }

    def fitting(
        self, arrays: Mapping[str, np.ndarray]
    ) -> tuple[Mapping[str, np.ndarray], list[str]]:
        """Read weights, also those of the same model without SDN; SDN then starts without
        effect."""
        return rename_for_sdn(self.float_model, arrays)

    @cached_property
    def class_names(self) -> list[str]:
        """Return the class names of the evaluation or training set; empty if its file does not
        exist."""
        part = "EvalDataset" if "EvalDataset" in self.content else "TrainDataset"
        dataset = self._dataset(part)
        voc = isinstance(dataset, VOCDataSet)
        inside = dataset.label_list if voc else dataset.anno_path
        path = Path(dataset.dataset_dir, inside or "")
        if not path.is_file():
            logger.warning(f"class names: no file {path}; numbers are used instead")
            return []
        return read_names(path) if voc else read_category_names(path)

    @property
    def max_value(self) -> int | None:
        """Return the `max_value` of the data set for images of more than 8 bits per channel; see
        `read_picture`."""
        part = "EvalDataset" if "EvalDataset" in self.content else "TrainDataset"
        return self.content[part].get("max_value")

    def _dataset(self, part: str) -> paddle.io.Dataset:
        if part not in self.content:
            raise ConfigError(f"config: detection: expected {shorten(part)}, got none.")
        self._activated()
        with wrap_errors(f"config: {part}"):
            dataset = create(part)()
        # Objects without a mask are omitted from training and evaluation
        # (`plugins.paddledet_data`).
        dataset.needs_masks = self._has_masks or "gt_poly" in dataset.data_fields
        return dataset

    def check_data(self, *parts: str) -> dict[str, DataSummary]:
        """Check annotations and images of `train_dataset` / `val_dataset`.

        Returns:
            The contents of each part in COCO's or Pascal VOC's format; others are not checked.

        Raises:
            DataError: one report of all problems.
        """
        known: dict[str, Sequence[str]] = {}
        found = {}
        for name in parts:
            part = {"train_dataset": "TrainDataset", "val_dataset": "EvalDataset"}[name]
            if part == "EvalDataset" and "EvalReader" not in self.content:
                raise ConfigError("config: detection: expected 'EvalReader' to evaluate, got none.")
            dataset = self._dataset(part)
            root, fields = Path(dataset.dataset_dir or "."), dataset.data_fields
            if isinstance(dataset, (COCODataSet, VOCDataSet)) and not dataset.anno_path:
                raise ConfigError(f"config: {part}: expected anno_path, got none.")
            if isinstance(dataset, COCODataSet):
                files = Path(dataset.get_anno()), root / dataset.image_dir
                if part == "TrainDataset" and self._has_masks and "gt_poly" not in fields:
                    raise ConfigError(
                        f"config: {part}: expected gt_poly among data_fields, which the mask head "
                        f"learns from, got {fields}."
                    )
                found[name] = check_coco(
                    part,
                    *files,
                    self.content["num_classes"],
                    masks=dataset.needs_masks,
                    max_value=dataset.max_value,
                )
                known[part] = found[name].names
            elif isinstance(dataset, VOCDataSet):
                missing = {"gt_bbox", "gt_class", "difficult"} - set(dataset.data_fields)
                if not dataset.label_list or (part == "EvalDataset" and missing):
                    raise ConfigError(
                        f"config: {part}: expected label_list, and data_fields with gt_bbox, "
                        "gt_class and difficult to evaluate."
                    )
                files = root / dataset.anno_path, root / dataset.image_dir
                labels = root / dataset.label_list
                count = self.content["num_classes"]
                found[name] = check_voc(part, *files, labels, count, dataset.max_value)
        if len(known) == 2 and known["TrainDataset"] != known["EvalDataset"]:
            raise DataError(
                "EvalDataset: expected the categories of TrainDataset, in the same order: "
                f"{known['TrainDataset']}, got {known['EvalDataset']}."
            )
        return found

    # -- train ---------------------------------------------------------------------------------

    @property
    def batched(self) -> Callable[[list], dict]:
        return self._collate

    def _collate(self, samples: list[dict]) -> dict:
        epochs = [sample.pop(EPOCH) for sample in samples]
        with wrap_errors("config: TrainReader.batch_transforms"):
            return {**self._train_reader._batch_transforms(samples), EPOCH: epochs[0]}

    def forward(self, network: nn.Layer, batch: dict) -> dict[str, Tensor]:
        batch[EPOCH] = int(batch[EPOCH])
        with wrap_errors("training step"):
            return network(batch)

    def losses_of(self, model: nn.Layer, outputs: dict[str, Tensor], batch: dict) -> list[Tensor]:
        """Return PaddleDetection's sum of all losses."""
        return [outputs["loss"]]

    # -- evaluate ------------------------------------------------------------------------------

    def evaluate(self, model: nn.Layer, *, num_workers: int = 0) -> Scores:
        """Score a model on the EvalDataset by PaddleDetection's `Trainer`; each rank scores all.

        Args:
            model: model of this job's architecture.
            num_workers: processes that read images; 0 reads in this one.

        Raises:
            ConfigError: there is no EvalDataset or EvalReader.
        """
        return self._scored(lambda dataset: model, num_workers)

    def calibration_pictures(self) -> list[Path]:
        return [Path(path) for (path,) in self.train_dataset.samples]

    def evaluate_exported(
        self, model_dir: str | Path, *, device: str = "cpu", precision: str = "auto"
    ) -> Scores:
        """Score an exported model on the EvalDataset, through Paddle Inference.

        Raises:
            ConfigError: there is no EvalDataset or EvalReader, or the export has another task or
                number of classes.
        """
        predictor = Predictor(
            model_dir, threads=count_usable_cpus(), device=device, precision=precision
        )
        manifest = predictor.manifest
        if (manifest.task, manifest.num_classes) != (self.task, self.content["num_classes"]):
            raise ConfigError(
                f"eval --model_dir: expected a detector of {self.content['num_classes']} classes, "
                f"got {manifest.task} of {manifest.num_classes} in {model_dir}."
            )
        if manifest.classes and self.class_names not in ([], manifest.classes):
            raise ConfigError(
                f"eval --model_dir: expected the classes of {model_dir}, {manifest.classes}, got "
                f"{self.class_names}."
            )
        return self._scored(lambda dataset: ExportedDetector(predictor, dataset))

    def _scored(
        self, model_for: Callable[[paddle.io.Dataset], nn.Layer], num_workers: int = 0
    ) -> Scores:
        for part in ("EvalDataset", "EvalReader"):
            if part not in self.content:
                raise ConfigError(
                    f"config: detection: expected {shorten(part)} to evaluate, got none."
                )
        reader = self._create("EvalReader")
        dataset = self._read_by(reader, "EvalDataset")
        kinds = ("bbox", "mask") if self._has_masks else ("bbox",)
        with wrap_errors("evaluation"):
            model = model_for(dataset)
            return evaluate_by_trainer(
                self._activated(), model, dataset, reader, kinds, num_workers
            )

    # -- predict -------------------------------------------------------------------------------

    def _transforms(self) -> list[dict]:
        """Return PaddleDetection's transforms for prediction."""
        reader = self.content["TestReader"]
        return [*reader.get("sample_transforms", []), *reader.get("batch_transforms", [])]

    @cached_property
    def _reading(self) -> tuple[Compose, BatchCompose]:
        """Return the TestReader's transforms for pixels and batches, without reading the image."""
        self._activated()
        reader, classes = self.content["TestReader"], self.content["num_classes"]
        transforms = reader.get("sample_transforms", [])
        of_pixels = [step for step in transforms if list(step) not in READING]
        batched = reader.get("batch_transforms", [])
        with wrap_errors("config: TestReader"):
            return Compose(of_pixels, classes), BatchCompose(batched, classes)

    @paddle.no_grad()
    def predict_image(self, model: nn.Layer, picture: Picture) -> Detections:
        """Return the objects that a model finds in one image, with the transforms of the
        TestReader.

        Args:
            model: PaddleDetection's architecture.
            picture: a path, or pixels `[H, W, 3]` uint8 RGB.

        Raises:
            DataError: the file cannot be read, or the image is too narrow to be resized.
        """
        image = read_pixels(picture, self.max_value)
        transform, batched = self._reading
        try:
            sample = transform({"im_id": np.array([0]), "curr_iter": 0, **_decoded(image)})
        except cv2.error as error:
            height, width = image.shape[:2]
            name = f"{width}x{height} pixels" if picture is image else picture
            raise DataError(
                f"{name}: cannot be resized as the TestReader says ({error.err}). Crop or pad it."
            ) from error
        model.eval()
        with wrap_errors("prediction"):
            batch = batched([sample])
            found = model({key: paddle.to_tensor(batch[key]) for key in self.example})
        masks = found["mask"].numpy() if "mask" in found else None
        return collect_detections(found["bbox"].numpy(), masks, self.class_names)

    @property
    def writer(self) -> Callable[..., list[str]]:
        return detect_to_folder

    def pictures(self, model: nn.Layer) -> dict[str, np.ndarray]:
        """Return panels `objects | found` of fixed validation samples, by name."""
        dataset = self._dataset("EvalDataset")
        dataset.data_fields = ["image", "gt_bbox", "gt_class"]
        dataset.parse_dataset()
        count = min(PICTURES, len(dataset.roidbs))
        chosen = np.linspace(0, len(dataset.roidbs) - 1, count).astype(int)
        samples = [dataset.roidbs[index] for index in chosen]
        root = Path(dataset.dataset_dir or ".") / (dataset.image_dir or "")
        files = [Path(os.path.relpath(sample["im_file"], root)) for sample in samples]
        panels = {}
        for name, sample in zip(name_results(files), samples, strict=True):
            image = read_picture(sample["im_file"], max_value=self.max_value)
            count = len(sample.get("gt_bbox", []))
            truth = np.zeros((count, 6), np.float32)
            if count:
                truth[:, 0] = sample["gt_class"].reshape(-1)
                truth[:, 1] = 1.0
                truth[:, 2:] = sample["gt_bbox"]
            true = collect_detections(truth, None, self.class_names)
            found = self.predict_image(model, image).above(SHOWN_SCORE)
            panels[name] = join_side_by_side(
                [draw_detections(image, true), draw_detections(image, found)]
            )
        return panels

    # -- export --------------------------------------------------------------------------------

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
        """Write the detector with its NMS for deployment; see
        `ppvision.deploy.write.detection_export.export_detector`.

        Raises:
            ConfigError: there is an `output_op`, which is for logits; or a two-stage detector, or
                more than one class, is exported as ONNX; or a two-stage detector in integers.
        """
        if output_op is not None:
            raise ConfigError(
                f"export --output_op {output_op}: applies to logits; a detector's graph ends in "
                "NMS. Omit it."
            )
        architecture = self.content["architecture"]
        if integers is not None and architecture in TWO_STAGES:
            raise ConfigError(
                f"export --int8: expected a detector of one stage, got {architecture}: OpenVINO, "
                "which runs the integers, does not know the operators that choose regions. Omit it."
            )
        if model_format == "onnx" and architecture in TWO_STAGES:
            raise ConfigError(
                f"export --format onnx: expected a detector of one stage, got {architecture}, "
                "whose graph paddle2onnx 2.1 aborts on. Use --format paddle."
            )
        if model_format == "onnx" and self.content["num_classes"] > 1:
            raise ConfigError(
                f"export --format onnx: expected a detector of one class, got "
                f"{self.content['num_classes']}: of the NMS that paddle2onnx 2.1 writes, only the "
                "first class's scores are right. Use --format paddle."
            )
        if architecture in ONE_BY_ONE and input_shape[0] not in (None, 1):
            raise ConfigError(
                f"export --input_shape: expected a batch of 1, got {input_shape[0]}: "
                f"{architecture} takes one image at a time."
            )
        one_by_one = architecture in ONE_BY_ONE or model_format == "onnx" or integers is not None
        if input_shape[0] is None and one_by_one:
            logger.info(f"export: {architecture} takes one image at a time: batch 1")
            input_shape = [1, *input_shape[1:]]
        if integers is not None and not has_integers(model):
            keep_float = (*integers.keep_float, *self.constant_layers)
            integers = replace(integers, keep_float=keep_float)
        return export_detector(
            DetectorLayer(model),
            folder,
            input_shape=input_shape,
            num_classes=self.content["num_classes"],
            format=model_format,
            transforms=self._transforms(),
            classes=self.class_names,
            bits=bits,
            max_value=self.max_value,
            architecture=architecture,
            metric=self.content["metric"],
            paddlex_name=paddlex_name,
            **make_integer_arguments(integers),
        )

    @property
    def paddlex_name(self) -> str:
        kind = "masks" if self._has_masks else "detection"
        return choose_default_name(kind, self.content["architecture"])


def _decoded(image: np.ndarray) -> dict[str, object]:
    """Return the entries of a sample after PaddleDetection's Decode.

    Decode itself does not get pixels, because it would try to decode their bytes as a file.
    """
    height, width = image.shape[:2]
    return {
        "image": image,
        "h": height,
        "w": width,
        "im_shape": np.array([height, width], np.float32),
        "scale_factor": np.ones(2, np.float32),
    }
